"""The training run: encode the rows, step through them, keep records, survive being stopped.

Which rows a step sees is a pure function of the seed and the step's number, so going on from a checkpoint needs no
replay: parameters, optimizer state, random-number state and the step's number are the whole state of a run.

Ctrl-C lets the running step finish, saves a checkpoint and returns; a second Ctrl-C stops at once. Starting again with
`resume=True` goes on as if nothing had happened: on a CPU the later losses are equal bit for bit.
"""

import json
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from minift.adapters.files import save_adapter
from minift.adapters.inject import lora_layers
from minift.atomic import atomic_file
from minift.data.batching import by_length, order
from minift.data.collate import Batch, collate, share_prefix, stack
from minift.data.encode import Example
from minift.data.formats import Row
from minift.data.packing import lay_out, pack_report
from minift.data.report import DataReport, examine
from minift.data.tokenizer import Tokenizer
from minift.heap import give_memory_back
from minift.model.decoder import CausalLM
from minift.optim.adamw import AdamW
from minift.optim.adamw8bit import AdamW8bit
from minift.optim.schedule import lr_factor
from minift.train.checkpoint import fingerprint, load_checkpoint, newest_checkpoint, remove_checkpoints, save_checkpoint
from minift.train.config import TrainConfig
from minift.train.progress import progress_bar
from minift.train.step import train_step

TRIM_EVERY = 5  # steps; each return costs some page faults, so not every one


@dataclass(frozen=True)
class StepRecord:
    """One line of the log. `lr` is the rate this step used; see StepStats for the others."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    trained_tokens: int
    tokens: int
    seconds: float


@dataclass
class TrainResult:
    """What a run returns.

    Attributes:
        steps: one record a step, those before a resumed checkpoint included.
        finished: False if the run was stopped by Ctrl-C; a checkpoint was saved then.
        output_dir: where checkpoints, log and adapter are.
        adapter: folder of the trained adapter; None if the run was stopped or the model has none.
    """

    steps: list[StepRecord] = field(default_factory=list)
    finished: bool = False
    output_dir: Path = Path()
    adapter: Path | None = None


def train(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    config: TrainConfig | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> TrainResult:
    """Train whatever in the model requires a gradient.

    Args:
        model: for LoRA, after `add_lora`.
        tokenizer: the model's.
        rows: see minift/data/formats.py.
        config: settings; None is the defaults.
        say: told, before the first step, what the rows will train (`print`, for instance).

    Raises:
        ValueError: a bad setting or row, nothing to train, or a checkpoint of another run.
        FloatingPointError: the loss is not finite.
    """
    config = config or TrainConfig()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("nothing to train: no parameter requires a gradient; call add_lora first")
    data = examine_rows(tokenizer, rows, config)
    say(data.format())
    examples = data.examples
    # With dropout, rows that share a prefix would also share which of its numbers are dropped.
    dropout = any(c.dropout for layer in lora_layers(model).values() for c in layer.configs.values())
    share = config.share_prefix and not dropout
    plan = Plan(prepare(examples, tokenizer, config, say), tokenizer.pad_id or 0, config, share)
    optimizer = {"adamw8bit": AdamW8bit, "adamw": AdamW}[config.optimizer](
        parameters.values(), lr=config.lr, weight_decay=config.weight_decay
    )
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    identity = fingerprint(examples, model, config)
    result = TrainResult(output_dir=output)
    torch.manual_seed(config.seed)
    if not config.resume:
        remove_checkpoints(output)  # or a later resume would find those of the run before
    found = newest_checkpoint(output)
    if found:
        result.steps = [StepRecord(**record) for record in load_checkpoint(found, parameters, optimizer, identity)]

    def save() -> None:
        save_checkpoint(output, parameters, optimizer, identity, result.steps)

    was_training = model.training
    model.train()
    try:
        _run(model, plan, optimizer, config, result, save)
    finally:
        model.train(was_training)

    result.finished = len(result.steps) == plan.total_steps
    save()
    write_log(output / "log.json", config, model.name, result.steps)
    if result.finished and lora_layers(model):
        result.adapter = save_adapter(model, output / "adapter")
    return result


def _run(
    model: CausalLM,
    plan: "Plan",
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    result: TrainResult,
    save: Callable[[], object],
) -> None:
    """Take the steps that are missing from `result`, until the end of the plan or Ctrl-C."""
    with interruptible() as interrupted, progress_bar(plan.total_steps, len(result.steps)) as report:
        for step in range(len(result.steps), plan.total_steps):
            began = time.perf_counter()
            lr = config.lr * lr_factor(config.schedule, step, plan.total_steps, config.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batches = plan.micro_batches(step)
            stats = train_step(model, batches, optimizer, config.max_grad_norm, config.gradient_checkpointing)
            record = StepRecord(step=step + 1, lr=lr, seconds=time.perf_counter() - began, **asdict(stats))
            result.steps.append(record)
            report(record)
            if step % TRIM_EVERY == 0:
                give_memory_back()
            if interrupted.is_set():
                return
            if config.save_every and (step + 1) % config.save_every == 0:
                save()


def examine_rows(tokenizer: Tokenizer, rows: Sequence[Row], config: TrainConfig) -> DataReport:
    """Encode every row, and stop where a row would train nothing (see data/report.py)."""
    # A packed row is cut to length by `pack`; these two go on with the rest of a document in another row.
    cut = None if config.packing in ("wrapped", "bfd_split") else config.max_length
    return examine(tokenizer, rows, config.loss_on, cut, problems=config.problems)


def prepare(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    config: TrainConfig,
    say: Callable[[str], object] = lambda text: None,
) -> list[Batch]:
    """One Batch of one row for each row that a micro-batch can draw: an example, or a pack; says how full packs are."""
    if not examples:
        raise ValueError("nothing to train on: no rows")
    if config.packing == "none":
        rows = [collate([example], tokenizer.pad_id or 0) for example in examples]
    else:
        layout = lay_out([len(example) for example in examples], config.max_length, config.packing)
        packs = [layout.row(examples, number) for number in range(len(layout))]
        say(pack_report(layout, packs).format())
        rows = [row for row in packs if row.trained_tokens]  # a wrapped row may hold nothing but a long prompt
    if len(rows) < config.batch_size:
        kind = "rows" if config.packing == "none" else "packed rows"
        raise ValueError(
            f"the data holds {len(rows)} {kind}, fewer than one batch of {config.batch_size}: lower batch_size"
        )
    return rows


class Plan:
    """Which rows each optimizer step sees.

    An epoch is ceil(rows / batch_size) micro-batches, the last one possibly smaller; a step takes
    `gradient_accumulation` of them, and the last step of an epoch what is left (transformers' Trainer counts the same
    way).
    """

    def __init__(self, rows: Sequence[Batch], pad_id: int, config: TrainConfig, share: bool):
        self.rows, self.pad_id, self.config, self.share = rows, pad_id, config, share
        per_step = config.batch_size * config.gradient_accumulation
        self.steps_per_epoch = -(-len(rows) // per_step)
        self.total_steps = config.max_steps or config.epochs * self.steps_per_epoch
        self._epoch, self._groups = -1, []

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of step number `step`, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.config.gradient_accumulation
        groups = self._batches(epoch)[first : first + self.config.gradient_accumulation]
        batches = [stack([self.rows[index] for index in group], self.pad_id) for group in groups]
        return [share_prefix(batch) for batch in batches] if self.share else batches

    def _batches(self, epoch: int) -> list[list[int]]:
        """The rows of every micro-batch of an epoch; kept until another epoch is asked for."""
        if self._epoch != epoch:
            config, count = self.config, len(self.rows)
            if config.group_by_length:
                lengths = [row.input_ids_bs.shape[1] for row in self.rows]
                groups = by_length(lengths, config.batch_size, config.seed, epoch)
            else:
                drawn = order(count, config.seed, epoch) if config.shuffle else list(range(count))
                groups = [drawn[start : start + config.batch_size] for start in range(0, count, config.batch_size)]
            self._epoch, self._groups = epoch, groups
        return self._groups


def write_log(path: Path, config: TrainConfig, model_name: str, steps: Sequence[StepRecord]) -> None:
    """The run as JSON: settings, versions, and every `log_every`-th step."""
    content = {
        "model": model_name,
        "config": asdict(config),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "steps": [asdict(record) for record in steps if record.step % config.log_every == 0 or record is steps[-1]],
    }
    with atomic_file(path) as place:
        place.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event; a second one raises KeyboardInterrupt as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals only reach the main thread
        return

    def first_time(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, first_time)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
