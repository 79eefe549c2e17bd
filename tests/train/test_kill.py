"""A run killed with SIGKILL, which no program can answer, at random moments: while it computes, writes, renames or
deletes. Resumed, it ends with the very bytes of the run that nobody killed.

A process that has imported everything forks one child for each run, so that a run takes a second. A step of the tiny
model is short and a checkpoint is written after each, so most moments fall into the writing.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import peers
import pytest

import minift

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

STEPS = 8
SERVER = """
    import json, os, sys
    import torch
    import minift

    folder, rows = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    tokenizer = minift.load_tokenizer(folder)
    print("ready", flush=True)
    while output := sys.stdin.readline():
        child = os.fork()
        if not child:
            torch.manual_seed(0)
            model = minift.load_model(folder, dtype=torch.float32)
            torch.manual_seed(0)
            minift.add_lora(model, minift.LoraConfig(r=64, alpha=16, dropout=0.2))
            config = minift.TrainConfig(
                max_steps=STEPS, batch_size=2, lr=2e-3, warmup_steps=2, save_every=1, gradient_accumulation=2,
                eval_every=3, best=True, resume=True, output_dir=output.strip(),
            )
            minift.train(model, tokenizer, rows, config, eval_rows=rows[:2])
            os._exit(0)
        print(child, flush=True)
        sys.stdin.readline()  # until then the number is the child's own, also if it has ended
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
""".replace("STEPS", str(STEPS))


class Runner:
    """Runs and kills runs in other processes."""

    def __init__(self, folder: Path, script: Path):
        script.write_text(textwrap.dedent(SERVER), encoding="utf-8")
        rows = json.dumps(peers.as_messages(peers.demo_rows(9)))
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(folder), rows],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"PYTHONPATH": str(Path(minift.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def run(self, output: Path, kill_after: int | None = None, delay: float = 0.0) -> int:
        """Exit status of a run, killed `delay` seconds after it has done `kill_after` steps."""
        log = output / "log.jsonl"
        known = log.stat().st_mtime_ns if log.is_file() else None
        self._send(str(output))
        child = int(self._read())
        if kill_after is not None:
            until = time.monotonic() + 60
            # A run that goes on first puts a new log, up to its checkpoint, in the place of the old one.
            while time.monotonic() < until:
                if log.is_file() and log.stat().st_mtime_ns != known and log.read_text().count("\n") >= kill_after:
                    break
                time.sleep(0.001)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        self._send("")
        return int(self._read())


@pytest.fixture(scope="module")
def runner(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tiny, tmp_path_factory.mktemp("kill") / "server.py")
    yield runner
    runner.process.kill()
    runner.process.wait()


@pytest.fixture(scope="module")
def whole(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert runner.run(output) == 0
    return output


def content(output: Path) -> dict[str, object]:
    """Everything in the folder but times and settings; files of tensors as they are."""
    found: dict[str, object] = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        name = str(path.relative_to(output))
        if path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif name.endswith("state.json"):
            state = json.loads(path.read_text())
            found[name] = {**state, "steps": [{**step, "seconds": 0, "peak_memory": 0} for step in state["steps"]]}
        elif name == "log.jsonl":
            steps = map(json.loads, path.read_text().splitlines())
            found[name] = [{**step, "seconds": 0, "peak_memory": 0} for step in steps]
        else:
            found[name] = None
    return found


SLOW = [pytest.param(seed, 5, marks=pytest.mark.slow, id=f"seed-{seed}") for seed in (1, 2, 3, 4)]


@pytest.mark.parametrize(("seed", "kills"), [(0, 3), *SLOW])
def test_a_killed_run_ends_like_one_that_was_not(runner: Runner, whole: Path, tmp_path: Path, seed: int, kills: int):
    """Each run is killed at a random moment, and the next process goes on with what is in the folder."""
    draw = random.Random(seed)
    seconds = [json.loads(line)["seconds"] for line in (whole / "log.jsonl").read_text().splitlines()]
    statuses = []
    for number in range(kills):
        output = tmp_path / str(number)
        # Up to three steps' time later: as long as a step and its checkpoint take.
        delay = draw.uniform(0, 3 * statistics.median(seconds))
        statuses.append(runner.run(output, draw.randint(0, STEPS - 3), delay))
        assert runner.run(output) == 0
        assert content(output) == content(whole), number
    assert statuses.count(-signal.SIGKILL) >= kills / 2  # at least half hit before the end, at any speed
