"""The steps of a trace: train_step as a run takes it, with a look at A and B of one layer (see numbers.py).

Gradients are seen twice: before clipping (`backward`), and by the optimizer, in a hook in front of its step. What 8
bits make of the running means stands beside what AdamW would keep of the same gradient in fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minift.data.collate import Batch
from minift.model.decoder import CausalLM
from minift.optim.adamw import adamw_update_
from minift.optim.adamw8bit import BLOCK_BYTES, MIN_8BIT_SIZE, AdamW8bit
from minift.optim.paging import Counters
from minift.optim.schedule import lr_factor
from minift.optim.update8bit import BLOCK
from minift.quant import dequantize_blockwise, dynamic_map
from minift.train.config import TrainConfig
from minift.train.step import StepStats, backward, train_step

PAGES, SLOTS = 8, 3  # pages of optimizer state, and how many of them fit on the device: few, so that some must move

Report = Callable[[str], object]
Pair = tuple[nn.Parameter, nn.Parameter]


@dataclass(frozen=True)
class Mean:
    """The first block of a running mean after the first step.

    Attributes:
        codes_c: uint8 [c]; None for a tensor that is too small for 8 bits.
        absmax: scale of the block; None likewise.
        kept_c: what the optimizer remembers, decoded, fp32 [c].
        exact_c: what AdamW keeps of the same gradient in fp32 [c].
    """

    codes_c: Tensor | None
    absmax: float | None
    kept_c: Tensor
    exact_c: Tensor


@dataclass(frozen=True)
class Matrix:
    """A or B of the layer that is looked at.

    Attributes:
        before, after: the weights around the first step, fp32.
        gradient: in the first step, before clipping.
        taken: the gradients that the optimizer took, of the first two steps.
        m, v: its running means after the first step.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor
    taken: list[Tensor]
    m: Mean
    v: Mean


@dataclass(frozen=True)
class StepLook:
    """One optimizer step.

    Attributes:
        stats: what train_step returned.
        lr: of this step.
        norm: of all gradients as the optimizer took them.
        norm_a, norm_b: the same of A and B of the layer.
        moved_a, moved_b: the largest change of a weight in them.
        pages: what the page pool did; None without 8-bit state.
    """

    stats: StepStats
    lr: float
    norm: float
    norm_a: float
    norm_b: float
    moved_a: float
    moved_b: float
    pages: Counters | None


def paged_optimizer(model: CausalLM, config: TrainConfig) -> AdamW8bit:
    """That of a run, with pages so small and few slots that pages have to move."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    blocks = sum(-(-p.numel() // BLOCK) for p in parameters if p.numel() >= MIN_8BIT_SIZE)
    page_bytes = max(1, -(-blocks // PAGES)) * BLOCK_BYTES
    return AdamW8bit(
        parameters, lr=config.lr, weight_decay=config.weight_decay, order=config.decay_order, seed=config.seed,
        paged=blocks > 0, page_bytes=page_bytes, budget_bytes=SLOTS * page_bytes,
    )  # fmt: skip


def take_steps(
    model: CausalLM, batch: Batch, optimizer: AdamW8bit, pair: Pair, config: TrainConfig,
    steps: int, report: Report,
) -> tuple[Matrix, Matrix, list[StepLook]]:  # fmt: skip
    """Take the steps, and look at A and B in the first."""
    taken: list[tuple[float, list[Tensor]]] = []

    def remember(*_: object) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(grads).item()
        taken.append((norm, [_copy(p.grad) for p in pair if p.grad is not None]))

    optimizer.register_step_pre_hook(remember)
    backward(model, batch, batch.trained_tokens)
    gradients = [_copy(p.grad) for p in pair if p.grad is not None]
    optimizer.zero_grad()
    weights, looks, means = [[_copy(p) for p in pair]], [], []
    for step in range(steps):
        report(f"step {step + 1} of {steps}")
        lr = config.lr * lr_factor(config.schedule, step, steps, config.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        stats = train_step(model, [batch], optimizer, config.max_grad_norm, config.checkpointing)
        pages = replace(optimizer.pool.counters) if optimizer.pool is not None else None
        weights.append([_copy(p) for p in pair])
        norm, grads = taken[-1]
        moved = [(new - old).abs().max().item() for old, new in zip(weights[-2], weights[-1], strict=True)]
        norm_a, norm_b = (grad.norm().item() for grad in grads)
        looks.append(StepLook(stats, lr, norm, norm_a, norm_b, moved[0], moved[1], pages))
        if step == 0:
            means = [_means(optimizer, p, w, g) for p, w, g in zip(pair, weights[0], grads, strict=True)]
        if optimizer.pool is not None:
            optimizer.pool.counters.reset()  # after _means, which writes pages back
    a, b = (
        Matrix(weights[0][i], weights[1][i], gradients[i], [grads[i] for _, grads in taken[:2]], *means[i])
        for i in (0, 1)
    )
    return a, b, looks


def _means(optimizer: AdamW8bit, p: nn.Parameter, before: Tensor, grad: Tensor) -> tuple[Mean, Mean]:
    """The first block of m and v of a parameter after the first step."""
    if optimizer.pool is not None:
        optimizer.pool.flush()
    (group,) = optimizer.param_groups
    state = optimizer.state["group0"]  # pyright: ignore[reportArgumentType]
    m, v = torch.zeros_like(before), torch.zeros_like(before)
    adamw_update_(before.clone(), grad, m, v, 1, group)
    size, in_8_bits = min(BLOCK, p.numel()), p.numel() >= MIN_8BIT_SIZE
    alike = [q for q in group["params"] if (q.numel() >= MIN_8BIT_SIZE) == in_8_bits]
    number = next(index for index, q in enumerate(alike) if q is p)
    block = sum(-(-q.numel() // BLOCK) for q in alike[:number])  # each parameter begins with a block of its own
    here = slice(block * BLOCK, block * BLOCK + size)

    def mean(name: str, exact: Tensor) -> Mean:
        exact_c = exact.flatten()[:size]
        if not in_8_bits:
            return Mean(None, None, _copy(state[f"{name}_fp32"][here]), exact_c)
        codes_c, absmax_m = state[f"{name}_codes"][here].cpu(), state[f"{name}_absmax"][block : block + 1].cpu()
        kept_c = dequantize_blockwise(codes_c, absmax_m, dynamic_map(signed=name == "m"))
        return Mean(codes_c.clone(), absmax_m.item(), kept_c, exact_c)

    return mean("m", m), mean("v", v)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()
