"""Run benchmarks by name: `python -m benchmarks [train ...] [--json FILE]`; without a name, all of them.

Each prints a table; --json also writes the numbers, with versions and machine.
"""

import argparse
import importlib
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

NAMES = ("train",)
PEERS = ("torch", "transformers", "peft", "trl", "bitsandbytes")


def machine() -> str:
    """The processor and its cores, or the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    results = {"machine": machine(), "versions": {name: version(name) for name in PEERS}, "rows": {}}
    print(f"{results['machine']}; " + ", ".join(f"{k} {v}" for k, v in results["versions"].items()), file=sys.stderr)
    for name in arguments.names or NAMES:
        module = importlib.import_module(f"benchmarks.bench_{name}")
        rows = module.run()
        print(module.format_rows(rows))
        results["rows"][name] = rows
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


main()
