"""8-bit blocks of 256 fp32 values against bitsandbytes, and how many codes of each side are not the nearest ones.

On a CPU bitsandbytes looks codes up by one of 65,536 cells, which is fast and not exact; so the time of quantizing is
shown together with the share of wrong codes on the very same data.
"""

from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes import functional as theirs_functional
from torch import Tensor

from benchmarks.harness import Row, Setup, check_bits
from minift.quant import dequantize_blockwise, dynamic_map, quantize_blockwise

VALUES, BLOCKSIZE = 1 << 22, 256
# Normal values in blocks of 256 have at most 1.2 of their number per unit of x / absmax. A cell is 3e-5 wide and goes
# wrong on one side of each of 255 midpoints at most: 255 x 1.5e-5 x 1.2 = 0.5 %. On a GPU: as in bench_fourbit.
CODES_DIFFER = {"cpu": 0.01, "cuda": 1e-4}


def rows(setup: Setup) -> Iterator[Row]:
    n = setup.size(VALUES)
    x_n = torch.randn(n, device=setup.device)
    bytes_moved = n * (5 + 4 / BLOCKSIZE)
    yield Row(
        name=f"quantize to 8 bits, {n} values",
        inputs=setup.rotate(x_n, x_n.nbytes),
        ours=quantize_blockwise,
        theirs=_quantize_theirs,
        check=_check_codes,
        facts=lambda ours, theirs: wrong_codes(x_n, ours, theirs),
        bytes_moved=bytes_moved,
        goal=setup.goal(compiled=0.9),
    )
    codes, absmax = _quantize_theirs(x_n)
    yield Row(
        name=f"decode 8 bits, {n} values",
        inputs=setup.rotate((codes, absmax), codes.nbytes + absmax.nbytes),
        ours=lambda held: dequantize_blockwise(*held),
        theirs=lambda held: theirs_functional.dequantize_blockwise(held[0], absmax=held[1], blocksize=BLOCKSIZE),
        check=check_bits,
        bytes_moved=bytes_moved,
    )


def wrong_codes(x_n: Tensor, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The shares of wrong codes as entries of the row, and as its note."""
    shares = {"ours": wrong_share(x_n, *ours), "theirs": wrong_share(x_n, *theirs)}
    note = f"not the nearest code: {shares['theirs']:.3%} of bitsandbytes', {shares['ours']:.3%} of minift's"
    return {f"wrong_codes_{name}": share for name, share in shares.items()} | {"note": note}


def wrong_share(x_n: Tensor, codes_n: Tensor, absmax_m: Tensor) -> float:
    """Share of codes that lie farther from x / absmax than the nearest entry does, in float64.

    By more than 2^-22 |x / absmax|, since the quotient that a quantizer looks up is rounded in fp32: 2^-23 at most for
    a reciprocal and a product, which moves two distances in opposite directions.
    """
    code = dynamic_map(True).double().to(x_n.device)
    quotient_n = (x_n.double().view(-1, BLOCKSIZE) / absmax_m.double().unsqueeze(1)).view(-1)
    above = torch.searchsorted(code, quotient_n).clamp(1, len(code) - 1)
    nearest = torch.minimum((code[above] - quotient_n).abs(), (code[above - 1] - quotient_n).abs())
    excess = (code[codes_n.int()] - quotient_n).abs() - nearest
    return (excess > 2**-22 * quotient_n.abs()).double().mean().item()


def _quantize_theirs(x_n: Tensor) -> tuple[Tensor, Tensor]:
    codes, state = theirs_functional.quantize_blockwise(x_n, blocksize=BLOCKSIZE)
    return codes, state.absmax


def _check_codes(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    check_bits(ours[1], theirs[1])
    check_bits(ours[0], theirs[0], CODES_DIFFER[ours[0].device.type])
