"""The timing harness on functions and clocks made up here, the command line, and every real row at a tiny size.

A made-up function lasts as long as the test says: it moves a clock that the harness reads.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import minift.quant
from benchmarks import __main__ as program
from benchmarks import (
    bench_adamw8bit,
    bench_attention,
    bench_blockwise,
    bench_fourbit,
    bench_int8,
    bench_linear,
    bench_rounding,
    bench_train,
    harness,
)
from benchmarks.harness import Row, Setup, check_bits, check_close, measure

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


class FakeTime:
    """A clock that only moves when told to."""

    def __init__(self):
        self.now = 0.0
        self.read = 0

    def clock(self, work: Callable[[], object]) -> float:
        self.read += 1
        before = self.now
        work()
        return self.now - before

    def lasts(self, seconds: float, log: list[Any] | None = None, tag: str = "") -> Callable[[Any], Any]:
        """A function that takes that long, writes (tag, input) down and returns its input."""

        def call(x: Any) -> Any:
            self.now += seconds
            if log is not None:
                log.append((tag, x))
            return x

        return call


def agree(ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise ValueError(f"{ours} is not {theirs}")


def fake_row(time: FakeTime, name: str = "a row", **changes: Any) -> Row:
    """Ours takes 1 s, theirs 3 s."""
    fields: dict[str, Any] = {
        "name": name, "inputs": [0], "ours": time.lasts(1.0), "theirs": time.lasts(3.0), "check": agree
    }  # fmt: skip
    return Row(**(fields | changes))


# --- measuring --------------------------------------------------------------------------------------------------------


def test_order_alternates_and_the_check_comes_first():
    time, log = FakeTime(), []

    def check(ours: Any, theirs: Any) -> None:
        log.append(("check", (ours, theirs)))
        assert time.read == 0, "something was timed before the check"

    row = fake_row(time, ours=time.lasts(1, log, "ours"), theirs=time.lasts(1, log, "theirs"), check=check)
    measure(row, 4, time.clock)
    order = [tag for tag, _ in log]
    assert sorted(order[:2]) == ["ours", "theirs"] and order[2] == "check"
    assert sorted(order[3:5]) == ["ours", "theirs"], "one round each to find the number of repeats"
    assert order[5:] == ["ours", "theirs", "theirs", "ours", "ours", "theirs", "theirs", "ours"]


def test_inputs_rotate_on_each_side():
    time, log = FakeTime(), []
    row = fake_row(time, inputs=[10, 11, 12], ours=time.lasts(1, log, "o"), theirs=time.lasts(1, log, "t"))
    measure(row, 5, time.clock)
    for tag in "ot":
        seen = [x for which, x in log if which == tag]
        assert seen[0] == 10, "the check looks at the first input"
        assert seen[1:] == [10, 11, 12, 10, 11, 12]


def test_ratio_statistics_equal_numpy():
    """A round's ratio is formed of that round's two times, and numpy's percentiles interpolate the same way."""
    generator = numpy.random.default_rng(0)
    ours, theirs = generator.uniform(0.5, 2.0, 21), generator.uniform(0.5, 2.0, 21)
    time = FakeTime()

    def scripted(durations: Any) -> Callable[[Any], int]:
        script = iter([1.0, 1.0, *durations])  # the check and the search for the number of repeats come before

        def call(_: Any) -> int:
            time.now += next(script)
            return 0

        return call

    found = measure(fake_row(time, ours=scripted(ours), theirs=scripted(theirs)), 21, time.clock)
    wanted = numpy.percentile(theirs / ours, [10, 50, 90])
    # Differences of the running clock, up to 80 s, round by 2^-47: 1e-12 is a hundred times that.
    assert [found["ratio"][key] for key in ("p10", "median", "p90")] == pytest.approx(wanted, rel=1e-12)
    assert found["seconds"]["ours"] == pytest.approx(numpy.median(ours), rel=1e-12)
    assert found["seconds"]["theirs"] == pytest.approx(numpy.median(theirs), rel=1e-12)
    assert found["rounds"] == 21


def test_short_calls_are_repeated():
    """2^-17 s a call: 131.072 of them last 1 ms, so rounds of 256. Seconds are those of one call, exact in fp64."""
    time, log = FakeTime(), []
    row = fake_row(time, ours=time.lasts(2**-17, log), theirs=time.lasts(2**-6))
    found = measure(row, 2, time.clock)
    assert found["seconds"] == {"ours": 2**-17, "theirs": 2**-6}
    assert found["ratio"]["median"] == 2**11
    assert len(log) == 1 + 511 + 2 * 256, "the check, 1 + 2 + ... + 256 to find the number, two rounds"


def test_what_a_row_says():
    time = FakeTime()
    row = fake_row(time, bytes_moved=600, goal=2.5, honest=True, facts=lambda ours, theirs: {"note": f"{ours}{theirs}"})
    found = measure(row, 2, time.clock, bandwidth=1000.0)
    assert found["bandwidth_share"] == {"ours": 0.6, "theirs": 0.2}  # 600 bytes in 1 s and in 3 s
    assert (found["goal"], found["honest"], found["note"]) == (2.5, True, "00")
    assert found["ratio"]["median"] == 3
    plain = measure(fake_row(time), 2, time.clock, bandwidth=1000.0)
    assert plain.keys() == {"name", "rounds", "ratio", "seconds"}


def raising(_: Any) -> Any:
    raise RuntimeError("no such\n   kernel")


def test_what_cannot_be_compared_is_not_timed():
    time = FakeTime()
    disagreeing = fake_row(time, theirs=lambda x: x + 1)
    assert measure(disagreeing, 2, time.clock) == {"name": "a row", "disagrees": "ValueError: 0 is not 1"}
    why = "RuntimeError: no such kernel"
    assert measure(fake_row(time, theirs=raising), 2, time.clock) == {"name": "a row", "skipped": why}
    assert measure(fake_row(time, ours=raising), 2, time.clock) == {"name": "a row", "failed": why}
    assert time.read == 0


def test_rows_are_built_one_by_one():
    """A row holds large inputs: the next is built after this one was measured."""
    time, log = FakeTime(), []

    def rows() -> Iterator[Row]:
        for name in ("first", "second"):
            log.append(f"build {name}")
            yield fake_row(time, name)

    for found in harness.measure_all(rows(), 2, time.clock, suffix=", compiled"):
        log.append(found["name"])
    assert log == ["build first", "first, compiled", "build second", "second, compiled"]


def test_cpu_clock():
    def work() -> None:
        ends = os.times().elapsed + 0.05
        while os.times().elapsed < ends:
            pass

    # The system clock ticks in hundredths of a second: up to two ticks less than asked for; no upper limit holds.
    assert harness.cpu_seconds(work) >= 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_clock_waits_for_the_work():
    """A GPU reads and writes 512 MB in no less than the time at 20 TB/s, far above any memory there is."""
    assert harness.copy_bandwidth(torch.device("cuda")) < 20e12


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_rotated_inputs_exceed_the_cache_and_share_no_memory():
    cache = harness.last_level_cache()
    x = torch.arange(cache // 16, dtype=torch.float32)  # a quarter of the cache
    inputs = Setup(CPU).rotate((x, "state"), x.nbytes)
    assert sum(tensor.nbytes for tensor, _ in inputs) >= 2 * cache
    assert len({tensor.data_ptr() for tensor, _ in inputs}) == len(inputs)
    assert all(torch.equal(tensor, x) and state == "state" for tensor, state in inputs)
    assert len(Setup(CPU).rotate(x, 1 << 40)) == 2
    assert len(Setup(CPU, quick=True).rotate(x, 1)) == 2


def test_last_level_cache(tmp_path: Path):
    """As Linux writes them down: two of the first level, one of each other."""
    assert harness.last_level_cache(tmp_path) == 32 * 2**20
    for number, size in enumerate(("32K", "48K", "1024K", "98304K")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    assert harness.last_level_cache(tmp_path) == 96 * 2**20


@pytest.mark.parametrize(("full", "quick"), [(1, 1), (32, 32), (256, 64), (4096, 256), (14336, 896)])
def test_sizes(full: int, quick: int):
    assert Setup(CPU).size(full) == full
    assert Setup(CPU, quick=True).size(full) == quick


# --- checks -----------------------------------------------------------------------------------------------------------


def test_check_bits():
    x = torch.tensor([1.0, -0.0, float("nan")])
    check_bits(x, x.clone())
    for other in (torch.tensor([1.0, 0.0, float("nan")]), x.bfloat16(), x[:2], x.view(1, 3), x.int()):
        with pytest.raises(ValueError, match=r"against|values differ"):
            check_bits(x, other)
    codes = torch.zeros(1000, dtype=torch.uint8)
    check_bits(codes, torch.cat([codes[1:], codes[:1] + 1]), allowed=0.001)
    with pytest.raises(ValueError, match="2 of 1000 values differ"):
        check_bits(codes, torch.cat([codes[2:], codes[:2] + 1]), allowed=0.001)


def test_check_close():
    theirs = torch.tensor([3.0, 4.0])  # norm 5
    check_close(torch.tensor([3.0, 4.25]), theirs, limit=0.05)
    with pytest.raises(ValueError, match=r"0\.05, more than 0\.049"):
        check_close(torch.tensor([3.0, 4.25]), theirs, limit=0.049)
    for other in (torch.tensor([3.0, float("nan")]), theirs.double(), theirs[:1]):
        with pytest.raises(ValueError):
            check_close(other, theirs, limit=0.05)


# --- the real rows ----------------------------------------------------------------------------------------------------

MODULES = [
    bench_attention, bench_fourbit, bench_blockwise, bench_linear, bench_int8, bench_rounding, bench_adamw8bit,
]  # fmt: skip


def spoil(result: Any) -> Any:
    """The same structure with other numbers."""
    if isinstance(result, tuple):
        return tuple(spoil(part) for part in result)
    if not isinstance(result, Tensor):
        return result
    return result * 1.5 if result.is_floating_point() else result ^ 1


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_row_agrees_and_would_notice_if_not(module: ModuleType):
    names = []
    for row in module.rows(Setup(CPU, quick=True)):
        ours, theirs = row.ours(row.inputs[0]), row.theirs(row.inputs[0])
        row.check(ours, theirs)
        with pytest.raises(ValueError):
            row.check(spoil(ours), theirs)
        row.check(row.ours(row.inputs[1]), theirs)  # the copies are as good as the first
        names.append(row.name)
    assert names


def test_wrong_codes_are_counted():
    """bitsandbytes' CPU codes: 0.0 becomes code 131, not 127 (facts known of its table); ours are the nearest."""
    (row, _) = bench_blockwise.rows(Setup(CPU, quick=True))
    x = torch.cat([torch.ones(1), torch.zeros(255), torch.randn(1 << 16)])
    ours, theirs = row.ours(x), row.theirs(x)
    assert (theirs[0][1:256] == 131).all()
    facts = bench_blockwise.wrong_codes(x, ours, theirs)
    assert facts["wrong_codes_ours"] == 0
    assert 255 / len(x) <= facts["wrong_codes_theirs"] < 0.01
    shifted = ours[0].clone()
    shifted[1000:1100] += torch.where(shifted[1000:1100] < 128, 2, -2).to(torch.uint8)
    assert bench_blockwise.wrong_share(x, shifted, ours[1]) == 100 / len(x)


def test_the_rows_of_training():
    """Two timed steps of three each: 6 / 2 and 4 / 4 seconds."""

    def records(*seconds: float) -> list[dict[str, Any]]:
        common = {"trained_tokens": 12, "loss": 0.5, "peak_bytes": 2e9}
        return [{"seconds": second} | common for second in (100.0, *seconds)]

    row = bench_train.summarize("bf16", {"ours": records(9.0, 2.0, 4.0), "theirs": records(9.0, 6.0, 4.0)})
    assert row["ratio"] == {"least": 1.0, "median": 2.0, "most": 3.0}
    assert row["seconds"] == {"ours": 3.0, "theirs": 5.0}
    assert row["trained_tokens_per_second"] == {"ours": 4.0, "theirs": 2.4}
    assert harness.whiskers(row) == (1.0, 3.0)
    assert "4 against 2 trained tokens/s" in row["note"]


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Iterator[Row]]], None]:
    """Puts made-up rows in the place of the benchmark `fourbit`."""

    def put(rows: Callable[[], Iterator[Row]]) -> None:
        module = ModuleType("benchmarks.bench_fourbit")
        module.__dict__["rows"] = lambda setup: rows()
        monkeypatch.setitem(sys.modules, "benchmarks.bench_fourbit", module)

    return put


def quick_rows(*names: str) -> Iterator[Row]:
    """Rows that last as long as 1 ms needs, on the real clock."""
    for name in names:
        yield Row(name, [0], ours=lambda x: x, theirs=lambda x: x, check=agree)


def test_numbers_are_written(fake_benchmark: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fake_benchmark(lambda: quick_rows("one", "two"))
    place = tmp_path / "new" / "numbers.json"
    assert program.main(["fourbit", "--device", "cpu", "--rounds", "3", "--json", str(place)]) == 0
    results = json.loads(place.read_text())
    assert results.keys() == {"machine", "device", "versions", "rows"}
    assert results["device"] == "cpu" and results["versions"]["torch"] == torch.__version__
    assert results["machine"].endswith(f"{torch.get_num_threads()} threads")
    assert [(row["benchmark"], row["name"], row["rounds"]) for row in results["rows"]] == [
        ("fourbit", "one", 3), ("fourbit", "two", 3)
    ]  # fmt: skip
    said = capsys.readouterr()
    assert "| fourbit: one |" in said.out and "| fourbit: two |" in said.out
    assert os.listdir(place.parent) == ["numbers.json"]


def test_ctrl_c_keeps_what_is_done(
    fake_benchmark: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def interrupted(_: Any) -> Any:
        raise KeyboardInterrupt

    def rows() -> Iterator[Row]:
        yield from quick_rows("done")
        yield Row("never done", [0], ours=interrupted, theirs=lambda x: x, check=agree)

    fake_benchmark(rows)
    place = tmp_path / "numbers.json"
    assert program.main(["fourbit", "--device", "cpu", "--rounds", "2", "--json", str(place)]) == 130
    assert [row["name"] for row in json.loads(place.read_text())["rows"]] == ["done"]
    said = capsys.readouterr()
    assert "| fourbit: done |" in said.out
    assert "stopped; rows kept: 1" in said.err


def test_disagreement_is_a_row_and_a_failure(
    fake_benchmark: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def rows() -> Iterator[Row]:
        yield Row("wrong", [0], ours=lambda x: x, theirs=lambda x: x + 1, check=agree)
        yield from quick_rows("right")

    fake_benchmark(rows)
    place = tmp_path / "numbers.json"
    assert program.main(["fourbit", "--device", "cpu", "--rounds", "2", "--json", str(place)]) == 1
    wrong, right = json.loads(place.read_text())["rows"]
    assert wrong == {"benchmark": "fourbit", "name": "wrong", "disagrees": "ValueError: 0 is not 1"}
    assert "ratio" in right
    assert "disagrees: ValueError: 0 is not 1" in capsys.readouterr().out


def test_a_row_that_cannot_be_built(fake_benchmark: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    def rows() -> Iterator[Row]:
        yield from quick_rows("done")
        raise RuntimeError("out of memory")

    fake_benchmark(rows)
    assert program.main(["fourbit", "--device", "cpu", "--rounds", "2"]) == 1
    said = capsys.readouterr().out
    assert "| fourbit: done |" in said and "failed: RuntimeError: out of memory" in said


def test_a_missing_peer_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what Python itself does with a name that must not import
    monkeypatch.delitem(sys.modules, "benchmarks.bench_blockwise")
    assert program.main(["blockwise", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert "blockwise: left out, bitsandbytes is not installed" in said.err
    assert said.out == ""


def test_compiled_rows_say_so(
    fake_benchmark: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    compiled = []
    monkeypatch.setattr(minift.quant, "compile_kernels", lambda: compiled.append(True), raising=False)
    fake_benchmark(lambda: quick_rows("one"))
    assert program.main(["fourbit", "--device", "cpu", "--rounds", "2"]) == 0
    assert compiled == [] and "compiled" not in capsys.readouterr().out
    assert program.main(["fourbit", "--device", "cpu", "--rounds", "2", "--compile"]) == 0
    assert compiled == [True] and "| fourbit: one, compiled |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fourbits"], "unknown benchmark fourbits: choose from train, data, decoder,"),
        (["report", "fourbit"], "run it alone"),
        (["train", "--quick"], "train and data run on a CPU"),
        (["train", "--compile"], "train and data run on a CPU"),
        (["--rounds", "1"], "choose at least 2"),
        (["--rounds", "many"], "invalid"),
        pytest.param(
            ["--device", "cuda"], "needs a CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_without_names_all_that_make_sense():
    own = ["train", "data"]
    rest = ["decoder", "attention", "fourbit", "blockwise", "linear", "int8", "lora", "rounding", "adamw8bit"]
    assert program.parse(["--device", "cpu"]).names == [*own, *rest]
    assert program.parse(["--device", "cpu", "--quick"]).names == rest


def test_help_in_a_process_of_its_own():
    command = [sys.executable, "-m", "benchmarks", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for word in ("train", "fourbit", "blockwise", "linear", "int8", "rounding", "report", "--json", "--rounds"):
        assert word in done.stdout


def test_saved_numbers_are_read_again(tmp_path: Path):
    from benchmarks import report

    time = FakeTime()
    rows = [{"benchmark": "x"} | measure(fake_row(time, goal=2.0), 3, time.clock)]
    results = {"machine": "a machine", "device": "cpu", "versions": {"torch": "2"}, "rows": rows}
    harness.save(copy.deepcopy(results), tmp_path / "numbers.json")
    assert report.read(tmp_path) == [results]
