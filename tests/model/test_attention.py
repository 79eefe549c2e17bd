"""Attention, who may see whom, RMS normalization and the gate, each against its definition and against transformers.

Derived tolerances. A dot product of n terms in floating point with unit roundoff u is off by at most about n u times
the sum of the terms' magnitudes, in any order of addition; bounds below count roundings that way. Where the arithmetic
can be done in float64, it is, and nothing but 1e-12 is left.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from minift.model.attention import (
    ATTENTION,
    SharedPrefix,
    after_prefix,
    causal_mask,
    document_mask,
    eager,
    repeat_heads,
    sdpa,
)
from minift.model.layers import GateAndMultiply, NormalizeRMS, RMSNorm

llama = pytest.importorskip("transformers.models.llama.modeling_llama")


# --- who may see whom -------------------------------------------------------------------------------------------------


def drawn(mask_1st: Tensor) -> str:
    """A mask as the module docstring draws it."""
    return "\n".join("".join("x" if see else "." for see in row) for row in mask_1st[0].tolist())


def numbers(*documents: int) -> Tensor:
    return torch.tensor([documents])


@pytest.mark.parametrize(
    ("documents", "picture"),
    [
        ((0, 0, 0, 1, 1, -1), "x.....\nxx....\nxxx...\n...x..\n...xx.\n.....x"),  # the picture in the docstring
        ((0, 0, 0, 0), "x...\nxx..\nxxx.\nxxxx"),
        ((-1, -1, 0, 0), "x...\nxx..\n..x.\n..xx"),  # padded left
        ((0, 0, -1, -1), "x...\nxx..\n..x.\n..xx"),  # padded right
        ((7, 3, 3, 9), "x...\n.x..\n.xx.\n...x"),  # any numbers
        ((-1, -1), "x.\nxx"),  # nothing but padding
        ((0,), "x"),
    ],
)
def test_document_mask(documents: tuple[int, ...], picture: str):
    mask = document_mask(numbers(*documents), numbers(*documents))
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 1, len(documents), len(documents))
    assert drawn(mask[0]) == picture


def test_document_mask_of_the_last_queries():
    """With a cache the queries are the newest tokens of their row, the keys all of them."""
    keys = numbers(-1, 0, 0, 0, 0)
    assert drawn(document_mask(keys[:, 3:], keys)[0]) == ".xxx.\n.xxxx"
    assert drawn(document_mask(keys[:, 4:], keys)[0]) == ".xxxx"


def test_document_mask_of_every_row_is_its_own():
    documents = torch.tensor([[0, 0, 1], [-1, 0, 0]])
    mask = document_mask(documents, documents)
    assert [drawn(row) for row in mask] == ["x..\nxx.\n..x", "x..\n.x.\n.xx"]


@pytest.mark.parametrize(("s", "t", "picture"), [(3, 3, "x..\nxx.\nxxx"), (2, 4, "xxx.\nxxxx"), (1, 3, "xxx")])
def test_causal_mask(s: int, t: int, picture: str):
    mask = causal_mask(s, t, torch.device("cpu"))
    assert drawn(mask.unsqueeze(0)) == picture
    row = torch.zeros(1, t, dtype=torch.long)
    assert torch.equal(mask, document_mask(row[:, t - s :], row)[0, 0])


# --- the weighted mean ------------------------------------------------------------------------------------------------


def random_qkv(heads: int, groups: int, s: int, t: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> list:
    return [
        torch.randn(batch, n, length, 8, dtype=dtype, requires_grad=True)
        for n, length in ((heads, s), (groups, t), (groups, t))
    ]


def by_definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One query at a time, over the keys that it may see, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for b, h, s in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        seen = mask[b, h, s]
        group = h // (q.shape[1] // k.shape[1])  # consecutive query heads share one key/value head
        weight = (k[b, group, seen].double() @ q[b, h, s].double() / q.shape[-1] ** 0.5).softmax(0)
        out[b, h, s] = weight @ v[b, group, seen].double()
    return out


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (5, 1)])
@pytest.mark.parametrize(("s", "t"), [(1, 1), (9, 9), (1, 9), (4, 9)])
def test_attention_equals_its_definition(kernel: str, heads: int, groups: int, s: int, t: int):
    q, k, v = random_qkv(heads, groups, s, t)
    mask = causal_mask(s, t, torch.device("cpu"))
    exact = by_definition(q, k, v, mask)
    # Scores: 8 products and a scaling, magnitude c, off by 10 u c; exp carries that over as a relative error, the sum
    # of t and the mean of t values add 2 t u; with |v| as scale.
    u, c = 2**-24, (q.norm(dim=-1).max() * k.norm(dim=-1).max() / 8**0.5).item()
    bound = (2 * 10 * c + 2 * t + 10) * u * v.abs().max().item()
    assert (ATTENTION[kernel](q, k, v, mask).double() - exact).abs().max() <= bound
    if s in (1, t):  # None is causal
        assert (ATTENTION[kernel](q, k, v, None).double() - exact).abs().max() <= bound


# The same bound for the sizes below: c < 12 (|q| and |k| below 5.8), t < 15, |v| < 4.
FP32 = (20 * 12 + 2 * 15 + 10) * 2**-24 * 4


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize(
    "documents",
    [
        [[0, 0, 0, 1, 1, -1], [0, 1, 1, 1, 1, 2]],
        [[-1, -1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        [[0, 0, -1, -1, -1, -1], [-1, -1, -1, -1, -1, -1]],
    ],
    ids=["packed", "padded left", "padded right"],
)
def test_attention_within_documents(kernel: str, documents: list[list[int]]):
    documents_bs = torch.tensor(documents)
    q, k, v = random_qkv(4, 2, 6, 6)
    ours = ATTENTION[kernel](q, k, v, document_mask(documents_bs, documents_bs))
    for row, numbering in enumerate(documents):
        for number in set(numbering):  # each document alone, cut out of its row
            where = torch.tensor(numbering) == number
            part_q, part_k, part_v = (x[row : row + 1, :, where] for x in (q, k, v))
            causal = causal_mask(int(where.sum()), int(where.sum()), torch.device("cpu"))
            exact = by_definition(part_q, part_k, part_v, causal)
            assert (ours[row : row + 1, :, where].double() - exact).abs().max() <= FP32


def their_eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    from types import SimpleNamespace

    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    added = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    return llama.eager_attention_forward(module, q, k, v, added, scaling=q.shape[-1] ** -0.5)[0].transpose(1, 2)


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("documents", [[[0, 0, 0, 1, 1, 2, 2]], [[0] * 7, [-1, -1, 0, 0, 0, 0, 0]]])
def test_gradients_equal_autograds(
    kernel: str, heads: int, groups: int, documents: list[list[int]], dtype: torch.dtype
):
    """The definition in float64 is exact; transformers' eager steps, left to autograd in the same dtype, say how far
    off rounding may be. Another order of the same operations may be off by twice that."""
    documents_bs = torch.tensor(documents)
    mask = document_mask(documents_bs, documents_bs)
    q, k, v = random_qkv(heads, groups, 7, 7, dtype, batch=len(documents))
    weight = torch.randn(q.shape, dtype=dtype)
    exact, theirs, ours = (
        torch.autograd.grad((attend(q, k, v, mask) * weight).sum(), (q, k, v))
        for attend in (by_definition, their_eager, ATTENTION[kernel])
    )
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype == dtype
        rounding = (other.double() - true.double()).abs().max().item()
        # `true` was itself rounded to the dtype when it reached q, k and v: half a unit in the last place.
        unit = torch.finfo(dtype).eps * true.abs().max().item()
        assert rounding < 16 * unit  # the reference is sound
        assert (mine.double() - true.double()).abs().max().item() <= 2 * rounding + unit


def test_eager_keeps_its_inputs_and_the_probabilities():
    """Left to autograd, the probabilities in fp32 and the repeated keys and values would be kept, too."""
    qkv = random_qkv(4, 2, 7, 7, torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        eager(qkv[0], qkv[1], qkv[2], None)
    assert sorted(t.numel() for t in saved) == sorted([*(x.numel() for x in qkv), 2 * 4 * 7 * 7])
    assert {t.dtype for t in saved} == {torch.bfloat16}


@pytest.mark.parametrize("kernel", ATTENTION)
def test_padding_is_finite_forward_and_backward(kernel: str):
    """A row that is nothing but padding, and padding on either side: no NaN may reach a weight."""
    documents = torch.tensor([[-1, -1, -1, -1], [-1, -1, 0, 0], [0, 0, -1, -1]])
    q, k, v = random_qkv(4, 2, 4, 4, batch=3)
    out = ATTENTION[kernel](q, k, v, document_mask(documents, documents))
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("kernel", ATTENTION)
def test_tokens_that_may_not_be_seen_change_no_bit(kernel: str):
    documents = torch.tensor([[0, 0, 1, 1, -1]])
    q, k, v = (x.detach() for x in random_qkv(4, 2, 5, 5, batch=1))
    mask = document_mask(documents, documents)
    before = ATTENTION[kernel](q, k, v, mask)
    for x in (k, v):
        x[:, :, [0, 1, 4]] = 1e4
    assert torch.equal(ATTENTION[kernel](q, k, v, mask)[:, :, 2:4], before[:, :, 2:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_kernels_equal_those_of_transformers(groups: int, dtype: torch.dtype):
    """The same casts in the same order: equal bit for bit, whatever the dtype."""
    from types import SimpleNamespace

    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, k, v = random_qkv(4, groups, 7, 7, dtype)
    module = SimpleNamespace(num_key_value_groups=4 // groups, training=False, is_causal=True)
    mask = causal_mask(7, 7, torch.device("cpu"))
    for given in (mask, None):
        assert torch.equal(eager(q, k, v, given), their_eager(q, k, v, mask[None, None]))
    for given in (mask[None, None], None):
        theirs, _ = sdpa_attention_forward(module, q, k, v, given, scaling=8**-0.5)  # pyright: ignore[reportArgumentType]
        assert torch.equal(sdpa(q, k, v, given).transpose(1, 2), theirs)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (9, 3), (5, 1)])
def test_heads_are_repeated_as_in_transformers(heads: int, groups: int):
    x = torch.randn(2, groups, 3, 4)
    assert torch.equal(repeat_heads(x, heads), llama.repeat_kv(x, heads // groups))


# --- a shared prefix --------------------------------------------------------------------------------------------------


def rows_separately(attend: Callable, prefix: int, rows: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The prefix alone, then each row with the prefix in front of it; the rows' own outputs one behind the other."""
    outputs = [attend(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], None)]
    start = prefix
    for length in rows:
        whole = [torch.cat([x[:, :, :prefix], x[:, :, start : start + length]], dim=2) for x in (q, k, v)]
        outputs.append(attend(*whole, None)[:, :, prefix:])
        start += length
    return torch.cat(outputs, dim=2)


PREFIXES = [(5, (3, 3)), (5, (1, 4, 2)), (1, (6, 1)), (7, (2,)), (3, (1, 1, 1))]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("prefix", "rows"), PREFIXES)
def test_after_prefix_equals_the_rows_separately(prefix: int, rows: tuple[int, ...], groups: int):
    n = prefix + sum(rows)
    qkv = random_qkv(4, groups, n, n, torch.float64, batch=1)
    shared = SharedPrefix(prefix, rows)
    ours = after_prefix(sdpa, shared, shared.slots(torch.device("cpu")), None, *qkv)
    theirs = rows_separately(sdpa, prefix, rows, *qkv)
    assert ours.shape == theirs.shape == (1, 4, n, 8)
    assert (ours - theirs).abs().max() <= 1e-12
    weight = torch.randn(ours.shape, dtype=torch.float64)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), qkv), torch.autograd.grad((theirs * weight).sum(), qkv), strict=True
    ):
        assert (mine - other).abs().max() <= 1e-12


@pytest.mark.parametrize(("prefix", "rows"), PREFIXES)
def test_after_prefix_written_out(prefix: int, rows: tuple[int, ...]):
    """`eager` takes its softmax in fp32, so it is compared at fp32's precision."""
    n = prefix + sum(rows)
    qkv = random_qkv(4, 2, n, n, batch=1)
    shared = SharedPrefix(prefix, rows)
    ours = after_prefix(eager, shared, shared.slots(torch.device("cpu")), None, *qkv)
    theirs = rows_separately(eager, prefix, rows, *qkv)
    assert (ours - theirs).abs().max() <= FP32


@pytest.mark.parametrize(
    ("rows", "expected"), [((2, 3, 1), [0, 1, 3, 4, 5, 6]), ((4,), [0, 1, 2, 3]), ((1, 1), [0, 1])]
)
def test_slots(rows: tuple[int, ...], expected: list[int]):
    assert SharedPrefix(9, rows).slots(torch.device("cpu")).tolist() == expected


# --- RMS normalization ------------------------------------------------------------------------------------------------


def normalized(x: Tensor, eps: float) -> Tensor:
    """The formula, for autograd."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (2, 3, 65), (2, 5, 576)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_gradient_equals_autograds_in_float64(shape: tuple[int, ...], scale: float, eps: float):
    """Ours in fp32 against autograd in float64 on the same numbers.

    With d terms in each mean, r is off by (d/2 + 4) u, n by (d/2 + 5) u; the mean of dn n adds d u of the mean of
    |dn n|, and a few roundings more: (2 d + 20) u of r (|dn| + |n| mean |dn n|) covers all of them.
    """
    x, dn = scale * torch.randn(shape), torch.randn(shape)
    ours_x, exact_x = x.clone().requires_grad_(), x.double().requires_grad_()
    ours, exact = NormalizeRMS.apply(ours_x, eps), normalized(exact_x, eps)
    (grad,) = torch.autograd.grad(ours, ours_x, dn)
    (exact_grad,) = torch.autograd.grad(exact, exact_x, dn.double())
    assert grad.dtype == torch.float32
    u = (2 * shape[-1] + 20) * 2**-24
    with torch.no_grad():
        r = (exact_x.square().mean(-1, keepdim=True) + eps).rsqrt()
        assert ((ours - exact).abs() <= u * exact.abs()).all()
        size = r * (dn.abs() + exact.abs() * (dn * exact).abs().mean(-1, keepdim=True))
        assert ((grad - exact_grad).abs() <= u * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_in_16_bits_is_fp32_rounded_once(dtype: torch.dtype):
    x, dn = torch.randn(4, 65, dtype=dtype), torch.randn(4, 65, dtype=dtype)
    half, full = x.clone().requires_grad_(), x.float().requires_grad_()
    ours, expected = NormalizeRMS.apply(half, 1e-5), NormalizeRMS.apply(full, 1e-5)
    assert torch.equal(ours, expected.to(dtype))
    (grad,) = torch.autograd.grad(ours, half, dn)
    (expected_grad,) = torch.autograd.grad(expected, full, dn.float())
    assert torch.equal(grad, expected_grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_transformers(dtype: torch.dtype):
    ours, theirs = RMSNorm(65, 1e-5).to(dtype), llama.LlamaRMSNorm(65, 1e-5).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(torch.rand(65) + 0.5)
        theirs.weight.copy_(ours.weight)
    x = torch.randn(2, 7, 65, dtype=dtype)
    assert torch.equal(ours(x), theirs(x))


def test_rms_of_zeros_is_zero_and_has_a_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    y = NormalizeRMS.apply(x, 1e-4)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros(2, 8))
    assert torch.allclose(grad, torch.full((2, 8), 100.0))  # 1 / sqrt(eps)


def test_rms_keeps_one_number_a_row_for_the_backward_pass():
    """Left to autograd, fp32 copies of x would be kept: this is why NormalizeRMS exists."""
    x = torch.randn(16, 64, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        NormalizeRMS.apply(x, 1e-5)
    assert sorted(t.numel() for t in saved) == [16, 16 * 64]
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


# --- the gate of the MLP ----------------------------------------------------------------------------------------------


def test_gate_gradient_is_that_of_finite_differences():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(GateAndMultiply.apply, (gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_equals_autograd(dtype: torch.dtype):
    """The same operations in the same order, only less is kept for them: equal bit for bit."""
    gate, up = (torch.randn(4, 65, dtype=dtype, requires_grad=True) for _ in range(2))
    dy = torch.randn(4, 65, dtype=dtype)
    ours, theirs = GateAndMultiply.apply(gate, up), torch.nn.functional.silu(gate) * up
    assert torch.equal(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, (gate, up), dy), torch.autograd.grad(theirs, (gate, up), dy), strict=True
    ):
        assert torch.equal(mine, other)


def test_gate_keeps_its_two_inputs():
    gate, up = (torch.randn(4, 64, requires_grad=True) for _ in range(2))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        GateAndMultiply.apply(gate, up)
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}
