"""Run benchmarks by name, without a name all that make sense on the device; each says what agrees and who is faster.

`report` renders the files of benchmarks/results/ into the README's table and a plot instead.
"""

import argparse
import importlib
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.harness import Setup, collect, copy_bandwidth, cpu_seconds, cuda_seconds, measure_all, sentence

ROOT = Path(__file__).parents[1]
NAMES = (
    "train", "data", "decoder", "attention", "fourbit", "blockwise", "linear", "int8", "lora", "rounding", "adamw8bit",
)  # fmt: skip
OWN_PROCESSES = ("train", "data")  # run the whole stack in processes of their own, on a CPU, at one size
PEERS = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes")
ROUNDS = {"cpu": 15, "cuda": 30}


def machine(device: str) -> str:
    """The processor and its cores, or the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def rounds_type(text: str) -> int:
    """argparse type: percentiles need two rounds."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value} rounds: choose at least 2")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(NAMES)}, or report (default: see above)")
    parser.add_argument("--device", choices=tuple(ROUNDS), help="default: cuda where there is a GPU")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file, after each row")
    parser.add_argument("--rounds", type=rounds_type, help="rounds a row (default: 15 on a CPU, 30 on a GPU)")
    parser.add_argument("--compile", action="store_true", help="compile minift's CPU kernels first")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run? The times mean nothing")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.names) - {*NAMES, "report"})
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}: choose from {', '.join(NAMES)}, report")
    if "report" in arguments.names and len(arguments.names) > 1:
        parser.error("report renders what has been measured: run it alone")
    has_gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_gpu:
        parser.error("--device cuda needs a CUDA GPU, and PyTorch finds none here")
    arguments.device = arguments.device or ("cuda" if has_gpu else "cpu")
    apart = arguments.device == "cuda" or arguments.compile or arguments.quick
    if apart and set(arguments.names) & set(OWN_PROCESSES):
        parser.error("train and data run on a CPU, at one size: leave --device cuda, --compile, --quick out")
    arguments.names = arguments.names or [name for name in NAMES if not (apart and name in OWN_PROCESSES)]
    return arguments


def rows_of(name: str, arguments: argparse.Namespace, bandwidth: float | None) -> Iterator[dict[str, Any]]:
    """The finished rows of one benchmark."""
    module = importlib.import_module(f"benchmarks.bench_{name}")
    if name in OWN_PROCESSES:
        yield from module.run()
        return
    rows = module.rows(Setup(torch.device(arguments.device), arguments.quick, arguments.compile))
    clock = cuda_seconds if arguments.device == "cuda" else cpu_seconds
    rounds = arguments.rounds or ROUNDS[arguments.device]
    yield from measure_all(rows, rounds, clock, bandwidth, suffix=", compiled" if arguments.compile else "")


def run(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Fill `results`; a benchmark whose peer is not installed is left out with a sentence."""
    if arguments.compile:
        importlib.import_module("minift.quant").compile_kernels()
    if arguments.device == "cuda":
        results["bandwidth"] = copy_bandwidth(torch.device("cuda"))
    for name in arguments.names:
        try:
            rows = rows_of(name, arguments, results.get("bandwidth"))
            collect(results, ({"benchmark": name} | row for row in rows), arguments.json)
        except ModuleNotFoundError as error:
            missing = (error.name or "").split(".")[0]
            if missing not in PEERS:
                raise
            print(f"{name}: left out, {missing} is not installed: pip install -e '.[dev]'", file=sys.stderr)
        except Exception as error:  # the row could not be built; those of the other benchmarks can
            collect(results, [{"benchmark": name, "name": "the rows left", "failed": sentence(error)}], arguments.json)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 1 if a row disagrees or fails, or none is measured; 2: bad arguments; 130: Ctrl-C."""
    arguments = parse(argv)
    if arguments.names == ["report"]:
        try:
            report.update(ROOT / "README.md", ROOT / "benchmarks" / "results")
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    device = arguments.device
    results: dict[str, Any] = {"machine": machine(device), "device": device, "versions": versions(), "rows": []}
    print(report.describe(results), file=sys.stderr)
    stopped = False
    try:
        run(arguments, results)
    except KeyboardInterrupt:
        stopped = True
        print(f"stopped; rows kept: {len(results['rows'])}", file=sys.stderr)
    if results["rows"]:
        print(report.table(results))
    if stopped:
        return 130
    bad = any("disagrees" in row or "failed" in row for row in results["rows"])
    return 1 if bad or not any("ratio" in row for row in results["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
