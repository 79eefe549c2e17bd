"""Attention without its score matrix: FlashAttention, forward and backward, as one operator.

    out_i = sum over j of p_ij v_j        p_ij = exp(score_ij) / sum over j of exp(score_ij)        score = scale q k^T

Written out, this stores s x t scores for each head: at 32768 tokens 4 GB a head in fp32, for an output of 8 MB. But a
softmax can be computed while its row is still being read, tile by tile, with three numbers a query carried along:

    m    the largest score so far           m' = max(m, max of the tile)
    l    sum of exp(score - m)              l' = l e^(m - m') + sum over the tile of e^(score - m')
    acc  sum of exp(score - m) v            acc' = acc e^(m - m') + sum over the tile of e^(score - m') v

and at the end out = acc / l. The factor e^(m - m') restates the old sums relative to the new maximum, so nothing ever
overflows and nothing is approximated. Only a tile of scores exists at a time: memory is linear in length.

The backward pass needs p again. It is not stored but computed anew from q, k and one number a query, lse = m + log l:

    p = exp(score - lse)    dv = p^T dout    ds = p * (dout v^T - delta)    dq = scale ds k    dk = scale ds^T q

with delta_i = sum over e of dout_i out_i, which is the row sum of p * (dout v^T) without a row of p. On a GPU the
second look at q and k costs less than reading stored probabilities would.

Which keys a query sees is a range, `first` .. its own index, so packing, windows and padding are two integers a token
and no mask; tiles outside of the range are not even visited. Three documents in a row of 9, window 2 for the last one:

    index    0 1 2 3 4 5 6 7 8            first is never less than that of the token before
    first    0 0 0 3 3 5 5 6 7            last  2 2 2 4 4 6 7 8 8       the last query that sees the token: the inverse

Soft cap (Gemma 2): scores become c tanh(score / c), so none is larger than c.
Grouped queries: the h/g query heads of a key/value head are stacked into the rows of one product, not k and v repeated.

With 16-bit inputs p and ds are rounded to 16 bits, too, before they are multiplied; everything else is fp32.
Left out: dropout, masks that are no range, attention to later tokens, paged caches, second derivatives. Values must be
finite also where nobody looks: a hidden infinity meets a probability of 0 inside a tile, and makes NaN.

Sources: FlashAttention 2, arXiv 2307.08691; online softmax, arXiv 1805.02867. GPU kernels: `minift_kernels/flash.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_WIDTH = 256
SUPPORTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Queries of a tile, and keys if there are that many queries. Smaller tiles waste less at the edges of what is visible,
# larger ones have fewer calls to make for each score.
TILE = 256


def flash_attention(
    q_bhse: Tensor,
    k_bgte: Tensor,
    v_bgte: Tensor,
    first_bs: Tensor | None = None,
    last_bt: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention of the last s of t tokens. Returns [b, h, s, e] in the dtype of q, laid out in memory like q.

    Args:
        q_bhse, k_bgte, v_bgte: fp32, bf16, fp16 or fp64, any strides, h a multiple of g, s <= t, e up to 256. Query i
            has index i + t - s among the t tokens; query head h uses key/value head h // (h/g).
        first_bs: int64, the first key that each query sees; never less than that of the query before. The last one is
            the query's own index; a query whose first key is behind it sees nothing, and its output is 0. None: 0.
        last_bt: int64, `last_queries(first_bs, t)`, for callers with one `first_bs` in many layers; None computes it.
        scale: of the scores; None is 1 / sqrt(e).
        softcap: c, scores become c tanh(score / c); 0 is off.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    _check(q_bhse, k_bgte, v_bgte, first_bs, last_bt, softcap)
    if first_bs is not None and last_bt is None:
        last_bt = last_queries(first_bs, k_bgte.shape[2])
    scale = q_bhse.shape[-1] ** -0.5 if scale is None else scale
    # What the kernels need, and what everybody passes: the numbers of a head side by side.
    q_bhse, k_bgte, v_bgte = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_bhse, k_bgte, v_bgte))
    return torch.ops.minift.flash_attention(q_bhse, k_bgte, v_bgte, first_bs, last_bt, scale, softcap)[0]


def last_queries(first_bs: Tensor, t: int) -> Tensor:
    """The inverse of `first_bs`: the index of the last query that may see each of t keys. int64 [b, t].

    The queries are the last s of the t tokens. A key that nobody sees gets an index less than its own, or that of the
    last token without a query.
    """
    b, s = first_bs.shape
    keys_bt = torch.arange(t, device=first_bs.device).expand(b, t).contiguous()
    return torch.searchsorted(first_bs.contiguous(), keys_bt, right=True) + (t - s - 1)


def _check(
    q_bhse: Tensor, k_bgte: Tensor, v_bgte: Tensor, first_bs: Tensor | None, last_bt: Tensor | None, softcap: float
) -> None:
    if not q_bhse.dtype == k_bgte.dtype == v_bgte.dtype or q_bhse.dtype not in SUPPORTED:
        raise ValueError(
            f"q, k and v are {q_bhse.dtype}, {k_bgte.dtype} and {v_bgte.dtype}; "
            "they must share one of float32, bfloat16, float16 and float64"
        )
    q_shape, k_shape, v_shape = (tuple(x.shape) for x in (q_bhse, k_bgte, v_bgte))
    if len(q_shape) != 4 or len(k_shape) != 4 or k_shape != v_shape:
        raise ValueError(f"q, k, v of shapes {q_shape}, {k_shape}, {v_shape}; needed: [b,h,s,e], [b,g,t,e], [b,g,t,e]")
    (b, heads, s, width), (_, groups, t, _) = q_shape, k_shape
    if (b, width) != (k_shape[0], k_shape[3]):
        raise ValueError(f"q of shape {q_shape} and k of shape {k_shape} must agree in batch and head width")
    if groups == 0 or heads % groups:
        raise ValueError(f"{heads} query heads cannot be shared out among {groups} key/value heads; give a multiple")
    if s > t:
        raise ValueError(f"{s} queries, but {t} keys: the queries are the last ones of the keys' tokens")
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"heads of width {width}; supported: 1 to {MAX_WIDTH}")
    if softcap < 0:
        raise ValueError(f"a soft cap of {softcap}; give a positive one, or 0 for none")
    if first_bs is None and last_bt is not None:
        raise ValueError("last_bt without first_bs; it is the inverse of first_bs, give both or neither")
    for name, x, shape in (("first_bs", first_bs, (b, s)), ("last_bt", last_bt, (b, t))):
        if x is not None and (x.dtype != torch.int64 or tuple(x.shape) != shape):
            raise ValueError(f"{name} is {tuple(x.shape)} of {x.dtype}; needed: {shape} of torch.int64")


# --- the operators: see quant/fourbit.py ------------------------------------------------------------------------------

_INPUTS = "Tensor q, Tensor k, Tensor v"
_FORM = "Tensor? first, Tensor? last, float scale, float softcap"
torch.library.define("minift::flash_attention", f"({_INPUTS}, {_FORM}) -> (Tensor, Tensor)")
torch.library.define(
    "minift::flash_attention_backward",
    f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_FORM}) -> (Tensor, Tensor, Tensor)",
)


def _flash_attention(
    q_bhse: Tensor,
    k_bgte: Tensor,
    v_bgte: Tensor,
    first_bs: Tensor | None,
    last_bt: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The output, and lse [b, h, s]: infinity for a query that sees nothing, so that exp(score - lse) is 0."""
    (s, t), groups, exact = (q_bhse.shape[2], k_bgte.shape[2]), k_bgte.shape[1], _sum_dtype(q_bhse)
    out_bhse, lse_bhs = torch.empty_like(q_bhse), q_bhse.new_empty(q_bhse.shape[:3], dtype=exact)
    for rows in _tiles(0, s, TILE):
        q = _stack(q_bhse[:, :, rows], groups).to(exact)  # [b, g, h/g * rows, e]
        peak = q.new_full((*q.shape[:3], 1), -torch.inf)
        total, acc = torch.zeros_like(peak), torch.zeros_like(q)
        for keys, hidden in _visible_tiles(rows, s, t, first_bs, q.device):
            score = _scores(q, k_bgte[:, :, keys].to(exact), scale, softcap)
            _hide_(score, hidden)
            new_peak = torch.maximum(peak, score.amax(-1, keepdim=True))
            shift = new_peak.masked_fill(new_peak == -torch.inf, 0)  # nothing seen yet: -inf - -inf would be NaN
            p, decay = score.sub_(shift).exp_(), (peak - shift).exp_()
            total = total * decay + p.sum(-1, keepdim=True)
            acc = acc * decay + p.to(q_bhse.dtype).to(exact) @ v_bgte[:, :, keys].to(exact)
            peak = new_peak
        nothing = total == 0
        out_bhse[:, :, rows] = _unstack(acc / total.masked_fill(nothing, 1), q_bhse.shape[1]).to(q_bhse.dtype)
        lse = (peak + total.log()).masked_fill(nothing, torch.inf)
        lse_bhs[:, :, rows] = _unstack(lse, q_bhse.shape[1]).squeeze(-1)
    return out_bhse, lse_bhs


def _flash_attention_backward(
    grad_bhse: Tensor,
    q_bhse: Tensor,
    k_bgte: Tensor,
    v_bgte: Tensor,
    out_bhse: Tensor,
    lse_bhs: Tensor,
    first_bs: Tensor | None,
    last_bt: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (s, t), groups, exact = (q_bhse.shape[2], k_bgte.shape[2]), k_bgte.shape[1], _sum_dtype(q_bhse)
    dq_bhse = torch.empty_like(q_bhse)
    dk_bgte, dv_bgte = (torch.zeros_like(x, dtype=exact) for x in (k_bgte, v_bgte))
    for rows in _tiles(0, s, TILE):
        stacked = (
            _stack(x[:, :, rows], groups).to(exact) for x in (q_bhse, grad_bhse, out_bhse, lse_bhs.unsqueeze(-1))
        )
        q, grad, out, lse = stacked
        delta, dq = (grad * out).sum(-1, keepdim=True), torch.zeros_like(q)
        for keys, hidden in _visible_tiles(rows, s, t, first_bs, q.device):
            k, v = k_bgte[:, :, keys].to(exact), v_bgte[:, :, keys].to(exact)
            score = _scores(q, k, scale, softcap)
            ds = grad @ v.mT - delta
            if softcap:
                ds *= 1 - (score / softcap).square()
            _hide_(score, hidden)
            p = score.sub_(lse).exp_()
            # As on the GPU, whose products of 16-bit numbers take nothing else: rounded here, multiplied in fp32.
            dv_bgte[:, :, keys] += p.to(q_bhse.dtype).to(exact).mT @ grad
            ds = (p * ds).to(q_bhse.dtype).to(exact)
            dk_bgte[:, :, keys] += ds.mT @ q
            dq += ds @ k
        dq_bhse[:, :, rows] = _unstack(dq * scale, q_bhse.shape[1]).to(q_bhse.dtype)
    return dq_bhse, (dk_bgte * scale).to(k_bgte.dtype), dv_bgte.to(v_bgte.dtype)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tiles(begin: int, end: int, size: int) -> Iterator[slice]:
    for start in range(begin, end, size):
        yield slice(start, min(start + size, end))


def _visible_tiles(
    rows: slice, s: int, t: int, first_bs: Tensor | None, device: torch.device
) -> Iterator[tuple[slice, Tensor | None]]:
    """The tiles of keys that a tile of queries sees, and what is hidden in them: bool [b or 1, rows, keys], or None."""
    own_s = torch.arange(rows.start, rows.stop, device=device)[:, None] + (t - s)
    first_b = None if first_bs is None else first_bs[:, rows, None].clamp(0, t)
    lowest, highest = (0, 0) if first_b is None else (int(first_b.min()), int(first_b.max()))
    # Tiles begin at multiples of their size, so that a document's sums do not depend on where others begin.
    size = TILE * TILE // min(TILE, s)
    for keys in _tiles(lowest // size * size, rows.stop + t - s, size):
        if highest <= keys.start and keys.stop <= rows.start + t - s + 1:
            yield keys, None
            continue
        key_t = torch.arange(keys.start, keys.stop, device=device)
        hidden_st = key_t > own_s
        yield keys, hidden_st[None] if first_b is None else hidden_st | (key_t < first_b)


def _scores(q_bgre: Tensor, k_bgte: Tensor, scale: float, softcap: float) -> Tensor:
    score = (q_bgre @ k_bgte.mT).mul_(scale)
    return score.div_(softcap).tanh_().mul_(softcap) if softcap else score


def _hide_(score_bgrt: Tensor, hidden: Tensor | None) -> None:
    if hidden is not None:
        score_bgrt.unflatten(2, (-1, hidden.shape[1])).masked_fill_(hidden[:, None, None], -torch.inf)


def _stack(x_bhse: Tensor, groups: int) -> Tensor:
    """[b, h, s, e] -> [b, g, h/g * s, e]: the query heads of a key/value head one behind the other."""
    return x_bhse.unflatten(1, (groups, -1)).flatten(2, 3)


def _unstack(x_bgre: Tensor, heads: int) -> Tensor:
    """[b, g, h/g * s, e] -> [b, h, s, e]."""
    return x_bgre.unflatten(2, (heads // x_bgre.shape[1], -1)).flatten(1, 2)


torch.library.impl("minift::flash_attention", "default", _flash_attention)
torch.library.impl("minift::flash_attention_backward", "default", _flash_attention_backward)


@torch.library.impl("minift::flash_attention", "cuda")
def _flash_attention_cuda(q_bhse, k_bgte, v_bgte, first_bs, last_bt, scale, softcap):
    if q_bhse.dtype == torch.float64:
        return _flash_attention(q_bhse, k_bgte, v_bgte, first_bs, last_bt, scale, softcap)
    from minift_kernels.flash import flash_attention

    return flash_attention(q_bhse, k_bgte, v_bgte, first_bs, scale, softcap)


@torch.library.impl("minift::flash_attention_backward", "cuda")
def _flash_attention_backward_cuda(
    grad_bhse, q_bhse, k_bgte, v_bgte, out_bhse, lse_bhs, first_bs, last_bt, scale, softcap
):
    tensors = (grad_bhse, q_bhse, k_bgte, v_bgte, out_bhse, lse_bhs, first_bs, last_bt)
    if q_bhse.dtype == torch.float64:
        return _flash_attention_backward(*tensors, scale, softcap)
    from minift_kernels.flash import flash_attention_backward

    return flash_attention_backward(*tensors, scale, softcap)


@torch.library.register_fake("minift::flash_attention")
def _flash_attention_fake(q_bhse, k_bgte, v_bgte, first_bs, last_bt, scale, softcap):
    return torch.empty_like(q_bhse), q_bhse.new_empty(q_bhse.shape[:3], dtype=_sum_dtype(q_bhse))


@torch.library.register_fake("minift::flash_attention_backward")
def _flash_attention_backward_fake(grad, q_bhse, k_bgte, v_bgte, out, lse, first, last, scale, softcap):
    return torch.empty_like(q_bhse), torch.empty_like(k_bgte), torch.empty_like(v_bgte)


def _keep_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.softcap = inputs
    q_bhse, k_bgte, v_bgte, first_bs, last_bt = tensors
    out_bhse, lse_bhs = output
    ctx.mark_non_differentiable(lse_bhs)
    ctx.save_for_backward(q_bhse, k_bgte, v_bgte, out_bhse, lse_bhs, first_bs, last_bt)


@once_differentiable
def _backward(ctx, *grads: Tensor):
    dq, dk, dv = torch.ops.minift.flash_attention_backward(grads[0], *ctx.saved_tensors, ctx.scale, ctx.softcap)
    return dq, dk, dv, None, None, None, None


torch.library.register_autograd("minift::flash_attention", _backward, setup_context=_keep_inputs)
