"""Runs the kernel tests in Triton's interpreter, in a process of their own, and counts that they did run.

The interpreter must be chosen before a kernel is decorated, and stays chosen, so it cannot share a process with
compiled kernels.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

# File -> how many tests it holds at least, so that it cannot turn empty unnoticed.
FILES = {
    "test_adamw8bit_kernel.py": 95,
    "test_blockwise_kernel.py": 110,
    "test_flash_kernel.py": 90,
    "test_fourbit_kernel.py": 250,
    "test_matmul_kernel.py": 250,
    "test_rounding_kernel.py": 120,
}


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is installed on Linux only")
@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name: str, tmp_path: Path):
    path, report = Path(__file__).with_name(name), tmp_path / "report.xml"
    root = Path(__file__).parents[2]
    # -P: not the working folder first, but the minift that this process imports, too.
    command = [sys.executable, "-P", "-m", "pytest", str(path), "-m", "not gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--junitxml={report}"],
        cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    counts = ElementTree.parse(report).getroot().find("testsuite")
    assert counts is not None
    assert int(counts.attrib["tests"]) > FILES[name]
    assert [counts.attrib[key] for key in ("failures", "errors", "skipped")] == ["0", "0", "0"], done.stdout[-5000:]
