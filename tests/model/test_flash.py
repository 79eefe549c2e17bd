"""Attention by tiles, as a CPU does it: against the definition in float64, and what packing relies on."""

from collections.abc import Callable

import pytest
import torch
from exact_attention import LAYOUTS, assert_is_attention, by_definition, exact_attention, first_keys, visible_keys
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minift.model import flash
from minift.model.flash import flash_attention, last_queries

SMALL_TILE = 16
Four = tuple[Tensor, Tensor, Tensor, Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def small_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges of tiles within reach of small inputs."""
    monkeypatch.setattr(flash, "TILE", SMALL_TILE)


def random_inputs(
    heads: int, groups: int, s: int, t: int, e: int, dtype: torch.dtype = torch.float32, b: int = 2
) -> Four:
    """q, k, v and the gradient of the output."""
    shapes = [(b, heads, s, e), (b, groups, t, e), (b, groups, t, e), (b, heads, s, e)]
    q, k, v, grad = (torch.randn(shape).to(dtype) for shape in shapes)
    return q, k, v, grad


def forward_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    first: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> list[Tensor]:
    """out, dq, dk, dv."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = flash_attention(q, k, v, first, scale=scale, softcap=softcap)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


# Lengths around one tile and two; fewer queries than keys. Widths and groups go round.
LENGTHS = [(1, 1), (3, 3), (15, 15), (16, 16), (17, 17), (37, 37), (1, 37), (3, 16), (16, 33), (37, 60)]
CASES = [(*lengths, (8, 13, 64)[i % 3], 1 + i % 3) for i, lengths in enumerate(LENGTHS)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("s", "t", "e", "repeats"), CASES)
def test_is_attention(small_tile, s: int, t: int, e: int, repeats: int, layout: str, dtype: torch.dtype):
    q, k, v, grad = random_inputs(2 * repeats, 2, s, t, e, dtype)
    first = first_keys(layout, 2, s, t)
    ours = forward_backward(q, k, v, grad, first)
    assert [x.dtype for x in ours] == [dtype] * 4
    assert_is_attention(ours, exact_attention(q, k, v, grad, first, e**-0.5, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["causal", "window"])
@pytest.mark.parametrize(("scale", "softcap"), [(0.5, 0.0), (0.25, 2.0), (1.0, 50.0), (4.0, 0.5)])
def test_scale_and_soft_cap(small_tile, scale: float, softcap: float, layout: str, dtype: torch.dtype):
    q, k, v, grad = random_inputs(2, 1, 21, 37, 13, dtype)
    first = first_keys(layout, 2, 21, 37)
    ours = forward_backward(q, k, v, grad, first, scale=scale, softcap=softcap)
    assert_is_attention(ours, exact_attention(q, k, v, grad, first, scale, softcap))


@pytest.mark.parametrize("layout", ["causal", "window"])
def test_tile_of_the_size_in_use(layout: str):
    s, t = flash.TILE + 5, 2 * flash.TILE + 9
    q, k, v, grad = random_inputs(2, 1, s, t, 8, b=1)
    first = first_keys(layout, 1, s, t)
    assert_is_attention(
        forward_backward(q, k, v, grad, first), exact_attention(q, k, v, grad, first, 8**-0.5, 0.0)
    )  # fmt: skip


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("layout", ["causal", "window", "blind"])
def test_gradients_in_double_precision(monkeypatch: pytest.MonkeyPatch, layout: str, softcap: float):
    """By finite differences: independent of any formula for a gradient."""
    monkeypatch.setattr(flash, "TILE", 4)
    inputs = [x.requires_grad_() for x in random_inputs(4, 2, 5, 9, 3, torch.float64, b=1)[:3]]
    first = first_keys(layout, 1, 5, 9)
    assert torch.autograd.gradcheck(lambda q, k, v: flash_attention(q, k, v, first, softcap=softcap), inputs)


def test_a_query_that_sees_nothing_gives_zeros(small_tile):
    q, k, v, grad = random_inputs(2, 2, 40, 40, 8)
    first = first_keys("blind", 2, 40, 40)
    assert first is not None
    blind = first > torch.arange(40)
    assert 0 < blind.sum() < blind.numel()
    out, dq, dk, dv = forward_backward(q, k, v, grad, first)
    assert all(bool((x.transpose(1, 2)[blind] == 0).all()) for x in (out, dq))
    assert (out.transpose(1, 2)[~blind] != 0).all()
    assert all(bool(x.isfinite().all()) for x in (dk, dv))
    nobody = forward_backward(q, k, v, grad, torch.full_like(first, 2**40))
    assert all(bool((x == 0).all()) for x in nobody)


def test_a_score_of_zero_is_a_score():
    """All visible scores are 0: the plain mean of the visible values, off by its sum's rounding."""
    _, k, v, _ = random_inputs(1, 1, 20, 20, 8)
    out = flash_attention(torch.zeros(2, 1, 20, 8), k, v)
    mean = v.double().cumsum(2) / torch.arange(1, 21)[:, None]
    assert ((out - mean).abs() <= 24 * 2**-24 * v.abs().double().cumsum(2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_huge_scores_do_not_overflow(small_tile, sign: int, dtype: torch.dtype):
    """exp(1e4) has no fp32; scores around -1e4 are no different from scores around 0."""
    q, k, v, grad = random_inputs(2, 1, 40, 40, 16, dtype)
    q, k = sign * q.abs() * 100, k.abs() * 100
    exact = exact_attention(q, k, v, grad, None, 0.1, 0.0)
    assert (q.double() @ k.double().mT * 0.1).abs().max() > 1e4
    assert_is_attention(forward_backward(q, k, v, grad, scale=0.1), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.5, 1e4])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_documents_do_not_touch_each_other(small_tile, changed: int, factor: float, dtype: torch.dtype):
    """Whatever a document holds, no bit of another one's output or gradients depends on it."""
    document = torch.tensor([0] * 13 + [1] * 18 + [2] * 9)
    first = torch.tensor([0] * 13 + [13] * 18 + [31] * 9).expand(2, -1)
    inputs = random_inputs(4, 2, 40, 40, 8, dtype)
    before = forward_backward(*inputs, first)
    for x in inputs:
        x[:, :, document == changed] *= factor
    for old, new in zip(before, forward_backward(*inputs, first), strict=True):
        assert torch.equal(old[:, :, document != changed], new[:, :, document != changed])
        assert not torch.equal(old[:, :, document == changed], new[:, :, document == changed])


@pytest.mark.parametrize("layout", ["causal", "packed"])
def test_views(small_tile, layout: str):
    """[b, s, h, e] seen as [b, h, s, e], a cache longer than what is used, one key for all, columns in any order."""
    q, k, v, grad = random_inputs(4, 2, 21, 21, 8)
    first = first_keys(layout, 2, 21, 21)
    exact = exact_attention(q, k, v, grad, first, 8**-0.5, 0.0)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat([x, x], 2)[:, :, :21],
        lambda x: x.mT.contiguous().mT,
    ]
    for view in views:
        assert not any(view(x).is_contiguous() for x in (q, k, v, grad))
        assert_is_attention(forward_backward(view(q), view(k), view(v), view(grad), first), exact)
    assert flash_attention(views[0](q), k, v, first).stride() == views[0](q).stride()
    k = k[:, :1, :1].expand(-1, 2, 21, -1)
    exact = exact_attention(q, k, v, grad, first, 8**-0.5, 0.0)
    assert_is_attention(forward_backward(q, k, v, grad, first), exact)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize(("s", "t"), [(1, 1), (40, 40), (7, 40)])
def test_last_queries_is_the_inverse(s: int, t: int, layout: str):
    first = first_keys(layout, 3, s, t)
    assert first is not None
    last = last_queries(first, t)
    assert last.dtype == torch.int64 and last.shape == (3, t)
    for row in range(3):
        for key in range(t):
            seen_by = [query + t - s for query in range(s) if first[row, query] <= key]
            assert last[row, key] == max(seen_by, default=t - s - 1)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("layout", ["causal", "window"])
def test_memory_grows_with_length_not_its_square(layout: str):
    s = 2048
    q, k, v, grad = random_inputs(1, 1, s, s, 16, b=1)
    first = first_keys(layout, 1, s, s)
    last = None if first is None else last_queries(first, s)
    with LargestTensor() as largest:  # inside the operators: they count as one operation from outside
        out, lse = flash._flash_attention(q, k, v, first, last, 0.25, 0.0)
        flash._flash_attention_backward(grad, q, k, v, out, lse, first, last, 0.25, 0.0)
    assert flash.TILE**2 <= largest.elements <= max(flash.TILE**2, s * 16) < s * s / 16
    with LargestTensor() as naive:
        by_definition(q, k, v, first, 0.25, 0.0)
    assert naive.elements == s * s, "the count misses what it is looking for"


def test_tiles_that_nobody_sees_are_not_visited(small_tile):
    """A window of 5 (row 1: 6, cut once more) in 160 tokens: at most two tiles of keys for each tile of queries."""
    first = first_keys("window", 2, 160, 160)
    for start in range(0, 160, SMALL_TILE):
        rows = slice(start, start + SMALL_TILE)
        tiles = [keys for keys, _ in flash._visible_tiles(rows, 160, 160, first, torch.device("cpu"))]
        assert len(tiles) <= 2
        seen = torch.cat([torch.arange(160)[keys] for keys in tiles])
        needed = visible_keys(first, 160, 160, torch.device("cpu"))[:, 0, rows].any(1).any(0).nonzero()[:, 0]
        assert set(needed.tolist()) <= set(seen.tolist())


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("layout", ["causal", "window"])
def test_operators_are_registered_correctly(layout: str, softcap: float):
    q, k, v, grad = random_inputs(4, 2, 5, 7, 8)
    first = first_keys(layout, 2, 5, 7)
    last = None if first is None else last_queries(first, 7)
    form = (first, last, 0.3, softcap)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.minift.flash_attention.default, (*leaves, *form))
    out, lse = torch.ops.minift.flash_attention(q, k, v, *form)
    assert lse.dtype == torch.float32 and not lse.requires_grad
    score = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.3
    score = softcap * torch.tanh(score / softcap) if softcap else score
    exact = score.masked_fill(~visible_keys(first, 5, 7, q.device), -torch.inf).logsumexp(-1)
    assert ((lse - exact).abs() <= 2**-20).all()  # numbers below 4, of sums of 8 terms
    torch.library.opcheck(torch.ops.minift.flash_attention_backward.default, (grad, q, k, v, out, lse, *form))


def test_second_derivatives_are_refused():
    """Not wrong numbers: an error."""
    q, k, v, _ = random_inputs(1, 1, 4, 4, 8)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(flash_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (1, 2, 0, 8)])
def test_nothing_to_do(shape: tuple[int, ...]):
    q, k = torch.randn(shape), torch.randn(shape[0], 1, 3, 8)
    out, dq, dk, dv = forward_backward(q, k, k.clone(), torch.zeros(shape))
    assert out.shape == dq.shape == shape
    assert (dk == 0).all() and (dv == 0).all()


def test_wrong_arguments():
    q, k, v, _ = random_inputs(4, 2, 5, 7, 8)
    first, last = torch.zeros(2, 5, dtype=torch.int64), torch.full((2, 7), 6)
    wide = [torch.zeros(1, 1, 2, 257)] * 3
    for arguments, sentence in [
        ((q[:, :3], k, v), "3 query heads cannot be shared out among 2"),
        ((q, k[:, :, :4], v[:, :, :4]), "5 queries, but 4 keys"),
        ((*wide,), "width 257; supported: 1 to 256"),
        ((q[..., :0], k[..., :0], v[..., :0]), "width 0"),
        ((q, k, v[:, :, :6]), r"shapes \(2, 4, 5, 8\), \(2, 2, 7, 8\), \(2, 2, 6, 8\)"),
        ((q[0], k, v), "of shapes"),
        ((q[:1], k, v), "agree in batch"),
        ((q, k[..., :7], v[..., :7]), "head width"),
        ((q.long(), k.long(), v.long()), "torch.int64, torch.int64 and torch.int64"),
        ((q, k.bfloat16(), v), "must share one of"),
        ((q, k, v, first[:, :4]), r"first_bs is \(2, 4\) of torch.int64; needed: \(2, 5\)"),
        ((q, k, v, first.int()), "first_bs is .* of torch.int32"),
        ((q, k, v, first, last[:, :5]), r"last_bt is \(2, 5\)"),
        ((q, k, v, None, last), "last_bt without first_bs"),
        ((q, k, v, None, None, 1.0, -1.0), "soft cap of -1"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            flash_attention(*arguments)
