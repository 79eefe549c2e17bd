"""Attention by definition in float64, and how far rounded numbers may end from it.

The bounds follow the formula step by step. `unit` is half a unit in the last place of the activations, `single` that of
the sums (2^-24; 2^-53 for fp64):

    score   a sum of e products, scaled: (e + 4) single x sum of magnitudes; tanh of a soft cap is good to 16 single
    p       relative: twice the largest score error of the row (numerator; denominator or lse), the rounding of numbers
            as large as the scores before they meet exp (4 single x largest), t terms and one rescaling a tile
    out     p rounded to `unit`, times |v|; the result rounded
    dp, delta   sums of e products; delta contains the error of the stored output
    ds      p (dp - delta) slope, each factor's error, and the rounding to `unit`
    dq, dk, dv  sums over keys, or over queries and the heads of a group, of the above; the result rounded

`least` is the smallest change there is: denormal fp16; elsewhere exp2 returns 0 below 2^-126.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ["causal", "packed", "window", "left padding", "right padding", "blind"]


def first_keys(layout: str, b: int, s: int, t: int) -> Tensor | None:
    """The first key of each of the last s queries of t tokens; a different one in each row."""
    if layout == "causal":
        return None
    index, rows = torch.arange(t), []
    for row in range(b):
        cut = (t // 2 + row) % t
        begin = torch.where(index < cut, 0, cut)  # two documents, or a run of pads and one
        if layout == "packed":
            starts = torch.randint(0, t, (t,)) < 7  # documents of about t / 7 tokens
            begin = torch.where(starts, index, 0).cummax(0).values
        elif layout == "left padding":
            begin = torch.where(index < t // 3, 0, t // 3)
        elif layout == "window":
            begin = torch.maximum(begin, index - 4 - row)
        elif layout == "blind":  # from `cut` on, a run of queries whose first key is behind them
            begin = torch.where((index >= cut) & (index < cut + 1 + t // 5), index + 1, 0).cummax(0).values
        rows.append(begin[t - s :])
    return torch.stack(rows)


def visible_keys(first_bs: Tensor | None, s: int, t: int, device: torch.device) -> Tensor:
    """Bool [b or 1, 1, s, t]."""
    key, own = torch.arange(t, device=device), torch.arange(t - s, t, device=device)[:, None]
    visible = (key <= own)[None] if first_bs is None else (key <= own) & (key >= first_bs[..., None])
    return visible[:, None]


def by_definition(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, softcap: float) -> Tensor:
    """In the dtype of its arguments, differentiable, with the whole score matrix."""
    repeats = q.shape[1] // k.shape[1]
    score = q @ k.repeat_interleave(repeats, 1).mT * scale
    score = softcap * torch.tanh(score / softcap) if softcap else score
    visible = visible_keys(first, q.shape[2], k.shape[2], q.device)
    p = score.masked_fill(~visible, torch.finfo(score.dtype).min).softmax(-1)
    return p * visible.any(-1, keepdim=True) @ v.repeat_interleave(repeats, 1)


@dataclass
class Exact:
    """Output and gradients in float64, and how far each may be off: [out, dq, dk, dv]."""

    values: list[Tensor]
    bounds: list[Tensor]


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, first: Tensor | None, scale: float, softcap: float
) -> Exact:
    leaves = q_leaf, k_leaf, v_leaf = tuple(x.double().detach().clone().requires_grad_() for x in (q, k, v))
    out = by_definition(q_leaf, k_leaf, v_leaf, first, scale, softcap)
    values = [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]
    return Exact(values, _bounds(q, k, v, grad, values, first, scale, softcap))


def _bounds(q, k, v, grad, values, first, scale, softcap) -> list[Tensor]:
    (s, e), (groups, t), info = q.shape[2:], k.shape[1:3], torch.finfo(q.dtype)
    unit, single = info.eps / 2, 2**-53 if q.dtype == torch.float64 else 2**-24
    least = max(info.smallest_normal * info.eps, 2**-126)
    repeats = q.shape[1] // groups
    q, k, v, grad = q.double(), *(x.double().repeat_interleave(repeats, 1) for x in (k, v)), grad.double()
    out = values[0]

    visible = visible_keys(first, s, t, q.device).expand(len(q), q.shape[1], s, t)
    score, d_score = q @ k.mT * scale, (e + 4) * single * scale * (q.abs() @ k.abs().mT)
    tanh = torch.tanh(score / softcap) if softcap else torch.zeros_like(score)
    if softcap:
        score, d_score = softcap * tanh, d_score + 16 * single * softcap
    p = score.masked_fill(~visible, torch.finfo(score.dtype).min).softmax(-1) * visible
    largest, largest_error = ((x.abs() * visible).amax(-1, keepdim=True) for x in (score, d_score))
    relative = torch.expm1(2 * largest_error + 4 * single * largest + (t + 16) * single)
    d_p = (relative + unit) * p + least * visible

    d_out = d_p @ v.abs() + unit * out.abs() + least
    dp, delta = grad @ v.mT, (grad * out).sum(-1, keepdim=True)
    d_dp = (e + 4) * single * (grad.abs() @ v.abs().mT + (grad * out).abs().sum(-1, keepdim=True))
    d_dp = d_dp + (grad.abs() * d_out).sum(-1, keepdim=True)
    slope, d_slope = 1 - tanh**2, (2 * d_score / softcap + 4 * single if softcap else 0)
    ds = p * (dp - delta) * slope
    d_ds = (d_p * (dp - delta).abs() + p * d_dp) * slope + p * (dp - delta).abs() * d_slope
    d_ds = (d_ds * (1 + relative) + unit * ds.abs() + least) * visible

    def per_group(x: Tensor) -> Tensor:  # sum over the query heads of a key/value head
        return x.unflatten(1, (groups, repeats)).sum(2)

    queries = s * repeats + 4
    d_dq = scale * ((d_ds + (t + 4) * single * ds.abs()) @ k.abs())
    d_dk = scale * per_group((d_ds + queries * single * ds.abs()).mT @ q.abs())
    d_dv = per_group((d_p + queries * single * p).mT @ grad.abs())
    gradients = [d + unit * (value.abs() + d) + least for d, value in zip((d_dq, d_dk, d_dv), values[1:], strict=True)]
    return [d_out, *gradients]


def assert_is_attention(ours: list[Tensor], exact: Exact) -> None:
    """ours: out, dq, dk, dv."""
    for name, found, value, bound in zip(("out", "dq", "dk", "dv"), ours, exact.values, exact.bounds, strict=True):
        assert found.isfinite().all(), name
        excess = ((found.double() - value.to(found.device)).abs() / bound.to(found.device)).max().item()
        assert excess <= 1, f"{name} is off by {excess:.3g} times what rounding explains"
