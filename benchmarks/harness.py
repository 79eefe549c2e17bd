"""Two implementations of one thing, timed side by side.

On a shared machine the same call takes 15 ms now and 64 ms a minute later, so two runs one after the other compare the
hours of the day. Here both sides run in one process, in turn, and every round gives one ratio:

    round 0    ours  theirs        ratio = seconds of theirs / seconds of ours        > 1: ours is faster
    round 1    theirs  ours
    round 2    ours  theirs        reported: the median of the ratios, and their 10th and 90th percentile

What slows the machine for a while slows both sides of a round, and who goes first changes. Three more rules:

- The results are compared before anything is timed: a fast wrong answer is no answer.
- The inputs rotate, and together exceed the last cache. A model's weight is not in the cache when its turn comes;
  calling a function on the same one again and again would measure something else.
- A round repeats a short call until it lasts a millisecond, far above what the clock and its call cost.
- The heap is trimmed before each round. A new tensor of 32 MB is fresh memory from Linux, and its page faults cost more
  than decoding a weight into it, unless the allocator happens to hold such a piece: then the same call takes a sixth of
  the time. Which of the two it is depends on all that the process did before. So here new memory is fresh, and rows
  where that decides are shown a second time with `kept_memory`.

On a GPU a call only queues its work, so the clock there is a pair of events in the queue. Bandwidth is compared with a
plain copy on the same device in the same run, not with a data sheet.

Left out: CUDA graphs (the time to launch a kernel counts, as it does in eager training), and hot caches.
"""

import ctypes
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minift.atomic import atomic_file
from minift.heap import give_memory_back

Work = Callable[[], object]
Clock = Callable[[Work], float]

# A row that was not measured: the peer raised, minift raised, their results differ. It could also not be built: failed.
WHY_NOT = ("skipped", "failed", "disagrees")
MIN_ROUND = 1e-3  # seconds
CUDA_INPUTS = 200_000_000  # bytes; the level-2 cache of an H200 holds 50 MB
COPY_BYTES = 1 << 29


@dataclass(frozen=True)
class Setup:
    """Where rows run, and how large they are.

    Attributes:
        device: of all inputs.
        quick: tiny sizes and two inputs a row: shows that everything runs; the times mean nothing.
        compiled: minift's compiled CPU forms are in use, which have goals of their own.
    """

    device: torch.device
    quick: bool = False
    compiled: bool = False

    def goal(
        self, *, compiled: float | None = None, eager: float | None = None, cuda: float | None = None
    ) -> float | None:
        """The goal of this way of running."""
        return cuda if self.device.type == "cuda" else compiled if self.compiled else eager

    def size(self, full: int) -> int:
        """A dimension: itself, or when quick a sixteenth of it, but 64 are left if there were so many."""
        return max(min(full, 64), full // 16) if self.quick else full

    def rotate(self, first: Any, nbytes: int) -> list[Any]:
        """`first` (of `nbytes`) and so many deep copies that together they exceed the last cache; at least two."""
        wanted = CUDA_INPUTS if self.device.type == "cuda" else 2 * last_level_cache()
        copies = 2 if self.quick else max(2, math.ceil(wanted / nbytes))
        return [first, *(deepcopy(first) for _ in range(copies - 1))]


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what is computed, with its sizes.
        inputs: what the two sides are called with, in turn.
        ours, theirs: one input -> result.
        check: (result of ours, of theirs) -> None; raises if they disagree.
        bytes_moved: least traffic of a call, for the share of the memory bandwidth.
        goal: the ratio aimed at.
        honest: shown although, or because, it is expected to lose.
        kept_memory: the allocator gives nothing back to Linux, so that new tensors cost no page faults.
        facts: (result of ours, of theirs) -> more entries of the reported row; `note` is shown in the tables.
    """

    name: str
    inputs: Sequence[Any]
    ours: Callable[[Any], Any]
    theirs: Callable[[Any], Any]
    check: Callable[[Any, Any], None]
    bytes_moved: float | None = None
    goal: float | None = None
    honest: bool = False
    kept_memory: bool = False
    facts: Callable[[Any, Any], dict[str, Any]] | None = None


# --- timing -----------------------------------------------------------------------------------------------------------


def cpu_seconds(work: Work) -> float:
    """How long `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cuda_seconds(work: Work) -> float:
    """How long the GPU takes for what `work` queues, waits between its kernels included."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Side:
    """One of the two, with its own place in the ring of inputs."""

    def __init__(self, call: Callable[[Any], Any], inputs: Sequence[Any], clock: Clock):
        self.call, self.inputs, self.clock = call, itertools.cycle(inputs), clock
        self.repeats = 1
        while self.round() < MIN_ROUND:
            self.repeats *= 2

    def round(self) -> float:
        """Seconds of one round."""

        def work() -> None:
            for _ in range(self.repeats):
                self.call(next(self.inputs))

        return self.clock(work)


def measure(row: Row, rounds: int, clock: Clock, bandwidth: float | None = None) -> dict[str, Any]:
    """Check and time one row.

    Args:
        rounds: at least 2.
        clock: seconds that a piece of work takes.
        bandwidth: bytes a second of a plain copy, if shares of it are wanted.

    Returns:
        `name` and either a sentence under one of the keys WHY_NOT, or `rounds`, `ratio` (p10, median, p90 of theirs /
        ours), `seconds` (median of a call: ours, theirs), and where the row has them `bandwidth_share`, `goal`,
        `honest` and its facts.
    """
    result: dict[str, Any] = {"name": row.name}
    facts = _agree(row)
    if why_not(facts):
        return result | facts
    with allocator(row.kept_memory):
        sides = {"ours": Side(row.ours, row.inputs, clock), "theirs": Side(row.theirs, row.inputs, clock)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in tqdm(range(rounds), desc=row.name, leave=False, disable=None):
            for name in sorted(sides, reverse=bool(number % 2)):
                if not row.kept_memory:
                    give_memory_back()
                seconds[name].append(sides[name].round() / sides[name].repeats)
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]
    result |= {"rounds": rounds, "ratio": spread(ratios)}
    result["seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
    if bandwidth and row.bytes_moved:
        shares = {name: row.bytes_moved / value / bandwidth for name, value in result["seconds"].items()}
        result["bandwidth_share"] = shares
    if row.goal is not None:
        result["goal"] = row.goal
    if row.honest:
        result["honest"] = True
    return result | facts


@contextmanager
def allocator(keep: bool) -> Iterator[None]:
    """With `keep`, glibc's allocator returns nothing to Linux, not even large pieces."""
    libc = ctypes.CDLL(None) if keep and sys.platform == "linux" else None
    if libc is None:
        yield
        return
    m_trim_threshold, m_mmap_max, default_mmap_max, default_trim = -1, -4, 65536, 128 * 1024  # from malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 1 << 30)
    try:
        yield
    finally:
        libc.mallopt(m_mmap_max, default_mmap_max)
        libc.mallopt(m_trim_threshold, default_trim)


def _agree(row: Row) -> dict[str, Any]:
    """Call both sides once and compare: the facts of the row, or why there is nothing to time."""
    stage = "skipped"
    try:
        theirs = row.theirs(row.inputs[0])
        stage = "failed"
        ours = row.ours(row.inputs[0])
        stage = "disagrees"
        row.check(ours, theirs)
    except Exception as error:  # whatever it is, the other rows can still be measured
        return {stage: sentence(error)}
    return row.facts(ours, theirs) if row.facts else {}


def measure_all(
    rows: Iterable[Row], rounds: int, clock: Clock, bandwidth: float | None = None, suffix: str = ""
) -> Iterator[dict[str, Any]]:
    """`measure` each row, its name followed by `suffix`, before the next one is built."""
    for row in rows:
        yield measure(replace(row, name=row.name + suffix), rounds, clock, bandwidth)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, interpolated between neighbours; at least two values."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"p10": tenths[0], "median": statistics.median(values), "p90": tenths[8]}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by copying 512 MB on a GPU: the fastest of 10 times."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    fastest = min(cuda_seconds(lambda: target.copy_(source)) for _ in range(10))
    return 2 * COPY_BYTES / fastest


def last_level_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the CPU's largest cache as Linux tells it; 32 MiB where it does not."""
    found = [path.read_text().strip() for path in folder.glob("index*/size")]
    return max((int(text[:-1]) * 1024 for text in found if text.endswith("K")), default=1 << 25)


# --- checks -----------------------------------------------------------------------------------------------------------


def check_bits(ours: Tensor, theirs: Tensor, allowed: float = 0.0) -> None:
    """Raise ValueError unless dtypes and shapes are equal and all but a share of `allowed` elements, bit for bit."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        raise ValueError(f"{ours.dtype} {tuple(ours.shape)} against {theirs.dtype} {tuple(theirs.shape)}")
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    differ = int((ours.contiguous().view(integer) != theirs.contiguous().view(integer)).sum())
    if differ > allowed * ours.numel():
        raise ValueError(f"{differ} of {ours.numel()} values differ")


def check_close(ours: Tensor, theirs: Tensor, limit: float) -> None:
    """Raise ValueError unless |ours - theirs| <= limit |theirs|, both Frobenius norms."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        raise ValueError(f"{ours.dtype} {tuple(ours.shape)} against {theirs.dtype} {tuple(theirs.shape)}")
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    if not error <= limit:  # NaN is no agreement either
        raise ValueError(f"the relative error is {error:.2g}, more than {limit:.2g}")


# --- results ----------------------------------------------------------------------------------------------------------


def save(results: dict[str, Any], path: Path) -> None:
    """Write `{"machine", "device", "versions", "rows"}` as JSON; a reader sees the old file or the whole new one."""
    with atomic_file(path) as place:
        place.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def collect(results: dict[str, Any], rows: Iterable[dict[str, Any]], path: Path | None) -> None:
    """Append each finished row to `results["rows"]`, say it, and save at once: Ctrl-C loses the unfinished one only."""
    for row in rows:
        results["rows"].append(row)
        print(brief(row), file=sys.stderr)
        if path:
            save(results, path)


def brief(row: dict[str, Any]) -> str:
    """A finished row in one line."""
    if "ratio" not in row:
        return f"{row['name']}: {why_not(row)}"
    low, high = whiskers(row)
    note = f"; {row['note']}" if "note" in row else ""
    return f"{row['name']}: {times(row['ratio']['median'])}x ({times(low)} to {times(high)}){note}"


def times(ratio: float) -> str:
    """Two digits behind the point, or two digits at all where that would leave fewer: 12.34, 0.34, 0.034."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def why_not(row: dict[str, Any]) -> str:
    """Why a row was not measured; empty if it was."""
    return "; ".join(f"{key}: {row[key]}" for key in WHY_NOT if key in row)


def sentence(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def whiskers(row: dict[str, Any]) -> tuple[float, float]:
    """10th and 90th percentile of the ratio, or where the rounds are too few for that their range."""
    ratio = row["ratio"]
    return (ratio["p10"], ratio["p90"]) if "p10" in ratio else (ratio["least"], ratio["most"])
