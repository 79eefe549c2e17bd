"""The bits of numbers, from integer arithmetic, against torch's types, numpy's halves and the book."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.numerics import FORMATS, bits, decode_bits, dtype_table, dtype_table_text
from minift.numerics.floats import FloatFormat

NARROW = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def patterns(name: str) -> Tensor:
    """Every number of a type of 8 or 16 bits, in the order of its pattern."""
    return torch.arange(2 ** FORMATS[name].width).to(INTEGER[FORMATS[name].width // 8]).view(getattr(torch, name))


def theirs_encode(values: Tensor, name: str) -> list[int]:
    """torch's cast of fp32 values, as unsigned patterns; beyond the range of e4m3fn NaN, whatever torch does there.

    Older versions make NaN of them, 2.13 makes 448; 464 is halfway to the 480 that would follow 448.
    """
    cast = values.to(getattr(torch, name))
    width = FORMATS[name].width
    theirs = cast.view(INTEGER[width // 8]).int() & (2**width - 1)
    if name == "float8_e4m3fn":
        beyond = values.abs() > 464
        assert ((theirs[beyond] & 0x7F) >= 0x7E).all()
        theirs[beyond] |= 0x7F
    return theirs.tolist()


def double_bits(x: float) -> int:
    return struct.unpack(">Q", struct.pack(">d", x))[0]


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NARROW)
def test_every_pattern_is_decoded_as_torch_does(name: str):
    fmt, theirs = FORMATS[name], patterns(name).double().tolist()
    for pattern, wanted in enumerate(theirs):
        ours = fmt.decode(pattern)
        assert math.isnan(ours) if math.isnan(wanted) else double_bits(ours) == double_bits(wanted), pattern


@pytest.mark.parametrize("name", NARROW)
def test_every_pattern_survives(name: str):
    """decode, then encode: the same pattern, with the quiet bit if it is a NaN (sign and payload stay)."""
    fmt = FORMATS[name]
    for pattern in range(2**fmt.width):
        value = fmt.decode(pattern)
        quiet = 2 ** (fmt.fraction_bits - 1) if math.isnan(value) else 0
        assert fmt.encode(value) == pattern | quiet


@settings(deadline=None, derandomize=True, max_examples=500)
@given(pattern=st.integers(0, 2**32 - 1))
def test_float32_patterns(pattern: int):
    wanted = struct.unpack(">f", struct.pack(">I", pattern))[0]
    ours = FORMATS["float32"].decode(pattern)
    if math.isnan(wanted):
        assert math.isnan(ours) and FORMATS["float32"].encode(ours) == pattern | 0x400000
    else:
        assert double_bits(ours) == double_bits(wanted) and FORMATS["float32"].encode(ours) == pattern


# --- encoding ---------------------------------------------------------------------------------------------------------


def around_halves(name: str) -> Tensor:
    """fp32: every midpoint of neighbours and what lies beside it, both signs; the point of overflow; every number.

    The midpoints of bf16's subnormals are fp32 subnormals, and the number beside the smallest midpoints is still one.
    """
    finite = patterns(name).double()
    finite = finite[finite.isfinite() & (finite >= 0)].sort().values
    beyond = 2 * finite[-1:] - finite[-2:-1]  # the number that would follow if there were no end
    rising = torch.cat([finite, beyond])
    middle = ((rising[:-1] + rising[1:]) / 2).float()
    assert torch.equal(middle.double(), (rising[:-1] + rising[1:]) / 2), "fp32 holds every midpoint"
    beside = [torch.nextafter(middle, torch.tensor(end)) for end in (0.0, math.inf)]
    positive = torch.cat([middle, *beside, finite.float(), beyond.float(), torch.tensor([3.4e38, math.inf])])
    return torch.cat([positive, -positive])


@pytest.mark.parametrize("name", NARROW)
def test_ties_and_their_neighbours_are_encoded_as_torch_does(name: str):
    values = around_halves(name)
    fmt = FORMATS[name]
    assert [fmt.encode(value) for value in values.tolist()] == theirs_encode(values, name)


@settings(deadline=None, derandomize=True, max_examples=1000)
@given(pattern=st.integers(0, 2**32 - 1), name=st.sampled_from(NARROW))
def test_any_fp32_is_encoded_as_torch_does(pattern: int, name: str):
    value = torch.tensor(pattern - 2**32 * (pattern >> 31), dtype=torch.int32).view(torch.float32)
    if not value.isnan():
        assert FORMATS[name].encode(value.item()) == theirs_encode(value[None], name)[0]


@settings(deadline=None, derandomize=True, max_examples=1000)
@given(x=st.floats(allow_nan=False))
def test_doubles_are_rounded_once(x: float):
    """numpy rounds a double straight to a half and a single; going through fp32 would round twice."""
    with np.errstate(over="ignore"):
        assert FORMATS["float16"].encode(x) == int(np.float64(x).astype(np.float16).view(np.uint16))
        assert FORMATS["float32"].encode(x) == int(np.float64(x).astype(np.float32).view(np.uint32))


def test_one_rounding_not_two():
    """Just above a tie of bf16: fp32 would round it to the tie, and the tie to the even number below."""
    x = 1.0 + 2.0**-8 + 2.0**-40
    assert bits(x, "bfloat16").value == 1.0 + 2.0**-7
    assert torch.tensor(x, dtype=torch.float32).bfloat16().item() == 1.0


@settings(deadline=None, derandomize=True, max_examples=300)
@given(x=st.floats(-500, 500), name=st.sampled_from(list(FORMATS)))
def test_nothing_is_nearer(x: float, name: str):
    """In exact fractions: neither neighbour of the result is nearer to x, and an equally near one is odd."""
    fmt = FORMATS[name]
    pattern = fmt.encode(abs(x))
    if pattern == fmt.overflow:  # e4m3fn ends at 448, halfway to 480
        assert name == "float8_e4m3fn" and abs(x) > 464
        return
    error = abs(Fraction(fmt.decode(pattern)) - Fraction(abs(x)))
    for neighbour in (pattern - 1, pattern + 1):
        if 0 <= neighbour < fmt.overflow:
            distance = abs(Fraction(fmt.decode(neighbour)) - Fraction(abs(x)))
            assert distance > error or (distance == error and neighbour % 2 == 1)
    assert fmt.encode(-abs(x)) == pattern | 1 << (fmt.width - 1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("x", [2**53 + 1, 2**64 + 2**40 + 1, 10**40, -(10**400), 3, 0])
def test_integers_are_exact(name: str, x: int):
    """An int is not turned into a double first; one of 400 digits overflows like any other large number."""
    fmt = FORMATS[name]
    if abs(x) > fmt.max * 2:
        assert fmt.encode(x) == fmt.overflow | (x < 0) << (fmt.width - 1)
    else:
        below = [n for n in (fmt.encode(abs(x)) - 1, fmt.encode(abs(x)), fmt.encode(abs(x)) + 1) if n >= 0]
        assert min(below, key=lambda n: (abs(Fraction(fmt.decode(n)) - abs(x)), n % 2)) == fmt.encode(abs(x))


def test_integer_above_a_tie_of_float32():
    """2^24 + 1 is a tie of fp32; 2^78 + 2^54 + 1 lies one above a tie, and a double would lose that one."""
    assert FORMATS["float32"].decode(FORMATS["float32"].encode(2**24 + 1)) == 2**24
    assert FORMATS["float32"].decode(FORMATS["float32"].encode(2**78 + 2**54 + 1)) == 2**78 + 2**55
    assert float(2**78 + 2**54 + 1) == 2**78 + 2**54


@pytest.mark.parametrize(
    ("name", "pattern"), [("float16", 0x7E00), ("bfloat16", 0x7FC0), ("float8_e4m3fn", 0x7F), ("float8_e5m2", 0x7E)]
)
def test_nan_keeps_sign_and_payload(name: str, pattern: int):
    fmt = FORMATS[name]
    sign, quiet = 1 << (fmt.width - 1), 1 << (fmt.fraction_bits - 1)
    assert fmt.encode(math.nan) == pattern
    assert fmt.encode(math.copysign(math.nan, -1.0)) == pattern | sign
    for payload in (1, quiet - 1, 2 * quiet - 1):
        nan = struct.unpack(">d", struct.pack(">Q", 0x7FF << 52 | payload << (52 - fmt.fraction_bits)))[0]
        assert fmt.encode(nan) == fmt.overflow | quiet | payload
    if name == "float16":  # the one that torch treats likewise
        signalling = torch.tensor([0x7F812345, 0x7FC12345, -0x7F0000], dtype=torch.int32)
        ours = [fmt.encode(x) for x in signalling.view(torch.float32).tolist()]
        assert ours == theirs_encode(signalling.view(torch.float32), name)


def test_infinity():
    for name in ("float32", "float16", "bfloat16", "float8_e5m2"):
        assert bits(math.inf, name).value == math.inf and bits(-math.inf, name).value == -math.inf
    assert math.isnan(bits(math.inf, "float8_e4m3fn").value)


def test_end_of_e4m3fn():
    """No infinity: 448 is the last number, a tie at 464 goes to the even pattern of 448, all above is NaN."""
    e4m3fn = FORMATS["float8_e4m3fn"]
    assert e4m3fn.max == 448 and e4m3fn.decode(0x7E) == 448
    assert [e4m3fn.encode(x) for x in (464, math.nextafter(464, 500), 480, -(10**9))] == [0x7E, 0x7F, 0x7F, 0xFF]


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_limits_equal_torch_finfo(name: str):
    fmt, theirs = FORMATS[name], torch.finfo(getattr(torch, name))
    assert fmt.width == theirs.bits
    assert fmt.max == theirs.max and fmt.epsilon == theirs.eps
    assert fmt.smallest_normal == theirs.smallest_normal
    zero, one = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    first = (zero + one).to(INTEGER[fmt.width // 8]).view(getattr(torch, name))
    assert fmt.smallest_subnormal == first.double().item()
    assert theirs.resolution == 10.0**-fmt.decimal_digits


@pytest.mark.parametrize("fmt", [FORMATS["float32"], FORMATS["float16"], FORMATS["bfloat16"]], ids=lambda fmt: fmt.name)
def test_decimal_digits_survive(fmt: FloatFormat):
    """Near the worst places, just above powers of two: that many digits come back, and one more somewhere does not."""
    digits = fmt.decimal_digits

    def returns(text: str, places: int) -> bool:
        return f"{fmt.decode(fmt.encode(float(text))):.{places - 1}e}" == text

    powers = [2.0**e for e in range(4 - fmt.bias, fmt.bias - 1, max(1, fmt.bias // 60))]
    values = [power * (1 + k / 10**digits) for power in powers for k in range(20)]
    assert all(returns(f"{x:.{digits - 1}e}", digits) for x in values)
    assert not all(returns(f"{x:.{digits}e}", digits + 1) for x in values)


def test_book_finfo():
    half, brain = FORMATS["float16"], FORMATS["bfloat16"]
    assert half.max == 65504
    assert f"{half.epsilon:.5e}" == "9.76562e-04"
    assert f"{half.smallest_subnormal:.2e}" == "5.96e-08"
    assert half.smallest_subnormal == half.smallest_normal * 2**-10 and f"{half.smallest_normal:.5e}" == "6.10352e-05"
    assert f"{brain.max:.5e}" == "3.38953e+38"
    assert brain.epsilon == 0.0078125
    assert f"{brain.smallest_normal:.5e}" == "1.17549e-38"


def test_book_five_ninths():
    assert f"{bits(0.555555582, 'float16').value:.9f}" == "0.555664062"
    assert f"{bits(0.555555582, 'bfloat16').value:.9f}" == "0.554687500"


def test_book_appendix_b():
    stored = bits(23.375, torch.bfloat16)
    assert (stored.sign, stored.exponent, stored.fraction) == ("0", "10000011", "0111011")
    assert int(stored.exponent, 2) - FORMATS["bfloat16"].bias == 4
    assert int(stored.fraction, 2) / 2**7 == 0.4609375
    assert stored.value == 23.375
    assert decode_bits("10000011", "uint8") == 131
    assert decode_bits("10000011", "int8") == -125


def test_dtype_table_has_a_row_for_each_type():
    rows = {row["name"]: row for row in dtype_table()}
    assert rows.keys() == FORMATS.keys()
    for name, row in rows.items():
        theirs = torch.finfo(getattr(torch, str(name)))
        assert row["bits"] == theirs.bits and row["max"] == theirs.max and row["smallest normal"] == theirs.tiny
        assert row["sign"] == 1 and row["exponent"] + row["fraction"] + 1 == theirs.bits  # pyright: ignore
        assert row["epsilon"] == theirs.eps == 2.0 ** -row["fraction"]  # pyright: ignore
    assert rows["float8_e5m2"]["smallest subnormal"] == 2.0**-16 and rows["bfloat16"]["decimal digits"] == 2


def test_dtype_table_text_is_aligned():
    lines = dtype_table_text().splitlines()
    assert len(lines) == 1 + len(FORMATS) and len({len(line) for line in lines}) == 1
    assert "smallest subnormal" in lines[0]
    assert "float16" in lines[2] and "65504" in lines[2] and "0.000976562" in lines[2] and "5.96046e-08" in lines[2]


# --- the picture ------------------------------------------------------------------------------------------------------


def test_picture_of_a_float():
    assert str(bits(23.375, "bfloat16")).splitlines() == [
        "bfloat16",
        "  0     10000011  0111011",
        "  sign  exponent  fraction",
        "  (-1)^0 x 2^(131 - 127) x (1 + 59/128) = 23.375",
    ]


def test_picture_of_an_integer():
    assert str(bits(-125, "int8")).splitlines()[1:] == [
        "  1     0000011",
        "  sign  integer",
        "  -128 x 1 + 3 = -125",
    ]
    assert str(bits(131, "uint8")).splitlines()[1:] == ["  10000011", "  integer", "  131 = 131"]


@settings(deadline=None, derandomize=True, max_examples=300)
@given(x=st.floats(-1000, 1000), name=st.sampled_from(list(FORMATS)))
def test_formula_in_the_picture_is_true(x: float, name: str):
    """Python computes what the last line says, subnormals and zeros included."""
    stored = bits(x, name)
    formula, equals, value = str(stored).splitlines()[-1].rpartition(" = ")
    if math.isnan(stored.value):
        assert not equals and "nan" in value
        return
    assert eval(formula.replace("^", "**").replace(" x ", " * ")) == float(value) == stored.value
    assert int(stored.sign + stored.exponent + stored.fraction, 2) == stored.pattern


@pytest.mark.parametrize("name", ["int8", "uint8"])
def test_every_integer(name: str):
    theirs = torch.arange(256).to(torch.uint8).view(getattr(torch, name)).tolist()
    for pattern, number in enumerate(theirs):
        stored = bits(number, name)
        assert stored.pattern == pattern and stored.value == number
        assert decode_bits(f"{pattern:08b}", name) == number
        assert eval(str(stored).splitlines()[-1].rpartition(" = ")[0].replace(" x ", " * ")) == number


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FORMATS, "int8", "uint8"])
def test_types_by_name_or_as_torch_dtype(name: str):
    assert bits(3, name) == bits(3, getattr(torch, name)) == bits(torch.tensor(3.0), name)


@pytest.mark.parametrize("dtype", ["float33", torch.int64, "", torch.float64])
def test_unknown_type_is_refused(dtype: str | torch.dtype):
    with pytest.raises(ValueError, match="unknown number type"):
        bits(1.0, dtype)
    with pytest.raises(ValueError, match="unknown number type"):
        decode_bits("0", dtype)


@pytest.mark.parametrize(
    ("x", "name"), [(128, "int8"), (-129, "int8"), (256, "uint8"), (-1, "uint8"), (1.5, "int8"), (math.nan, "uint8")]
)
def test_integer_that_does_not_fit_is_refused(x: float, name: str):
    with pytest.raises(ValueError, match="cannot hold"):
        bits(x, name)


def test_several_numbers_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\)"):
        bits(torch.ones(2), "float16")


@pytest.mark.parametrize("text", ["1000001", "100000111", "1000001x", "-1000001", ""])
def test_text_that_is_no_byte_is_refused(text: str):
    with pytest.raises(ValueError, match="8 characters"):
        decode_bits(text, "uint8")


def test_spaces_between_fields_are_ignored():
    assert decode_bits("0 10000011 0111011", "bfloat16") == decode_bits("0_10000011_0111011", "bfloat16") == 23.375


@pytest.mark.parametrize("pattern", [-1, 256])
def test_pattern_outside_the_type_is_refused(pattern: int):
    with pytest.raises(ValueError, match="0 to 255"):
        FORMATS["float8_e5m2"].decode(pattern)
