"""Nothing hangs, nothing is left behind: forged answers, files taken away, Ctrl-C, a parent that is killed."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import venv
from pathlib import Path

import pytest

from minift.course import registry
from minift.course.collect import Submission
from minift.course.grader import Grader
from minift.course.marks import grade_all
from minift.course.runner import Closed, Runner

E01 = registry.find("e01")
SOLUTION = E01.text("solution.py")
ROOT = Path(__file__).parents[2]
SLEEPS = "import time\n" + SOLUTION.replace("    magnitude = x.abs()", "    time.sleep(600)\n    magnitude = x.abs()")
# Writes a frame of its own where the child writes its answers: to the same open file, so that both stay.
WRITE = """import os, json
def write(body):
    head = json.dumps({"body": body, "sizes": []}).encode()
    for number in range(3, 64):
        try:
            if os.path.sameopenfile(number, os.open("response.bin", os.O_RDONLY)):
                os.write(number, len(head).to_bytes(8, "little") + head)
                return
        except OSError:
            pass
"""
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture(scope="module")
def grader():
    with Grader() as made:
        yield made


@pytest.mark.parametrize(
    "gone",
    [
        "os.remove('printed.txt')",
        "os.remove('response.bin'); os.mkfifo('response.bin')",
        "os.remove('printed.txt'); os.mkfifo('printed.txt')",
    ],
)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_files_of_the_judge_may_be_taken_away(grader, gone: str):
    """A pipe without an end in the place of a file would be read from for ever."""
    assert grader.grade(E01, f"import os\n{gone}\n" + SOLUTION, "x.py").earned == E01.points


@pytest.mark.parametrize(
    "body",
    [
        {"dict": [["end", 10**9]]}, {"dict": [["end", [1]]]}, {"dict": [["end", True]]}, {"dict": [["begin", -1]]},
        {"dict": [["import", 5]]}, {"dict": [["refusals", 5]]}, {"dict": [["done", True]]}, 7,
        {"dict": [["end", 0], ["value", 3], ["changed", 5]]}, {"dict": [["end", 0], ["raised", {"dict": []}]]},
        {"dict": [["end", 0], ["value", {"tensor": 0, "dtype": "int8", "shape": [10**9, 10**9]}]]},
    ],
    ids=str,
)  # fmt: skip
def test_forged_answers_get_nothing_and_stop_nobody(grader, body):
    forged = f"{WRITE}write({body!r})\n{SOLUTION}\nos._exit(0)\n"
    verdict = grader.grade(E01, forged, "x.py")
    assert verdict.earned == 0 and verdict.status in ("crash", "policy", "fail", "import_error"), verdict.message


def test_a_number_of_no_case_is_not_looked_up(grader):
    """Wrong answers are compared with those of the known mistakes, case by case; a forged case has none."""
    wrong = SOLUTION.replace("torch.round(x / scale)", "(x / scale)")
    verdict = grader.grade(E01, f"{WRITE}write({{'dict': [['end', 10**9], ['value', 1]]}})\n{wrong}", "x.py")
    assert (verdict.status, verdict.misconception) == ("fail", "truncates")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 10**4000", "the answer is int 1000"),
        ("return x.to_sparse(), x", "is not a plain tensor"),
        ("return x.to('meta'), x", "is not a plain tensor"),
        ("raise NotImplementedError('for Half')", "NotImplementedError: for Half"),
    ],
)
def test_odd_answers_are_wrong_answers(grader, body: str, said: str):
    verdict = grader.grade(E01, f"def quantize(x, dim=None):\n    {body}\ndef dequantize(q, scale): pass\n", "x.py")
    assert verdict.status == "fail" and said in verdict.checks[0].message


@pytest.mark.parametrize("nested", ["-" * 300_000 + "1", "1+" * 300_000 + "1", "not " * 300_000 + "1"], ids=len)
def test_code_that_is_nested_too_deeply_stops_nobody(grader, tmp_path: Path, nested: str):
    source = f"{SOLUTION}\nx = {nested}\n"
    record = grade_all([Submission("ann", {"e01": ("x.py", source.encode())})], [E01], tmp_path)[0]
    assert record["earned"] == 0 and record["exercises"]["e01"]["status"] == "policy"


def test_a_number_larger_than_any_float_is_compared(grader):
    from minift.course.compare import compare
    from minift.course.spec import Case

    assert compare(Case("f", {}, 1.5), 10**400).size > 1 and compare(Case("f", {}, 3), -(10**400)).size > 1
    assert compare(Case("f", {}, 10**400), 10**400).size == 0


def test_closing_stops_a_running_job():
    runner = Runner()
    timer = threading.Timer(4.0, runner.close)
    timer.start()
    start = time.monotonic()
    with pytest.raises(Closed), Grader(runner=runner) as grader:
        while True:
            grader.grade(E01, SLEEPS, "x.py")
    assert time.monotonic() - start < 9
    timer.join()


@needs_linux
def test_closing_stops_a_start(monkeypatch):
    """While torch is still being imported, which takes seconds: this process never says that it is ready."""
    monkeypatch.setattr("minift.course.runner._python", lambda *arguments: ["sleep", "60"])
    runner = Runner(namespaces=False)
    runner.forks = True
    timer = threading.Timer(0.3, runner.close)
    timer.start()
    with pytest.raises(Closed), Grader(runner=runner) as grader:
        grader.grade(E01, SOLUTION, "x.py")
    timer.join()


def test_a_stopped_class_goes_on_where_it_was(tmp_path: Path):
    """Ctrl-C in the middle: no record of what was not finished, and the rest comes with the next run."""
    class_ = [Submission(name, {"e01": ("x.py", SOLUTION.encode())}) for name in "abcd"]
    done = []

    def stop() -> None:
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grade_all(class_, [E01], tmp_path, progress=stop)
    kept = [json.loads(path.read_text())["student"] for path in tmp_path.glob("*.json")]
    assert 2 <= len(kept) < 4
    records = grade_all(class_, [E01], tmp_path)
    assert [record["student"] for record in records] == list("abcd")
    assert all(record["earned"] == E01.points for record in records)
    assert not list(tmp_path.glob("*.partial"))


def running(word: str) -> list[str]:
    """Command lines of the processes that a word is in."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if word in line and "zygote" in line:
            found.append(line)
    return found


def wait_until(true, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not true():
        time.sleep(0.05)
    return bool(true())


@needs_linux
@pytest.mark.parametrize("namespaces", [True, False])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_nothing_outlives_a_check_that_is_stopped(tmp_path: Path, stop: signal.Signals, namespaces: bool):
    """A submission that sleeps is at work when the check is stopped."""
    (tmp_path / "x.py").write_text(SLEEPS.replace("import time\n", "import time\nopen('begun', 'w').close()\n"))
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)}
    if not namespaces:
        environment["PATH"] = ""  # there is no `unshare` then
    command = [sys.executable, "-m", "minift.course", "check", "e01", "--file", str(tmp_path / "x.py")]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert wait_until(lambda: list(tmp_path.glob("tmp/*/*/begun"))), process.poll()
        assert running(str(tmp_path))
        process.send_signal(stop)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    if stop == signal.SIGINT:
        assert process.returncode == 130 and "Stopped." in said and "Traceback" not in said
    # A judge that was killed cannot tell its process to stop: that one sees that it is alone.
    assert wait_until(lambda: not running(str(tmp_path)) and not list((tmp_path / "tmp").iterdir()), E01.seconds / 2)


def test_libraries_that_are_not_in_site_packages_are_found(tmp_path: Path):
    """An isolated child has to be told where torch is: `pip install --user`, PYTHONPATH."""
    venv.create(tmp_path / "empty", with_pip=False, symlinks=os.name != "nt")
    python = tmp_path / "empty" / ("Scripts" if os.name == "nt" else "bin") / "python"
    places = dict.fromkeys([str(ROOT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (tmp_path / "x.py").write_text(SOLUTION)
    done = subprocess.run(
        [python, "-m", "minift.course", "check", "e01", "--file", "x.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(places)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "3 of 3 points" in done.stdout, done.stdout + done.stderr
