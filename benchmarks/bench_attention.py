"""The attention showdown of Godoy's book (chapter 5, table 5.1), and packed rows against padded ones.

The book runs OPT-350M's first attention (16 heads of 64, batch 2) with eager steps, SDPA and Flash Attention 2 on 256
and 1024 tokens. Here only attention itself is timed, forward and backward, causal; each of ours against the same kernel
of transformers, and flash, which transformers does not have on its own, against SDPA. The notes give memory: the most
that exists at a time beyond the inputs, which for eager grows with the square of the length and for the others with the
length.

Packed rows: documents with lengths like those of instruction data (median 80 tokens, a long tail, at most 512). Padded
to the longest of their batch of 16 they go through SDPA with a mask; packed behind each other, through flash, which
looks at nothing outside of a document. Both compute the same useful tokens, so the ratio is that of useful tokens a
second.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.opt.modeling_opt import eager_attention_forward

from benchmarks.harness import Row, Setup, check_close
from minift.model.attention import Visible, eager, flash, sdpa
from minift.study.live import LiveBytes

BATCH, HEADS, WIDTH = 2, 16, 64  # of OPT-350M
QKV = tuple[Tensor, Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# Outputs and gradients in 16 bits: each of the two rounds probabilities, scores' gradients and results, 2^-9 each.
CLOSE = 8 * 2**-9


def rows(setup: Setup) -> Iterator[Row]:
    on_cuda = setup.device.type == "cuda"
    causal = SimpleNamespace(is_causal=True, training=False, num_key_value_groups=1)
    their_sdpa = partial(_theirs, sdpa_attention_forward, causal)
    for length in (256, 1024, *((4096, 16384) if on_cuda else ())):
        length = setup.size(length)
        if length <= 4096:  # the scores of 16384 tokens take 17 GB
            their_eager = partial(_their_eager, causal, _additive_mask(length, setup))
            yield showdown_row(setup, "eager", eager, their_eager, length)
        yield showdown_row(setup, "sdpa", sdpa, their_sdpa, length)
        yield showdown_row(setup, "flash against sdpa", flash, their_sdpa, length)
    if on_cuda:
        yield forward_row(setup, setup.size(4096), their_sdpa)
    yield packed_row(setup)


def _theirs(function: Callable[..., Any], module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    return function(module, q, k, v, mask, scaling=q.shape[-1] ** -0.5)[0].transpose(1, 2)


def _their_eager(module: Any, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _theirs(eager_attention_forward, module, q, k, v, mask)


def _dtype(setup: Setup) -> torch.dtype:
    """The book's fp16 on a GPU; on a CPU, which has no fast fp16, bf16."""
    return torch.float16 if setup.device.type == "cuda" else torch.bfloat16


def _additive_mask(length: int, setup: Setup) -> Tensor:
    dtype = _dtype(setup)
    seen = torch.ones(length, length, dtype=torch.bool, device=setup.device).tril()
    return torch.zeros(1, 1, length, length, dtype=dtype, device=setup.device).masked_fill(
        ~seen, torch.finfo(dtype).min
    )


def _qkv(setup: Setup, batch: int, length: int) -> QKV:
    """As the projections give them: [b, s, h, e] seen as [b, h, s, e]."""
    shape = (batch, length, HEADS, WIDTH)
    q, k, v = (
        torch.randn(shape, dtype=_dtype(setup), device=setup.device).transpose(1, 2).requires_grad_() for _ in range(3)
    )
    return q, k, v


def forward_backward(attend: Attend, qkv: QKV) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) for the gradient `out`: any one does."""
    out = attend(*qkv)
    return out.detach(), *torch.autograd.grad(out, qkv, out.detach())


def showdown_row(setup: Setup, name: str, ours: Attend, theirs: Attend, length: int) -> Row:
    first = _qkv(setup, BATCH, length)
    return Row(
        name=f"{name}, {BATCH}x{length}, forward + backward",
        inputs=setup.rotate(first, 3 * first[0].nbytes),
        ours=partial(forward_backward, ours),
        theirs=partial(forward_backward, theirs),
        check=check,
        facts=lambda *_: {"note": f"memory {_peak(ours, first)} against {_peak(theirs, first)}"},
    )


def forward_row(setup: Setup, length: int, theirs: Attend) -> Row:
    """The goal for a kernel in Triton beside one in CUTLASS."""
    first = _qkv(setup, BATCH, length)
    return Row(
        name=f"flash against sdpa, {BATCH}x{length}, forward",
        inputs=setup.rotate(tuple(x.detach() for x in first), 3 * first[0].nbytes),
        ours=lambda qkv: (flash(*qkv),),
        theirs=lambda qkv: (theirs(*qkv),),
        check=check,
        goal=setup.goal(cuda=0.6),
    )


def packed_row(setup: Setup) -> Row:
    """Documents one behind the other in rows of 2048 through flash, against padded batches of 16 through SDPA."""
    generator = torch.Generator().manual_seed(0)
    count = 256 if setup.device.type == "cuda" else 64
    lengths = torch.empty(setup.size(count)).log_normal_(math.log(80), 0.8, generator=generator)
    lengths = lengths.clamp(8, 512).long().tolist()
    batches = [_Padded(setup, lengths[i : i + 16]) for i in range(0, len(lengths), 16)]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).unsqueeze(0).to(setup.device)
    visible = Visible.of_documents(documents, documents.shape[1])
    packed = tuple(torch.cat([b.flat(b.qkv[i]) for b in batches], dim=2).requires_grad_() for i in range(3))

    def ours(qkv: Any) -> tuple[Tensor, ...]:
        return forward_backward(partial(flash, visible=visible), qkv)

    def theirs(_: Any) -> tuple[Tensor, ...]:
        results = [forward_backward(batch.attend, batch.qkv) for batch in batches]
        return tuple(
            torch.cat([batch.flat(result[i]) for batch, result in zip(batches, results, strict=True)], dim=2)
            for i in range(4)
        )

    slots = sum(len(batch.lengths) * max(batch.lengths) for batch in batches)
    return Row(
        name=f"packed flash against padded sdpa, {len(lengths)} documents of {sum(lengths)} tokens",
        inputs=[packed, packed],
        ours=ours,
        theirs=theirs,
        check=check,
        goal=setup.goal(cuda=3.0),
        facts=lambda *_: {"note": f"of the padded tokens {sum(lengths) / slots:.0%} are useful"},
    )


class _Padded:
    """A batch of rows of unequal length, padded right, for SDPA with a mask. Padding is zero."""

    def __init__(self, setup: Setup, lengths: list[int]):
        self.lengths = lengths
        slots = torch.arange(max(lengths), device=setup.device)
        self.own = slots < torch.tensor(lengths, device=setup.device).unsqueeze(1)
        mask = self.own[:, None, None, :] & (slots[:, None] >= slots)
        self.mask = mask | ~self.own[:, None, :, None] & (slots[:, None] == slots)  # padding sees itself
        q, k, v = (x.detach() * self.own[:, None, :, None] for x in _qkv(setup, len(lengths), max(lengths)))
        self.qkv = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return out * self.own[:, None, :, None]

    def flat(self, x_bhse: Tensor) -> Tensor:
        """Its documents one behind the other, [1, h, tokens, e]."""
        return x_bhse.detach().transpose(1, 2)[self.own].unsqueeze(0).transpose(1, 2)


def check(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        check_close(mine, other, CLOSE)


def _peak(attend: Attend, qkv: QKV) -> str:
    """The most memory beyond the inputs that forward and backward need at a time."""
    if qkv[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_backward(attend, qkv)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            forward_backward(attend, qkv)
        peak = live.peak
    return f"{peak / 1e6:.0f} MB"
