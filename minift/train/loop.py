"""The training run: encode the rows, step through them, keep records, survive being stopped.

Which rows a step sees is a pure function of the seed and the step's number (plan.py), so going on from a checkpoint
needs no replay: parameters, optimizer state, random-number state and the records of the steps are the whole state.

Ctrl-C lets the running step finish, saves a checkpoint and returns; a second Ctrl-C stops at once. Starting again with
`resume=True` goes on as if nothing had happened: on a CPU the later losses are equal bit for bit. The same holds for a
run that was killed, from its newest checkpoint on.

With evaluation rows the model is looked at every `eval_every` steps and at the end (evaluate.py); `patience` stops a
run that no longer improves, and `best` ends it with the weights that were best.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.adapters.method import method_of
from minift.adapters.switched import switched
from minift.adapters.verbs import save_adapter
from minift.data.collate import Batch
from minift.data.formats import Row
from minift.data.tokenizer import Tokenizer
from minift.heap import give_memory_back
from minift.model.decoder import CausalLM
from minift.numerics.rounding import TARGETS
from minift.optim.adamw import AdamW
from minift.optim.adamw8bit import AdamW8bit
from minift.optim.schedule import lr_factor
from minift.train.checkpoint import (
    checkpoint_of,
    fingerprint,
    load_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    remove_checkpoints,
    remove_rests,
    restore_weights,
    save_checkpoint,
)
from minift.train.config import TrainConfig
from minift.train.evaluate import evaluate
from minift.train.faults import is_out_of_memory, out_of_memory
from minift.train.folder import LOG, RunFolder, run_folder, write_log
from minift.train.plan import Plan, check_ids, check_trainable, encoded, evaluation_batches, examine_rows, prepare
from minift.train.policy import format_precision, precision_table
from minift.train.progress import progress_bar
from minift.train.records import StepRecord, best_step, has_stalled
from minift.train.step import train_step
from minift.train.watch import Watch, begin_peak, peak_since

LARGEST_PAGE, MB = 1 << 21, 10**6  # bytes of a page of optimizer state, and of the unit of page_budget
TRIM_EVERY = 5  # steps; each return costs some page faults, so not every one


@dataclass
class TrainResult:
    """What a run returns.

    Attributes:
        steps: one record a step, those before a resumed checkpoint included.
        finished: False if the run was stopped by Ctrl-C; a checkpoint was saved then.
        output_dir: where checkpoints, log and adapter are.
        adapter: folder of the trained adapter; None if the run was stopped or the model has none.
        stopped_early: whether it finished because evaluations had stopped improving.
        weights_of: number of the step whose weights the model has now; less than the last with `best`.
    """

    steps: list[StepRecord] = field(default_factory=list)
    finished: bool = False
    output_dir: Path = Path()
    adapter: Path | None = None
    stopped_early: bool = False
    weights_of: int = 0


def train(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    config: TrainConfig | None = None,
    say: Callable[[str], object] = lambda text: None,
    eval_rows: Sequence[Row] | None = None,
    options: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> TrainResult:
    """Train whatever in the model requires a gradient.

    Args:
        model: for LoRA, after `add_lora`.
        tokenizer: the model's.
        rows: see minift/data/formats.py.
        config: settings; None is the defaults.
        say: told, before the first step, what the rows will train and in which precision (`print`, for instance).
        eval_rows: rows to evaluate on, never trained.
        options: how to make the model and the rows again; config.json keeps them.
        watch: looks on while steps are taken (watch.py).

    Raises:
        ValueError: a bad setting or row, nothing to train, or a checkpoint of another run.
        FloatingPointError: a loss or gradient is not finite; names the step and where that began.
        MemoryError: out of memory; names three things to change.
        OSError: the folder cannot be written to.
    """
    config = config or TrainConfig()
    check_trainable(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters, config)
    if eval_rows is None and config.eval_every:
        raise ValueError("eval_every needs rows to evaluate on: give eval_rows, or leave it at 0")
    examples = encoded(tokenizer, rows, config, say)
    evaluated = examine_rows(tokenizer, eval_rows, config).examples if eval_rows is not None else []
    # With dropout, rows that share a prefix would also share which of its numbers are dropped.
    dropout = any(c.dropout for place in switched(model).values() for c in place.configs.values())
    share = config.share_prefix and not dropout
    plan = Plan(prepare(examples, tokenizer, config, say), tokenizer.pad_id or 0, config, share)
    plan.check()
    to_evaluate = evaluation_batches(evaluated, tokenizer, config) if eval_rows is not None else []
    check_ids([*plan.rows, *to_evaluate], tokenizer, model.config.vocab_size)
    say(format_precision(precision_table(model, optimizer)))
    output = Path(config.output_dir)
    identity = fingerprint(examples, model, config, evaluated)
    result = TrainResult(output_dir=output)
    torch.manual_seed(config.seed)
    remove_rests(output)
    if not config.resume:
        remove_checkpoints(output)  # or a later resume would find those of the run before
    found = newest_checkpoint(output)
    if found:
        result.steps = load_checkpoint(found, parameters, optimizer, identity)

    def save() -> None:
        best = best_step(result.steps) if config.best else None
        save_checkpoint(output, parameters, optimizer, identity, result.steps, config.keep_last, best)

    content = {"model": model.name, "options": options, "data": {"rows": len(rows), "identity": identity}}
    with run_folder(output, config, result.steps, content) as folder:
        was_training = model.training
        model.train()
        try:
            _run(Run(model, plan, to_evaluate, optimizer, config, result, folder, save, watch or Watch()))
        finally:
            model.train(was_training)
    if isinstance(optimizer, AdamW8bit) and optimizer.pool is not None:
        say(f"Pages of optimizer state\n{optimizer.pool.counters.format()}")

    result.stopped_early = len(result.steps) < plan.total_steps and has_stalled(result.steps, config.patience)
    result.finished = result.stopped_early or len(result.steps) == plan.total_steps
    save()
    write_log(output / LOG, config, model.name, result.steps)
    result.weights_of = len(result.steps)
    if result.finished and config.best:
        result.weights_of = best_step(result.steps) or result.weights_of
        restore_weights(read_checkpoint(checkpoint_of(output, result.weights_of)), parameters)
    if result.finished and (switched(model) or method_of(model)):
        result.adapter = save_adapter(model, output / "adapter")
    return result


def make_optimizer(parameters: Mapping[str, Tensor], config: TrainConfig) -> AdamW | AdamW8bit:
    """The optimizer of a run.

    Args:
        parameters: the trained ones, by name.

    Raises:
        ValueError: none, or none that could be rounded by chance although that was asked for.
    """
    if not parameters:
        raise ValueError("nothing to train: no parameter requires a gradient; call add_lora first")
    if config.optimizer == "adamw":
        return AdamW(parameters.values(), lr=config.lr, weight_decay=config.weight_decay)
    if config.stochastic_rounding and not any(p.dtype in TARGETS for p in parameters.values()):
        raise ValueError(
            f"stochastic_rounding has nothing to round: all {len(parameters)} trained parameters are stored in "
            "float32, as adapters always are; leave it off, or train weights that are stored in bfloat16"
        )
    budget = config.page_budget * MB
    return AdamW8bit(
        parameters.values(), lr=config.lr, weight_decay=config.weight_decay, order=config.decay_order,
        stochastic_rounding=config.stochastic_rounding, seed=config.seed,
        paged=config.paged, page_bytes=min(LARGEST_PAGE, budget), budget_bytes=budget,
    )  # fmt: skip


@dataclass
class Run:
    """What the steps of a run work with."""

    model: CausalLM
    plan: Plan
    to_evaluate: Sequence[Batch]
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    result: TrainResult
    folder: RunFolder
    save: Callable[[], object]
    watch: Watch


def _run(run: Run) -> None:
    """Take the steps that are missing from the result, until the end of the plan, Ctrl-C or an early stop."""
    config, steps, total = run.config, run.result.steps, run.plan.total_steps
    with interruptible() as interrupted, progress_bar(total, len(steps)) as report:
        for step in range(len(steps), total):
            if has_stalled(steps, config.patience):
                return
            record = _step(run, step)
            steps.append(record)
            run.folder.add(record)
            report(record)
            if step % TRIM_EVERY == 0:
                give_memory_back()
            if interrupted.is_set():
                return
            is_best = config.best and best_step(steps) == step + 1
            if is_best or (config.save_every and (step + 1) % config.save_every == 0):
                run.save()


def _step(run: Run, step: int) -> StepRecord:
    """Step number `step`, counted from 0, and a look at the evaluation rows if it is time for one."""
    began = time.perf_counter()
    config, total = run.config, run.plan.total_steps
    lr = config.lr * lr_factor(config.schedule, step, total, config.warmup_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    batches = run.plan.micro_batches(step)
    try:
        begin_peak(run.model.device)
        take = partial(train_step, run.model, batches, run.optimizer, config.max_grad_norm, config.checkpointing)
        stats = run.watch.step(run.model, batches, run.optimizer, take)
        seconds, peak = time.perf_counter() - began, peak_since(run.model.device)
        record = StepRecord(step=step + 1, lr=lr, seconds=seconds, peak_memory=peak, **asdict(stats))
        if not run.to_evaluate or not is_time(step + 1, total, config.eval_every):
            return record
        found = evaluate(run.model, run.to_evaluate)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step + 1}: {error}") from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(step + 1, config, error, run.watch.shortage(run.model, batches)) from error
    return replace(record, eval_loss=found.loss, eval_perplexity=found.perplexity, eval_accuracy=found.accuracy)


def is_time(step: int, total: int, every: int) -> bool:
    """Whether something that happens after each `every` steps, and after the last, happens after this one."""
    return step == total or (every > 0 and step % every == 0)


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
