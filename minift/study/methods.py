"""All methods on one model and one data set: what each trains, holds, costs and learns.

    method    trained     share   trained MB  gradients MB  optimizer MB   peak MB   s / step            loss
    lora       16,384   14.246%         0.07          0.07          0.13       2.8      ...     6.021 > 5.741
    ia3           384    0.388%         0.00          0.00          0.00       2.4      ...     6.021 > 5.766
    full       98,624  100.000%         0.39          0.39          0.79       3.7      ...     6.021 > 5.854

(That is a toy of two blocks after six steps.)

Each method starts from the model anew, sees the same batches in the same order, one a step, and is asked for its loss
on all of them before and after. Trained parameters, gradients and optimizer state are counted; the peak of a step is
measured (measure.py: tensors on a CPU, the allocator on a GPU) in its second step, which is not timed. What separates
the methods in memory is mostly not their parameters but what the backward pass keeps: gradients have to reach the first
block in which anything is trained.

The loss after a fixed number of steps says how fast each learns at its learning rate (`LR`: orders of magnitude, not
searched for), not how well it would do in the end.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from minift.adapters.config import LoraConfig
from minift.adapters.inject import count_parameters
from minift.adapters.method import Method
from minift.adapters.report import AdapterReport, report
from minift.adapters.verbs import METHODS, add_adapter
from minift.data.collate import Batch
from minift.model.decoder import CausalLM
from minift.optim.adamw import AdamW
from minift.study.measure import measured
from minift.train.step import loss_sum, train_step

MB = 1e6
# Few parameters need large steps: factors, biases and prompts move by 0.01 to 1, a full weight by 0.0001.
LR: dict[str, float] = {
    "lora": 1e-3, "ia3": 1e-2, "houlsby": 1e-3, "pfeiffer": 1e-3, "parallel": 1e-3, "prompt-tuning": 0.1,
    "p-tuning": 1e-2, "prefix-tuning": 0.05, "bitfit": 3e-3, "norms": 3e-3, "full": 1e-4,
}  # fmt: skip


@dataclass(frozen=True)
class MethodRow:
    """What one method trained, held, cost and learned.

    Attributes:
        method: its name.
        trained, total: parameters.
        trained_bytes, gradient_bytes, optimizer_bytes: of the trained parameters, and what comes with them.
        peak: bytes, the most that a step held at a time, the model included.
        seconds: median of the timed steps.
        loss_before, loss_after: mean over the trained tokens of all batches, in nats.
    """

    method: str
    trained: int
    total: int
    trained_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    peak: int
    seconds: float
    loss_before: float
    loss_after: float


def every_method() -> dict[str, LoraConfig | Method]:
    """LoRA and all others by name, with their default settings."""
    return {"lora": LoraConfig(), **{method.name: method() for method in METHODS}}


def compare(
    load: Callable[[], CausalLM],
    methods: Mapping[str, LoraConfig | Method],
    batches: Sequence[Batch],
    steps: int = 20,
    lr: Mapping[str, float] | None = None,
    seed: int = 0,
) -> list[MethodRow]:
    """Train with each method in turn.

    Args:
        load: gives the model, the same one each time.
        methods: settings by name.
        batches: one a step, from the beginning again when they are used up.
        steps: at least 3: the second one is measured, those after it are timed.
        lr: by name; LR has one for each method.
        seed: of the initial values.

    Raises:
        ValueError: no batches, fewer steps, or a method that does not fit the model.
    """
    if not batches or steps < 3:
        raise ValueError(f"{len(batches)} batches and {steps} steps: at least 1 and 3 are needed")
    return [_row(load(), name, config, batches, steps, (lr or LR)[name], seed) for name, config in methods.items()]


def _row(
    model: CausalLM, name: str, config: LoraConfig | Method, batches: Sequence[Batch], steps: int, lr: float, seed: int
) -> MethodRow:
    torch.manual_seed(seed)
    before = mean_loss(model, batches)
    add_adapter(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr=lr)
    model.train()
    seconds, peak, gradients = [], 0, 0
    for step in range(steps):
        micro_batches = [batches[step % len(batches)]]

        def take(micro_batches: Sequence[Batch] = micro_batches) -> object:
            return train_step(model, micro_batches, optimizer)

        if step == 1:
            found = measured(model, micro_batches, optimizer, take)[1]
            peak, gradients = found.peak, found.parts["gradients"]
            continue
        began = time.perf_counter()
        take()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        if step > 1:
            seconds.append(time.perf_counter() - began)
    state = sum(
        value.nbytes for held in optimizer.state.values() for value in held.values() if isinstance(value, torch.Tensor)
    )
    return MethodRow(
        name, *count_parameters(model), sum(p.nbytes for p in parameters), gradients, state, peak,
        statistics.median(seconds), before, mean_loss(model, batches),
    )  # fmt: skip


@torch.no_grad()
def mean_loss(model: CausalLM, batches: Sequence[Batch]) -> float:
    """Mean of -log p over the trained tokens of all batches."""
    was_training = model.training
    model.eval()
    total = sum(float(loss_sum(model, batch.to(model.device))) for batch in batches)
    model.train(was_training)
    return total / sum(batch.trained_tokens for batch in batches)


def format_methods(rows: Sequence[MethodRow]) -> str:
    """The table of the module docstring."""
    width = max(len("method"), *(len(row.method) for row in rows))
    lines = [
        f"{'method':<{width}}{'trained':>14}{'share':>10}{'trained MB':>13}{'gradients MB':>14}{'optimizer MB':>14}"
        f"{'peak MB':>10}{'s / step':>10}{'loss':>15}"
    ]
    for row in rows:
        sizes = (row.trained_bytes / MB, row.gradient_bytes / MB, row.optimizer_bytes / MB)
        lines.append(
            f"{row.method:<{width}}{row.trained:>14,}{100 * row.trained / row.total:>9.3f}%{sizes[0]:>13,.2f}"
            f"{sizes[1]:>14,.2f}{sizes[2]:>14,.2f}{row.peak / MB:>10,.1f}{row.seconds:>10.3f}"
            f"{f'{row.loss_before:.3f} > {row.loss_after:.3f}':>15}"
        )
    return "\n".join(lines)


def reports(load: Callable[[], CausalLM], methods: Mapping[str, LoraConfig | Method]) -> dict[str, AdapterReport]:
    """What each method would train of a model, and where.

    Args:
        load: gives the model, the same one each time.
        methods: settings by name.
    """
    found = {}
    for name, config in methods.items():
        model = load()
        add_adapter(model, config)
        found[name] = report(model)
    return found
