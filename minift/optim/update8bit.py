"""One step of 8-bit AdamW: the operator behind adamw8bit.py, whose docstring has the formulas.

Parameters and gradients of many tensors are gathered into flat buffers of a fixed size, a window at a time, updated
there, and put back: the memory that a step needs does not depend on what is trained, and many small tensors cost few
calls. The body here is the reference and the CPU path (compiled.py does the same in one loop); CUDA tensors go to the
Triton kernel, which finds them by their addresses.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minift.numerics.rounding import TARGETS, floor_quanta, random_words
from minift.optim.compiled import update_
from minift.quant import compiled
from minift.quant.codebooks import dynamic_map, nearest_dynamic

BLOCK = 256
# Elements updated at a time: eight fp32 temporaries of a chunk stay in the level-2 cache.
CHUNK = 1 << 15
# Elements gathered into a flat buffer at a time, a multiple of CHUNK: two buffers of 512 KB, whatever is trained.
WINDOW = 1 << 17

Pieces = list[tuple[int, int, int, int]]


@cache
def pieces_of(sizes: tuple[int, ...], width: int) -> list[Pieces]:
    """Cut the flat buffer into ranges and say what lies in each: (tensor, its first element, its last + 1, place in
    the range).

    Args:
        sizes: elements of each tensor; in the buffer it is padded to whole blocks.
        width: of a range, a multiple of BLOCK; the last one may be shorter.
    """
    ranges, place = [], 0
    for index, n in enumerate(sizes):
        begin = 0
        while begin < n:
            number, within = divmod(place + begin, width)
            ranges += [[] for _ in range(number + 1 - len(ranges))]
            end = min(n, begin + width - within)
            ranges[number].append((index, begin, end, within))
            begin = end
        place += -(-n // BLOCK) * BLOCK
    return ranges


class Factors(NamedTuple):
    """What a step multiplies with: decay of the weight before and after the update, and the numbers of the formulas."""

    before: float
    after: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    rate: float
    eps: float


class Recipe(NamedTuple):
    """The arguments of the operator that tensors have in common."""

    factors: Factors
    stochastic: bool
    seed: int


def factors(group: dict[str, Any], step: int) -> Factors:
    """From the settings of a group, computed in float64; step counts from 1."""
    beta1, beta2 = group["betas"]
    correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
    decay = 1 - group["lr"] * group["weight_decay"]
    before, after = (decay, 1.0) if group["order"] == "torch" else (1.0, decay)
    rate, eps = group["lr"] * correction2 / correction1, group["eps"] * correction2
    return Factors(before, after, beta1, 1 - beta1, beta2, 1 - beta2, rate, eps)


# Defined with torch.library's plain functions: `custom_op` would import the compiler (1.5 s, 150 MB) at the first call.
torch.library.define(
    "minift::adamw8bit_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) m, Tensor(c!) v, Tensor(d!)? m_absmax, Tensor(e!)? v_absmax, "
    "float[] factors, bool stochastic, int seed, int first) -> ()",
)


@torch.library.impl("minift::adamw8bit_", "default")
def _adamw8bit_(
    params: list[Tensor], grads: list[Tensor], m: Tensor, v: Tensor, m_absmax: Tensor | None, v_absmax: Tensor | None,
    factors: list[float], stochastic: bool, seed: int, first: int,
) -> None:  # fmt: skip
    """One step in place. params, grads: contiguous; m, v: flat, codes uint8 with scales, or fp32 without.

    first: place of the first element in the sequence of random numbers, a multiple of 4.
    """
    buffers = torch.empty(2, min(WINDOW, len(m)), device=m.device)
    for number, pieces in enumerate(pieces_of(tuple(p.numel() for p in params), WINDOW)):
        start = number * WINDOW
        p_n, g_n = buffers[:, : len(m) - start].zero_()  # the padding counts
        held = [_part(params[i], begin, end) for i, begin, end, _ in pieces]
        torch._foreach_copy_(_views(p_n, pieces), held)
        torch._foreach_copy_(_views(g_n, pieces), [_part(grads[i], begin, end) for i, begin, end, _ in pieces])
        here = slice(start, start + len(p_n))
        if m_absmax is None or v_absmax is None:
            _update_(p_n, g_n, m[here], v[here], Factors(*factors))
        else:
            means = ((m[here], m_absmax[_blocks(here)]), (v[here], v_absmax[_blocks(here)]))
            update = _update_compiled_ if compiled.applies(m, len(m), BLOCK) else _update_coded_
            update(p_n, g_n, *means, Factors(*factors))
        for dtype in {p.dtype for p in held}:
            rounded = _rounded(p_n, dtype, first + start, seed) if stochastic and dtype in TARGETS else p_n
            views = [x for x, p in zip(_views(rounded, pieces), held, strict=True) if p.dtype == dtype]
            torch._foreach_copy_([p for p in held if p.dtype == dtype], views)


@torch.library.impl("minift::adamw8bit_", "cuda")
def _adamw8bit_cuda_(params, grads, m, v, m_absmax, v_absmax, factors, stochastic, seed, first) -> None:
    from minift_kernels.adamw8bit import Tables, adamw8bit_

    signed, unsigned = (
        Tables(_map(kind, m.device), nearest_dynamic(kind, m.device).boundaries) for kind in (True, False)
    )
    adamw8bit_(params, grads, (m, m_absmax, signed), (v, v_absmax, unsigned), factors, stochastic, seed, first)


@torch.library.register_fake("minift::adamw8bit_")
def _adamw8bit_fake_(params, grads, m, v, m_absmax, v_absmax, factors, stochastic, seed, first) -> None:
    return None


def _update_(p_n: Tensor, g_n: Tensor, m_n: Tensor, v_n: Tensor, f: Factors) -> None:
    """The formulas of the module's docstring, in place; every operation rounds once. lerp_ and addcmul_ would fuse."""
    m_n.mul_(f.beta1).add_(g_n * f.rest1)
    v_n.mul_(f.beta2).add_((g_n * f.rest2).mul_(g_n))
    # numpy's is the processor's instruction; torch's on x86 (MKL's) is now and then not the nearest number.
    root_n = torch.from_numpy(np.sqrt(v_n.numpy()))
    update_n = (m_n * f.rate).div_(root_n.add_(f.eps))
    p_n.mul_(f.before).sub_(update_n).mul_(f.after)


Coded = tuple[Tensor, Tensor]  # codes and scales of a running mean


def _update_coded_(p_n: Tensor, g_n: Tensor, m: Coded, v: Coded, f: Factors) -> None:
    """`_update_` for means in 8 bits, a chunk at a time."""
    states = ((*m, True), (*v, False))
    for offset in range(0, len(p_n), CHUNK):
        chunk = slice(offset, min(offset + CHUNK, len(p_n)))
        means = [
            torch.ops.minift.dequantize_blockwise(
                codes[chunk], absmax[_blocks(chunk)], _map(signed, codes.device), BLOCK, torch.float32
            )
            for codes, absmax, signed in states
        ]
        _update_(p_n[chunk], g_n[chunk], means[0], means[1], f)
        for mean, (codes, absmax, signed) in zip(means, states, strict=True):
            codes[chunk], absmax[_blocks(chunk)] = torch.ops.minift.quantize_blockwise(mean, signed, BLOCK)


def _update_compiled_(p_n: Tensor, g_n: Tensor, m: Coded, v: Coded, f: Factors) -> None:
    maps = _map(True, p_n.device), _map(False, p_n.device)
    nearest = nearest_dynamic(True, p_n.device), nearest_dynamic(False, p_n.device)
    update_(p_n, g_n, m, v, maps, nearest, torch.tensor(f))


def _part(tensor: Tensor, begin: int, end: int) -> Tensor:
    flat_n = tensor.view(-1)
    return flat_n if end - begin == flat_n.numel() else flat_n[begin:end]


def _views(flat_n: Tensor, pieces: Pieces) -> list[Tensor]:
    """What belongs to each piece, without the padding behind it."""
    ends = [place for _, _, _, place in pieces[1:]] + [len(flat_n)]
    slots = flat_n.split([stop - place for (_, _, _, place), stop in zip(pieces, ends, strict=True)])
    return [slot[: end - begin] if len(slot) > end - begin else slot
            for slot, (_, begin, end, _) in zip(slots, pieces, strict=True)]  # fmt: skip


@cache
def _map(signed: bool, device: torch.device) -> Tensor:
    return dynamic_map(signed).to(device)


def _blocks(here: slice) -> slice:
    return slice(here.start // BLOCK, here.stop // BLOCK)


def _rounded(p_n: Tensor, dtype: torch.dtype, first: int, seed: int) -> Tensor:
    out_n = torch.empty_like(p_n, dtype=dtype)
    for start in range(0, len(p_n), CHUNK):
        chunk = p_n[start : start + CHUNK]
        words = random_words(first + start, len(chunk), seed, p_n.device)
        out_n[start : start + CHUNK] = floor_quanta(chunk, words, dtype)
    return out_n
