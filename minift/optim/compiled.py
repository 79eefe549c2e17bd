"""The 8-bit step on a CPU as one compiled loop: decode, update, encode, without a tensor in between.

The readable form (update8bit.py) reads and writes each of its temporaries; this one keeps a block's 256 values in
registers. The operations and their order are the same, each rounded once (the compiler is told not to fuse), so the
bits are. It is used once `minift.quant.compiled.compile_kernels()` has been called.
"""

from functools import cache

import torch
from torch import Tensor

from minift.quant.codebooks import NearestCode
from minift.quant.compiled import cells, encode_blocks


def update_(
    p_n: Tensor,
    g_n: Tensor,
    m: tuple[Tensor, Tensor],
    v: tuple[Tensor, Tensor],
    maps: tuple[Tensor, Tensor],
    nearest: tuple[NearestCode, NearestCode],
    factors: Tensor,
) -> None:
    """One step of whole blocks, in place.

    Args:
        p_n, g_n: parameter and gradient, fp32.
        m, v: codes uint8 [n] and scales fp32 [blocks] of the two means.
        maps, nearest: the signed and the unsigned dynamic map, and their inverses.
        factors: the numbers of `update8bit.Factors`, fp32 [8]; in a tensor, or each learning rate would be compiled.
    """
    shape = (len(m[1]), -1)
    (m_n, m_scale_m), (v_n, v_scale_m) = m, v
    p_mc, g_mc, m_mc, v_mc = (x.view(shape) for x in (p_n, g_n, m_n, v_n))
    new = _compiled()(
        p_mc, g_mc, m_mc, v_mc, m_scale_m, v_scale_m, maps[0], maps[1], cells(nearest[0]), cells(nearest[1]), factors
    )  # fmt: skip
    for held, value in zip((p_mc, m_mc, m_scale_m, v_mc, v_scale_m), new, strict=True):
        held.copy_(value)  # not in the loop: the compiler refuses codes and scales that lie in one page


@cache
def _compiled():
    def update(
        p_mc: Tensor, g_mc: Tensor, m_codes_mc: Tensor, v_codes_mc: Tensor, m_scale_m: Tensor, v_scale_m: Tensor,
        signed: Tensor, unsigned: Tensor, m_cells: Tensor, v_cells: Tensor, factors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        before, after, beta1, rest1, beta2, rest2, rate, eps = factors.unbind()
        m_mc = signed[m_codes_mc.int()] * m_scale_m.unsqueeze(1) * beta1 + g_mc * rest1
        v_mc = unsigned[v_codes_mc.int()] * v_scale_m.unsqueeze(1) * beta2 + (g_mc * rest2) * g_mc
        p_mc = (p_mc * before - (m_mc * rate) / (v_mc.sqrt() + eps)) * after
        return p_mc, *encode_blocks(m_mc, m_cells), *encode_blocks(v_mc, v_cells)

    return torch.compile(update)
