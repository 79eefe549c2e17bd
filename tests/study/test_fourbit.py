"""Errors of codebooks: the same as those of the library's own types, and of the formula for equal steps."""

import math

import pytest
import torch

from minift.quant import codebook, dequantize_4bit, quantize_4bit
from minift.quant.model import relative_error
from minift.study.fourbit import bits_per_weight, code_shares, codebooks, decode_with, errors_by_blocksize, quotients

WEIGHT = torch.randn(64, 150, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 256])  # 256 leaves a short block
def test_the_same_errors_as_the_stored_types(quant_type: str, blocksize: int):
    ours = decode_with(WEIGHT, codebook(quant_type).unique(), blocksize)
    stored = dequantize_4bit(*quantize_4bit(WEIGHT, quant_type, blocksize))
    # Reciprocal or division: a value within an ulp of a middle may go either way, and both are equally near.
    assert ours.shape == WEIGHT.shape and (ours != stored).float().mean() < 1e-3
    assert relative_error(WEIGHT, ours) == pytest.approx(relative_error(WEIGHT, stored), rel=1e-4)


def test_equal_steps_err_by_a_twelfth_of_their_square():
    """Uniform values between two entries: the root mean square error is step / sqrt(12)."""
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x[0] = 1.0
    error = (decode_with(x, codebooks()["equal steps"], blocksize=len(x)) - x).square().mean().sqrt()
    assert float(error) == pytest.approx(1 / 7 / math.sqrt(12), rel=0.01)  # 100,000 draws: 0.2 %


def test_quotients_reach_one_in_each_block():
    blocks = quotients(WEIGHT, 64).flatten()[: 64 * 150].view(-1, 64)
    assert torch.equal(blocks.abs().amax(1), torch.ones(len(blocks)))
    assert torch.equal(quotients(torch.zeros(5)), torch.zeros(5))


def test_the_tables():
    codes = codebooks()
    assert {name: len(code) for name, code in codes.items()} == {
        "NF4": 16, "FP4": 15, "symmetric": 16, "equal steps": 15,
    }  # fmt: skip
    assert all((code.diff() > 0).all() and code.abs().max() == 1 for code in codes.values())
    assert [name for name, code in codes.items() if 0.0 not in code.tolist()] == ["symmetric"]


def test_larger_blocks_lose_more_and_nf4_less_than_fp4():
    errors = errors_by_blocksize(WEIGHT, codebooks(), (32, 256, 4096))
    assert all(values == sorted(values) for values in errors.values())
    assert all(a < b for a, b in zip(errors["NF4"], errors["FP4"], strict=True))


def test_shares_count_every_weight():
    shares = code_shares(torch.tensor([1.0, -1.0, 0.01, 0.0]), codebook("nf4"))
    assert shares[15] == 0.25 and shares[0] == 0.25 and shares[7] == 0.5 and sum(shares) == 1


def test_bits_of_a_weight():
    assert bits_per_weight() == 4.5 and round(bits_per_weight(double_quant=True), 3) == 4.127
    state = quantize_4bit(torch.randn(4096, 64), double_quant=True)[1]
    assert state.nested_absmax is not None
    stored = 4 + 8 * (state.absmax.nbytes + state.nested_absmax.nbytes) / (4096 * 64)
    assert stored == bits_per_weight(double_quant=True)


def test_entries_must_rise():
    with pytest.raises(ValueError, match="rising order"):
        decode_with(WEIGHT, codebook("fp4"))
