"""Attention by tiles: the softmax is computed while its row is read, so no score ever reaches memory.

The recurrence and the gradients are explained in `minift/model/flash.py`. Three kernels, each with its own sums in
registers and nothing shared between programs, so no atomics: the same bits in every run.

    forward   a program owns M queries of a head, walks over the keys they see           out, lse
    dq        the same walk again                                                        dq, delta
    dk, dv    a program owns N keys of a key/value head, walks over the queries that
              see them, of all query heads that it serves                                dk, dv

                 keys ->                  A walk has two parts: the tiles seen in full (f), which need no masking and
      queries    e f f e . . . .          no checks for the end of the tensor, and those on the edges (e) of what is
         |       . e f f e . . .          visible. The others (.) are not visited.
         v       . . . e f f e .

Units: exponents are base 2, which the hardware has, so scores are multiplied by log2(e) together with their scale.
fp32 operands are multiplied as fp32 (`ieee`), not as TF32; 16-bit ones on tensor cores, summed in fp32.

Heads are padded to a power of two of at least 16 columns (the least a tensor core takes) with zeros.

Rows are counted in 64 bits when multiplied by a stride. Triton's CPU interpreter cannot multiply bf16; there the
operands stay fp32 numbers that fit bf16.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minift_kernels.blockwise import INTERPRETED, store_rounded
from minift_kernels.matmul import round_like

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EDGE = tl.constexpr(True)  # the tile may reach behind the end of its tensor
# (queries, keys, warps, stages) by bytes of a number and padded head width: what fits the registers, and 99 KB of
# shared memory, which GPUs of every generation from 2020 on have. fp32 is multiplied lane by lane, so its tiles are
# small: all of a tile's products are written out in the machine code.
FORWARD = {
    (2, 64): (128, 64, 8, 2), (2, 128): (128, 32, 8, 2), (2, 256): (64, 32, 8, 2),
    (4, 64): (32, 32, 4, 1), (4, 128): (32, 16, 8, 1), (4, 256): (16, 16, 8, 1),
}  # fmt: skip
DQ = {
    (2, 64): (64, 64, 4, 2), (2, 128): (64, 64, 8, 2), (2, 256): (32, 32, 4, 1),
    (4, 64): (32, 16, 4, 1), (4, 128): (16, 16, 8, 1), (4, 256): (16, 16, 8, 1),
}  # fmt: skip
DKV = {
    (2, 64): (32, 64, 4, 2), (2, 128): (32, 64, 8, 2), (2, 256): (32, 32, 8, 1),
    (4, 64): (16, 32, 4, 1), (4, 128): (16, 16, 4, 1), (4, 256): (16, 16, 8, 1),
}  # fmt: skip


@triton.jit
def _load_rows(
    ptr, start, end, stride, E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BOUNDED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """[ROWS, WIDTH] from row `start` on, 0 outside of the tensor. Not BOUNDED: all of these rows exist."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    # A 64-bit address for the tile, 32-bit offsets within it: half the registers.
    tile_ptr = ptr + tl.cast(start, tl.int64) * stride + (row * stride + column)
    if BOUNDED:
        tile = tl.load(tile_ptr, mask=(row < end - start) & (column < E), other=0.0)
    elif E < WIDTH:
        tile = tl.load(tile_ptr, mask=column < E, other=0.0)
    else:
        tile = tl.load(tile_ptr)
    return tile.to(tl.float32) if INTERPRETED else tile


@triton.jit
def _store_rows(
    ptr, value, start, end, stride, E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ROUND_BY_BITS: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (row < end - start) & (column < E)
    store_rounded(ptr + tl.cast(start, tl.int64) * stride, row * stride + column, value, inside, ROUND_BY_BITS)


@triton.jit
def _scores(left, right, scale, cap, SOFTCAP: tl.constexpr):
    """Scores of rows of `left` with rows of `right`, times log2(e); and tanh of the soft cap."""
    score = tl.dot(left, tl.trans(right), input_precision="ieee") * scale
    if SOFTCAP:
        tanh = 2 * tl.sigmoid(score) - 1
        return tanh * cap, tanh
    else:
        return score, score


@triton.jit
def _first_keys(first_ptr, start, s, t, ROWS: tl.constexpr, HAS_FIRST: tl.constexpr):
    """int32 [ROWS], the first key of each query; rows behind the end repeat the last one."""
    if HAS_FIRST:
        first = tl.load(first_ptr + tl.minimum(start + tl.arange(0, ROWS), s - 1))
        return tl.minimum(tl.maximum(first, 0), t).to(tl.int32)
    else:
        return tl.zeros([ROWS], tl.int32)


@triton.jit
def _key_tiles(first, start, s, t, M: tl.constexpr, N: tl.constexpr):
    """The walk over tiles of keys of the queries from `start` on: `_walk` explains what is returned."""
    end = tl.cdiv(tl.minimum(start + M, s) + (t - s), N)
    return _walk(tl.min(first, 0) // N, tl.cdiv(tl.max(first, 0), N), (start + (t - s) + 1) // N, end)


@triton.jit
def _walk(begin, full_begin, full_end, end):
    """Tiles [begin, end) of which [full_begin, full_end) need no mask -> begin, edges before them, they, all edges."""
    begin, full_begin = tl.minimum(begin, end), tl.minimum(full_begin, end)
    full = tl.maximum(full_end - full_begin, 0)
    return begin, full_begin - begin, full, end - begin - full


@triton.jit
def _tile(i, begin, before, full, EDGES: tl.constexpr):
    """The i-th tile of those to be masked, or of the others."""
    if EDGES:
        return begin + i + tl.where(i < before, 0, full)
    else:
        return begin + before + i


@triton.jit
def _flash_forward_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, out_ptr, lse_ptr,
    s, t, heads, repeats, scale, cap,
    stride_q_batch, stride_q_head, stride_q_row,
    stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row,
    E: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_FIRST: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRETED: tl.constexpr, ROUND_BY_BITS: tl.constexpr,
):  # fmt: skip
    """Program i computes a tile of M queries of head i // tiles; `out` is laid out like q."""
    tiles = tl.cdiv(s, M)
    # Late queries see most: they go first, so that no long program is left over at the end.
    start = (tiles - 1 - tl.program_id(0) % tiles) * M
    batch, head = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    batch, head, group = batch.to(tl.int64), head.to(tl.int64), (head // repeats).to(tl.int64)
    q_offset = batch * stride_q_batch + head * stride_q_head
    k_ptr += batch * stride_k_batch + group * stride_k_head
    v_ptr += batch * stride_v_batch + group * stride_v_head
    row = start + tl.arange(0, M)
    first = _first_keys(first_ptr + batch * s, start, s, t, M, HAS_FIRST)
    begin, before, full, edges = _key_tiles(first, start, s, t, M, N)

    q = _load_rows(q_ptr + q_offset, start, s, stride_q_row, E, WIDTH, M, EDGE, INTERPRETED)
    peak, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    acc = tl.zeros([M, WIDTH], tl.float32)
    for masked in tl.static_range(2):  # pyright: ignore (unrolled by the compiler)
        for i in range(0, edges if masked else full):
            key = _tile(i, begin, before, full, masked) * N
            k = _load_rows(k_ptr, key, t, stride_k_row, E, WIDTH, N, masked, INTERPRETED)
            v = _load_rows(v_ptr, key, t, stride_v_row, E, WIDTH, N, masked, INTERPRETED)
            score, _ = _scores(q, k, scale, cap, SOFTCAP)
            if masked:
                column = key + tl.arange(0, N)[None, :]
                visible = (column <= (row + (t - s))[:, None]) & (column >= first[:, None])
                score = tl.where(visible, score, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 1))
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            p, decay = tl.exp2(score - shift[:, None]), tl.exp2(peak - shift)
            total = total * decay + tl.sum(p, 1)
            acc = tl.dot(round_like(p, v_ptr, INTERPRETED), v, acc * decay[:, None], input_precision="ieee")
            peak = new_peak
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    acc = tl.div_rn(acc, tl.broadcast_to(total[:, None], [M, WIDTH]))
    lse = tl.where(seen, (peak + tl.log2(total)) * LN2, float("inf"))
    _store_rows(out_ptr + q_offset, acc, start, s, stride_q_row, E, WIDTH, M, ROUND_BY_BITS)
    tl.store(lse_ptr + (batch * heads + head) * s + row, lse, mask=row < s)


@triton.jit
def _flash_dq_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, grad_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr,
    s, t, heads, repeats, scale, cap, grad_scale,
    stride_q_batch, stride_q_head, stride_q_row,
    stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row,
    E: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_FIRST: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRETED: tl.constexpr, ROUND_BY_BITS: tl.constexpr,
):  # fmt: skip
    """Programs as in the forward kernel; grad, out and dq are laid out like q. Writes delta for the third kernel."""
    tiles = tl.cdiv(s, M)
    start = (tiles - 1 - tl.program_id(0) % tiles) * M
    batch, head = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    batch, head, group = batch.to(tl.int64), head.to(tl.int64), (head // repeats).to(tl.int64)
    q_offset, row_offset = batch * stride_q_batch + head * stride_q_head, (batch * heads + head) * s
    k_ptr += batch * stride_k_batch + group * stride_k_head
    v_ptr += batch * stride_v_batch + group * stride_v_head
    row = start + tl.arange(0, M)
    first = _first_keys(first_ptr + batch * s, start, s, t, M, HAS_FIRST)
    begin, before, full, edges = _key_tiles(first, start, s, t, M, N)

    q = _load_rows(q_ptr + q_offset, start, s, stride_q_row, E, WIDTH, M, EDGE, INTERPRETED)
    grad = _load_rows(grad_ptr + q_offset, start, s, stride_q_row, E, WIDTH, M, EDGE, INTERPRETED)
    out = _load_rows(out_ptr + q_offset, start, s, stride_q_row, E, WIDTH, M, EDGE, INTERPRETED)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row_offset + row, delta, mask=row < s)
    lse = tl.load(lse_ptr + row_offset + row, mask=row < s, other=float("inf")) * LOG2E
    dq = tl.zeros([M, WIDTH], tl.float32)
    for masked in tl.static_range(2):  # pyright: ignore (unrolled by the compiler)
        for i in range(0, edges if masked else full):
            key = _tile(i, begin, before, full, masked) * N
            k = _load_rows(k_ptr, key, t, stride_k_row, E, WIDTH, N, masked, INTERPRETED)
            v = _load_rows(v_ptr, key, t, stride_v_row, E, WIDTH, N, masked, INTERPRETED)
            score, tanh = _scores(q, k, scale, cap, SOFTCAP)
            p = tl.exp2(score - lse[:, None])
            if masked:
                column = key + tl.arange(0, N)[None, :]
                visible = (column <= (row + (t - s))[:, None]) & (column >= first[:, None])
                p = tl.where(visible, p, 0.0)
            ds = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])  # pyright: ignore[reportArgumentType]
            if SOFTCAP:
                ds *= 1 - tanh * tanh
            dq = tl.dot(round_like(ds, k_ptr, INTERPRETED), k, dq, input_precision="ieee")
    _store_rows(dq_ptr + q_offset, dq * grad_scale, start, s, stride_q_row, E, WIDTH, M, ROUND_BY_BITS)


@triton.jit
def _flash_dkv_kernel(
    q_ptr, k_ptr, v_ptr, last_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    s, t, heads, repeats, scale, cap, grad_scale,
    stride_q_batch, stride_q_head, stride_q_row,
    stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row,
    E: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_FIRST: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRETED: tl.constexpr, ROUND_BY_BITS: tl.constexpr,
):  # fmt: skip
    """Program i computes a tile of N keys of key/value head i // tiles; grad is laid out like q, dk like k, dv like v.

    Tiles are transposed, a row for each key, so that p and ds are left operands of the products as they come.
    """
    tiles = tl.cdiv(t, N)
    start = tl.program_id(0) % tiles * N
    groups = heads // repeats
    batch, group = tl.program_id(0) // tiles // groups, tl.program_id(0) // tiles % groups
    batch, group = batch.to(tl.int64), group.to(tl.int64)
    k_offset = batch * stride_k_batch + group * stride_k_head
    v_offset = batch * stride_v_batch + group * stride_v_head
    key = start + tl.arange(0, N)
    # Behind the last query that sees the key, counted in queries: index - (t - s) + 1.
    if HAS_FIRST:
        last = tl.load(last_ptr + batch * t + tl.minimum(key, t - 1))
        stop = tl.minimum(tl.maximum(last - (t - s) + 1, 0), s).to(tl.int32)
    else:
        stop = tl.zeros([N], tl.int32) + s
    # The first query that sees the tile's first key, and the first one that sees its last key.
    earliest, latest = tl.maximum(start - (t - s), 0), tl.maximum(start + N - 1 - (t - s), 0)
    begin, before, full, edges = _walk(
        earliest // M, tl.cdiv(latest, M), tl.min(stop, 0) // M, tl.cdiv(tl.max(stop, 0), M)
    )

    k = _load_rows(k_ptr + k_offset, start, t, stride_k_row, E, WIDTH, N, EDGE, INTERPRETED)
    v = _load_rows(v_ptr + v_offset, start, t, stride_v_row, E, WIDTH, N, EDGE, INTERPRETED)
    dk, dv = tl.zeros([N, WIDTH], tl.float32), tl.zeros([N, WIDTH], tl.float32)
    for repeat in range(0, repeats):
        head = group * repeats + repeat
        q_offset, row_offset = batch * stride_q_batch + head * stride_q_head, (batch * heads + head) * s
        for masked in tl.static_range(2):  # pyright: ignore (unrolled by the compiler)
            for i in range(0, edges if masked else full):
                query = _tile(i, begin, before, full, masked) * M
                q = _load_rows(q_ptr + q_offset, query, s, stride_q_row, E, WIDTH, M, masked, INTERPRETED)
                grad = _load_rows(grad_ptr + q_offset, query, s, stride_q_row, E, WIDTH, M, masked, INTERPRETED)
                row = query + tl.arange(0, M)
                lse = tl.load(lse_ptr + row_offset + row, mask=row < s, other=float("inf")) * LOG2E
                delta = tl.load(delta_ptr + row_offset + row, mask=row < s, other=0.0)
                score, tanh = _scores(k, q, scale, cap, SOFTCAP)
                p = tl.exp2(score - lse[None, :])
                if masked:
                    p = tl.where((row[None, :] >= (key - (t - s))[:, None]) & (row[None, :] < stop[:, None]), p, 0.0)
                dv = tl.dot(round_like(p, q_ptr, INTERPRETED), grad, dv, input_precision="ieee")
                ds = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
                if SOFTCAP:
                    ds *= 1 - tanh * tanh
                dk = tl.dot(round_like(ds, q_ptr, INTERPRETED), q, dk, input_precision="ieee")
    _store_rows(dk_ptr + k_offset, dk * grad_scale, start, t, stride_k_row, E, WIDTH, N, ROUND_BY_BITS)
    _store_rows(dv_ptr + v_offset, dv, start, t, stride_v_row, E, WIDTH, N, ROUND_BY_BITS)


def tile_of(table: dict, x: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constants and the compiler's options of a kernel for heads like those of x."""
    width = max(16, triton.next_power_of_2(x.shape[-1]))
    m, n, warps, stages = table[x.element_size(), max(64, width)]
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return {"E": x.shape[-1], "WIDTH": width, "M": m, "N": n}, options


def _scales(scale: float, softcap: float) -> tuple[float, float]:
    """What products are multiplied by, and the cap in base 2. tanh(x) = 2 sigmoid(2x) - 1."""
    return (2 * scale / softcap, softcap * LOG2E.value) if softcap else (scale * LOG2E.value, 0.0)


def _constants(x: Tensor, has_first: bool, softcap: float) -> dict[str, Any]:
    by_bits = INTERPRETED and x.dtype == torch.bfloat16
    return {"HAS_FIRST": has_first, "SOFTCAP": softcap > 0, "INTERPRETED": INTERPRETED, "ROUND_BY_BITS": by_bits}


def _writable(x: Tensor) -> Tensor:
    return x.view(torch.uint16) if INTERPRETED and x.dtype == torch.bfloat16 else x


def _laid_like(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides of `like`."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def _check_rows(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name} has strides {x.stride()}; this kernel needs the numbers of a head side by side")


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    scale: float,
    softcap: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        q, k, v: fp32, bf16 or fp16 [b, h, s, e], [b, g, t, e], [b, g, t, e]; the numbers of a head side by side.
        first: int64 [b, s], the first key of each query; None for 0.
        scale, softcap: of the scores; a soft cap of 0 is none.
        out: where to write the result [b, h, s, e] and lse, fp32 [b, h, s]; None allocates.
    """
    _check_rows(q=q, k=k, v=v)
    if out is None:
        out = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    result, lse = out
    q = _laid_like(q, result)
    (b, heads, s, _), (_, groups, t, _) = q.shape, k.shape
    tile, options = tile_of(FORWARD, q)
    constants = _constants(q, first is not None, softcap)
    if q.numel():
        _flash_forward_kernel[(triton.cdiv(s, tile["M"]) * b * heads,)](
            q, k, v, q if first is None else first.contiguous(), _writable(result), lse,
            s, t, heads, heads // groups, *_scales(scale, softcap),
            *_strides(q, k, v), **tile, **constants, **options,  # pyright: ignore[reportArgumentType] (it loses count)
        )  # fmt: skip
    return out


def flash_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    scale: float,
    softcap: float,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the two backward kernels.

    Args:
        grad: of the output, any strides.
        q, k, v, first, scale, softcap: as given to `flash_attention`; out, lse: what it returned.
        last: int64 [b, t], the last query that sees each key; None with `first` None.
        grads: where to write dq, dk and dv; None allocates.
    """
    _check_rows(q=q, k=k, v=v)
    dq, dk, dv = grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)) if grads is None else grads
    q, grad, out, k, v = (_laid_like(x, like) for x, like in ((q, dq), (grad, dq), (out, dq), (k, dk), (v, dv)))
    (b, heads, s, _), (_, groups, t, _) = q.shape, k.shape
    delta, lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device), lse.contiguous()
    first, last = (q if x is None else x.contiguous() for x in (first, last))
    constants = _constants(q, first is not q, softcap)
    numbers = (s, t, heads, heads // groups, *_scales(scale, softcap), scale, *_strides(q, k, v))
    tile, options = tile_of(DQ, q)
    if q.numel():
        _flash_dq_kernel[(triton.cdiv(s, tile["M"]) * b * heads,)](
            q, k, v, first, grad, out, lse, delta, _writable(dq),
            *numbers, **tile, **constants, **options,  # pyright: ignore[reportArgumentType] (it loses count)
        )  # fmt: skip
    tile, options = tile_of(DKV, q)
    if k.numel():
        _flash_dkv_kernel[(triton.cdiv(t, tile["N"]) * b * groups,)](
            q, k, v, last, grad, lse, delta, _writable(dk), _writable(dv),
            *numbers, **tile, **constants, **options,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    return grads
