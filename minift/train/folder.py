"""The folder of a run: what it was, so that it can be done again, and what happened, line by line.

    output_dir/
        config.json      settings, versions, the model, a fingerprint of the data, and the command line's options
        log.jsonl        a line of JSON a step, written when the step is done: a run that is killed leaves them all
        log.json         settings, versions and every `log_every`-th step, at the end or when stopped
        memory.json      of one step, predicted and measured, where somebody looked on (study/watch.py)
        tensorboard/     the same numbers as events, where tensorboard is installed
        checkpoints/     see checkpoint.py
        adapter/         the trained adapter

A run that is resumed writes log.jsonl anew up to its checkpoint and goes on from there: the steps after it are done
again, and would otherwise stand there twice.
"""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from minift.atomic import atomic_file
from minift.train.config import TrainConfig
from minift.train.records import StepRecord

CONFIG, LOG_LINES, LOG = "config.json", "log.jsonl", "log.json"


def versions() -> dict[str, str]:
    """Of what decides the numbers of a run."""
    try:
        ours = version("minift")
    except PackageNotFoundError:  # a checkout on the path
        ours = "not installed"
    return {"python": platform.python_version(), "torch": torch.__version__, "minift": ours}


class RunFolder:
    """Writes config.json and the lines of the log.

    Args:
        output: the folder; made if it does not exist.
        steps: records of the steps that were done before.
        content: what config.json holds besides settings and versions.

    Raises:
        OSError: nothing can be written there.
    """

    def __init__(self, output: Path, config: TrainConfig, steps: Sequence[StepRecord], content: Mapping[str, Any]):
        self.output, self._events = output, None
        everything = {**content, "config": asdict(config), "versions": versions()}
        try:
            output.mkdir(parents=True, exist_ok=True)
            with atomic_file(output / CONFIG) as place:
                place.write_text(json.dumps(everything, indent=1, default=str) + "\n", encoding="utf-8")
            with atomic_file(output / LOG_LINES) as place:
                place.write_text("".join(map(_line, steps)), encoding="utf-8")
            self._lines = (output / LOG_LINES).open("a", encoding="utf-8")
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write to the folder {output}: {error.strerror}; choose another output_dir"
            ) from error
        if config.tensorboard and find_spec("tensorboard"):
            from torch.utils.tensorboard.writer import SummaryWriter  # a second to import

            # Events of steps that are done again are hidden behind the new ones.
            self._events = SummaryWriter(str(output / "tensorboard"), purge_step=len(steps) + 1)

    def add(self, record: StepRecord) -> None:
        """Append the record of a step, and hand it to the system, so that it outlives this process."""
        try:
            self._lines.write(_line(record))
            self._lines.flush()
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write to {self.output / LOG_LINES}: {error.strerror}; make room, then resume"
            ) from error
        if self._events is not None:
            for name, value in _numbers(record).items():
                self._events.add_scalar(name.replace("eval_", "eval/"), value, record.step)

    def close(self) -> None:
        """Close the files."""
        self._lines.close()
        if self._events is not None:
            self._events.close()


@contextmanager
def run_folder(
    output: Path, config: TrainConfig, steps: Sequence[StepRecord], content: Mapping[str, Any]
) -> Iterator[RunFolder]:
    """A RunFolder that is closed at the end, whatever happens."""
    folder = RunFolder(output, config, steps, content)
    try:
        yield folder
    finally:
        folder.close()


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json of a run holds.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the file is damaged.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it holds no {CONFIG}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        TrainConfig(**content["config"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error!r})") from None
    return content


def read_log(folder: Path) -> list[StepRecord]:
    """The records in log.jsonl, also of a run that was killed: a last line that was cut off is left out."""
    lines = (Path(folder) / LOG_LINES).read_text(encoding="utf-8").splitlines(keepends=True)
    return [StepRecord(**json.loads(line)) for line in lines if line.endswith("\n")]


def write_log(path: Path, config: TrainConfig, model_name: str, steps: Sequence[StepRecord]) -> None:
    """The run as one JSON file: settings, versions, and every `log_every`-th step and those with an evaluation."""
    shown = [
        record
        for record in steps
        if record.step % config.log_every == 0 or record is steps[-1] or record.eval_loss is not None
    ]
    content = {
        "model": model_name,
        "config": asdict(config),
        "versions": versions(),
        "steps": [_numbers(record) for record in shown],
    }
    with atomic_file(path) as place:
        place.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _numbers(record: StepRecord) -> dict[str, float]:
    return {name: value for name, value in asdict(record).items() if value is not None}


def _line(record: StepRecord) -> str:
    return json.dumps(_numbers(record)) + "\n"
