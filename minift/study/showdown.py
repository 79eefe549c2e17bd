"""One attention layer of OPT-350M, computed in several ways: memory and time beside table 5.1 of the book.

    steps    every step written out, and all that autograd keeps of it: what transformers calls eager
    eager    written out, keeping only what its gradient needs (model/attention.py)
    sdpa     PyTorch's fused attention
    flash    tiles (model/flash.py); beside it stands the book's Flash Attention 2

The layer is four linear layers of width 1024 and 16 heads between them; two rows, 16-bit numbers. As in the book a
forward pass is measured that gets ready for a backward pass. Its program holds three graphs at the worst moment: that
of the warm-up, whose result stays in a variable of the notebook, that of the pass before, which is let go only when the
next result is there, and the one in the making.

Memory: weights, input and the most that exists at a time besides; of a CPU as tensors (live.py), of a GPU from the
allocator, which sees the workspace of matrix products, too. Time: the ways in turn, again and again, and the median of
each, so that a slow moment of the machine hits all alike.

Source: D. Voigt Godoy, A Hands-On Guide to Fine-Tuning LLMs, chapter 5, table 5.1 (RTX 4090, float16, 1000 times).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minift.model.attention import ATTENTION, Attend, Visible, attention_steps
from minift.model.layers import QKV, SelfAttention
from minift.study.book_tables import MB, OPT_350M
from minift.study.live import LiveBytes

TOKENS = (256, 1024)
# What PyTorch has the allocator reserve for matrix products on an RTX 4090: cuBLAS, cuBLASLt.
WORKSPACE = 8_519_680 + 1_048_576


def steps(
    q_bhse: Tensor,
    k_bgte: Tensor,
    v_bgte: Tensor,
    visible: Visible | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Written-out attention of which autograd keeps what it likes."""
    return attention_steps(q_bhse, k_bgte, v_bgte, visible, scale, softcap).out_bhse


ATTENTIONS: dict[str, Attend] = {"steps": steps, **ATTENTION}


@dataclass(frozen=True)
class Cost:
    """What a way to compute attention takes.

    Attributes:
        bytes: the most held at a time.
        seconds: of one forward pass; 0: not measured.
    """

    attention: str
    tokens: int
    bytes: int
    seconds: float = 0.0


# Table 5.1. Its eager is that of transformers, its flash is Flash Attention 2.
BOOK = (
    Cost("steps", 256, 75_630_000, 0.4038e-3), Cost("steps", 1024, 746_720_000, 0.7645e-3),
    Cost("sdpa", 256, 37_990_000, 0.3502e-3), Cost("sdpa", 1024, 98_050_000, 0.3519e-3),
    Cost("flash", 256, 34_840_000, 0.3344e-3), Cost("flash", 1024, 85_470_000, 0.3351e-3),
)  # fmt: skip


def showdown(
    tokens: Sequence[int] = TOKENS, batch: int = 2, device: str = "cpu", dtype: torch.dtype | None = None,
    repeats: int = 3, counted: Sequence[Cost] = (),
) -> list[Cost]:  # fmt: skip
    """The table of this machine, memory and time.

    Args:
        dtype: of weights and numbers; None: float16 on a GPU as in the book, bfloat16 on a CPU, where float16 is slow.
        repeats: turns of the clock; on a GPU 100 passes each.
        counted: costs whose memory is known already, which is then not counted again.

    Raises:
        ValueError: nothing to repeat.
    """
    if repeats < 1:
        raise ValueError(f"{repeats} repeats: at least 1 is needed")
    found, known = [], {(cost.attention, cost.tokens): cost.bytes for cost in counted}
    for length in tokens:
        taken = layer_seconds(length, batch, device, dtype, repeats)
        for name in ATTENTIONS:
            held = known.get((name, length)) or layer_bytes(name, length, batch, device, dtype)
            found.append(Cost(name, length, held, taken[name]))
    return found


def layer_bytes(
    attention: str, tokens: int, batch: int = 2, device: str = "cpu", dtype: torch.dtype | None = None, graphs: int = 3
) -> int:
    """The most bytes held by forward passes of which all results are kept: weights, input, and what the passes hold.

    Args:
        graphs: passes; the results of all but the last are there while the last one runs.
    """
    on_gpu = device != "cpu"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    layer, x_bsd, attend = _layer(attention, tokens, batch, device, dtype)
    if on_gpu:
        layer(x_bsd, None, attend, None)  # the workspace of products, which stays
        torch.cuda.reset_peak_memory_stats(device)
        results = [layer(x_bsd, None, attend, None) for _ in range(graphs)]
        del results
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        results = [layer(x_bsd, None, attend, None) for _ in range(graphs)]
    del results
    return sum(t.numel() * t.element_size() for t in (*layer.parameters(), x_bsd)) + live.peak


def layer_seconds(
    tokens: int, batch: int = 2, device: str = "cpu", dtype: torch.dtype | None = None, repeats: int = 3
) -> dict[str, float]:
    """Median seconds of a forward pass by way, taken in turns after one that warms up."""
    runs = {name: _layer(name, tokens, batch, device, dtype) for name in ATTENTIONS}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    passes = 1 if device == "cpu" else 100
    for turn in range(repeats + 1):
        for name, (layer, x_bsd, attend) in runs.items():
            seconds = _clock(partial(layer, x_bsd, None, attend, None), passes, device)
            taken[name] += [seconds] if turn else []
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def layer_flops(tokens: int, batch: int = 2) -> int:
    """Multiplications and additions of a forward pass: four linear layers, scores and their sum; without the half that
    a causal kernel may skip."""
    d = OPT_350M.hidden_size
    return 2 * batch * tokens * 4 * d * d + 2 * 2 * batch * tokens * tokens * d


def _clock(run: partial, passes: int, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(passes):
            run()
        return (time.perf_counter() - start) / passes
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for _ in range(passes):
        run()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1e3 / passes


def _layer(
    attention: str, tokens: int, batch: int, device: str, dtype: torch.dtype | None
) -> tuple[SelfAttention, Tensor, QKV]:
    if attention not in ATTENTIONS:
        raise ValueError(f"unknown attention {attention!r}: choose one of {', '.join(ATTENTIONS)}")
    dtype = dtype or (torch.bfloat16 if device == "cpu" else torch.float16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = SelfAttention(OPT_350M, 0).to(device, dtype)
        x_bsd = torch.randn(batch, tokens, OPT_350M.hidden_size).to(device, dtype)
    attend: Callable = ATTENTIONS[attention]
    return layer, x_bsd, partial(attend, visible=None, scale=None, softcap=0.0)


def format_costs(costs: Sequence[Cost]) -> str:
    """The table: megabytes and milliseconds for each length, and how many times more the longest takes."""
    lengths = sorted({cost.tokens for cost in costs})
    found = {(cost.attention, cost.tokens): cost for cost in costs}
    heads = [f"{unit} {length:,}" for unit in ("MB", "ms") for length in [*lengths, 0]]
    heads = ["ratio" if head.endswith(" 0") else head for head in heads]
    timed = all(cost.seconds for cost in costs)
    columns = len(heads) if timed else len(heads) // 2
    lines = [f"{'':<8}" + "".join(f"{head:>12}" for head in heads[:columns])]
    for name in dict.fromkeys(cost.attention for cost in costs):
        row = [found[name, length] for length in lengths]
        cells = [f"{cost.bytes / MB:,.2f}" for cost in row] + [f"{row[-1].bytes / row[0].bytes:.2f}"]
        if timed:
            cells += [f"{1e3 * cost.seconds:,.4g}" for cost in row] + [f"{row[-1].seconds / row[0].seconds:.2f}"]
        lines.append(f"{name:<8}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)
