"""One step of 8-bit AdamW for all parameters of a dtype in one launch.

    g, p, codes and scales of m and v  ->  m, v in fp32  ->  new m, v, p  ->  new codes and scales        in registers

Without weights that are copied anywhere: the kernel follows the address of each parameter and each gradient. What it
needs to find them is a table of *tiles*, each a range of up to TILE values of one tensor:

    tile      tensor   begin   block   left            address of parameter   gradient
      0          0        0       0    4608     ---->    0    7f..00            7f..40
      1          0     2048       8    2560              1    7f..80            7f..c0
      2          1        0      18     500

`block` is where the state of the tile begins, `left` how many values of the tensor are left from `begin` on. The tiles
depend on the sizes only and are made once; the addresses of gradients change and are sent in every step (16 bytes a
tensor).

Bits: every product, sum, quotient and square root is rounded by itself, in the order of the PyTorch body of
`minift::adamw8bit_`, so parameters, codes and scales equal the body's. Only where a value is NaN its payload, and where
a scale is not finite the codes of its block, mean nothing and may differ. Random words belong to places in the flat
buffer, not to programs, so they are those of the body, too.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minift_kernels.blockwise import INTERPRETED, block_absmax, nearest_dynamic, slopes, store_rounded
from minift_kernels.rounding import TARGETS, philox_words, round_by_chance

BLOCK = 256
TILE = 2048  # values a program handles: whole blocks of one tensor
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tables(NamedTuple):
    """A dynamic map, fp32 [256], and what lies between its entries, fp32 [255] (see blockwise.py)."""

    values: Tensor
    boundaries: Tensor


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """int64 -> pointer to TYPE. Without the hint the compiler would move single values."""
    pointer = address.to(tl.pointer_type(TYPE))  # pyright: ignore[reportArgumentType]
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _load_mean(state_ptr, absmax_ptr, values_ptr, offsets, blocks, mask, mask_blocks, EIGHT_BIT: tl.constexpr):
    """fp32 [blocks, 256] from codes and scales, or as it is."""
    if EIGHT_BIT:
        code = tl.load(state_ptr + offsets, mask=mask, other=0).to(tl.int32)
        return tl.load(values_ptr + code) * tl.load(absmax_ptr + blocks, mask=mask_blocks, other=0.0)[:, None]
    else:
        return tl.load(state_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _store_mean(
    mean, state_ptr, absmax_ptr, boundaries_ptr, slopes_ptr, offsets, blocks, mask, mask_blocks,
    SIGNED: tl.constexpr, EIGHT_BIT: tl.constexpr,
):  # fmt: skip
    if EIGHT_BIT:
        absmax, divisor = block_absmax(mean)
        tl.store(absmax_ptr + blocks, absmax, mask=mask_blocks)
        code = nearest_dynamic(mean * tl.div_rn(1.0, divisor)[:, None], boundaries_ptr, slopes_ptr, SIGNED)
        tl.store(state_ptr + offsets, code.to(tl.uint8), mask=mask)
    else:
        tl.store(state_ptr + offsets, mean, mask=mask)


# Without do_not_specialize Triton compiles again for a seed of 1 or one divisible by 16.
@triton.jit(do_not_specialize=["seed", "first"])
def _adamw8bit_kernel(
    addresses_ptr,
    tiles_ptr,
    m_ptr,
    v_ptr,
    m_absmax_ptr,
    v_absmax_ptr,
    m_values_ptr,
    v_values_ptr,
    m_boundaries_ptr,
    v_boundaries_ptr,
    m_slopes_ptr,
    v_slopes_ptr,
    before,
    after,
    beta1,
    rest1,
    beta2,
    rest2,
    rate,
    eps,
    seed,
    first,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROUND_BY_BITS: tl.constexpr,
    DROPPED: tl.constexpr,
    LARGEST: tl.constexpr,
    INFINITY: tl.constexpr,
    QUIET: tl.constexpr,
    FLOAT16: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Program i updates tile i. PARAM, GRAD: types behind the addresses; ALIGNED: these and all sizes are multiples
    of 16."""
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    tensor, begin, block, left = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    begin = tl.multiple_of(begin, 256)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    p_address, g_address = tl.load(addresses_ptr + 2 * tensor), tl.load(addresses_ptr + 2 * tensor + 1)
    p_ptr = _pointer(p_address, PARAM, ALIGNED) + begin
    g_ptr = _pointer(g_address, GRAD, ALIGNED) + begin
    row, column = tl.arange(0, BLOCKS), tl.arange(0, 256)
    within = row[:, None] * 256 + column[None, :]
    mask, blocks, mask_blocks = within < left, block + row, row * 256 < left
    offsets = block * 256 + within
    # The state of a block is there as a whole, also where its tensor ends.
    mask_state = mask_blocks[:, None] & (column[None, :] >= 0)

    p = tl.load(p_ptr + within, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + within, mask=mask, other=0.0).to(tl.float32)
    m = _load_mean(m_ptr, m_absmax_ptr, m_values_ptr, offsets, blocks, mask_state, mask_blocks, EIGHT_BIT)
    v = _load_mean(v_ptr, v_absmax_ptr, v_values_ptr, offsets, blocks, mask_state, mask_blocks, EIGHT_BIT)

    m = m * beta1 + g * rest1
    v = v * beta2 + (g * rest2) * g
    update = tl.div_rn(m * rate, tl.sqrt_rn(v) + eps)
    p = (p * before - update) * after

    if STOCHASTIC:
        counter = (first + block * 256) // 4 + row[:, None] * 64 + tl.arange(0, 64)[None, :]
        word = philox_words(counter, seed)
        rounded = round_by_chance(p.to(tl.int32, bitcast=True), word, DROPPED, LARGEST, INFINITY, QUIET, FLOAT16)
        p_ptr = p_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(p_ptr + within, rounded, mask=mask)
    else:
        if ROUND_BY_BITS:
            p_ptr = p_ptr.to(tl.pointer_type(tl.uint16), bitcast=True)
        store_rounded(p_ptr, within, p, mask, ROUND_BY_BITS)
    where = (offsets, blocks, mask_state, mask_blocks)
    signed: tl.constexpr = True  # pyright: ignore[reportAssignmentType]
    unsigned: tl.constexpr = False  # pyright: ignore[reportAssignmentType]
    _store_mean(m, m_ptr, m_absmax_ptr, m_boundaries_ptr, m_slopes_ptr, *where, signed, EIGHT_BIT)
    _store_mean(v, v_ptr, v_absmax_ptr, v_boundaries_ptr, v_slopes_ptr, *where, unsigned, EIGHT_BIT)


@lru_cache(maxsize=1024)
def _tiles(sizes: tuple[int, ...], chosen: tuple[int, ...], device: torch.device) -> Tensor:
    """The tiles of the chosen tensors, int64 [tiles, 4]; `sizes` are those of all tensors."""
    size = torch.tensor(sizes)
    blocks = (size + BLOCK - 1) // BLOCK
    first_block = blocks.cumsum(0) - blocks
    wanted = torch.tensor(chosen)
    tiles = (size[wanted] + TILE - 1) // TILE
    tensor = wanted.repeat_interleave(tiles)
    number = torch.arange(len(tensor)) - (tiles.cumsum(0) - tiles).repeat_interleave(tiles)
    begin = number * TILE
    columns = (tensor, begin, first_block[tensor] + begin // BLOCK, size[tensor] - begin)
    return torch.stack(columns, dim=1).to(device)


def constants(dtype: torch.dtype, grad: torch.dtype, aligned: bool, eight_bit: bool, stochastic: bool) -> dict:
    """The compile-time constants of the kernel."""
    target = TARGETS[dtype] if stochastic else dict.fromkeys(TARGETS[torch.bfloat16])
    return target | {
        "PARAM": TYPES[dtype],
        "GRAD": TYPES[grad],
        "ALIGNED": aligned,
        "EIGHT_BIT": eight_bit,
        "STOCHASTIC": stochastic,
        "ROUND_BY_BITS": INTERPRETED and dtype == torch.bfloat16,
        "BLOCKS": TILE // BLOCK,
    }


def adamw8bit_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: tuple[Tensor, Tensor | None, Tables],
    v: tuple[Tensor, Tensor | None, Tables],
    factors: Sequence[float],
    stochastic: bool,
    seed: int,
    first: int,
) -> None:
    """Launch the kernel, once for each pair of dtypes.

    Args:
        params, grads: contiguous, fp32, bf16 or fp16, any shape; parameters are changed in place.
        m, v: flat codes uint8 and scales fp32 of all tensors in turn, each padded to whole blocks of 256, and the
            tables; or fp32 means and None.
        factors: eight numbers, as the arguments of the kernel are named.
        stochastic: round 16-bit parameters by chance.
        seed, first: of the random words: the key, and the place of the first value, a multiple of 4.
    """
    kinds: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for index, (p, g) in enumerate(zip(params, grads, strict=True)):
        kinds.setdefault((p.dtype, g.dtype), []).append(index)
    sizes = tuple([p.numel() for p in params])
    found = [address for p, g in zip(params, grads, strict=True) for address in (p.data_ptr(), g.data_ptr())]
    device = m[0].device
    addresses = torch.tensor(found, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    both = (m[0], v[0], m[1], v[1], m[2].values, v[2].values, m[2].boundaries, v[2].boundaries,
            slopes(True, device), slopes(False, device))  # fmt: skip
    aligned = not any(number % 16 for number in (*found, *sizes))
    for (dtype, grad), chosen in kinds.items():
        tiles = _tiles(sizes, tuple(chosen), device)
        if len(tiles):
            _adamw8bit_kernel[(len(tiles),)](
                addresses,
                tiles,
                *both,
                *factors,
                seed,  # pyright: ignore[reportCallIssue] (it cannot count what the stars hold)
                first,  # pyright: ignore[reportCallIssue]
                **constants(dtype, grad, aligned, m[1] is not None, stochastic and dtype in TARGETS),
                num_warps=8,  # pyright: ignore[reportCallIssue] (an option of the compiler, not of the kernel)
                enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]
            )
