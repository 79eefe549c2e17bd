"""Attention and who may see whom, against the definition and against transformers.

Derived tolerances. A dot product of n terms in floating point with unit roundoff u is off by at most about n u times
the sum of the terms' magnitudes, in any order of addition; bounds below count roundings that way. Where the arithmetic
can be done in float64, it is, and nothing but 1e-12 is left.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.model.attention import (
    ATTENTION,
    SharedPrefix,
    Visible,
    after_prefix,
    attention_steps,
    eager,
    repeat_heads,
    sdpa,
)

llama = pytest.importorskip("transformers.models.llama.modeling_llama")
gemma2 = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
CAPPING = ["eager", "flash"]


# --- who may see whom -------------------------------------------------------------------------------------------------


def drawn(mask_1st: Tensor) -> str:
    """A mask as the module docstring draws it."""
    return "\n".join("".join("x" if see else "." for see in row) for row in mask_1st[0].tolist())


def numbers(*documents: int) -> Tensor:
    return torch.tensor([documents])


def seen_by_rule(documents: Sequence[int], queries: int, window: int | None = None) -> Tensor:
    """The rule in words, a pair at a time, bool [s, t]: a query sees itself and what came before, no further back than
    its window, if every token from there to itself has its number."""
    t = len(documents)
    return torch.tensor(
        [
            [j <= i and set(documents[j : i + 1]) == {documents[i]} and i - j < (window or t) for j in range(t)]
            for i in range(t - queries, t)
        ]
    )


@pytest.mark.parametrize(
    ("documents", "picture"),
    [
        ((0, 0, 0, 1, 1, -1), "x.....\nxx....\nxxx...\n...x..\n...xx.\n.....x"),  # the picture in the docstring
        ((0, 0, 0, 0), "x...\nxx..\nxxx.\nxxxx"),
        ((-1, -1, 0, 0), "x...\nxx..\n..x.\n..xx"),  # padded left
        ((0, 0, -1, -1), "x...\nxx..\n..x.\n..xx"),  # padded right
        ((7, 3, 3, 9), "x...\n.x..\n.xx.\n...x"),  # any numbers
        ((0, 1, 0, 0), "x...\n.x..\n..x.\n..xx"),  # a number that comes back is another document
        ((-1, 0, -1), "x..\n.x.\n..x"),
        ((-1, -1), "x.\nxx"),  # nothing but padding
        ((0,), "x"),
    ],
)
def test_documents(documents: tuple[int, ...], picture: str):
    visible = Visible.of_documents(numbers(*documents), len(documents))
    assert visible.mask.dtype == torch.bool
    assert visible.mask.shape == (1, 1, len(documents), len(documents))
    assert drawn(visible.mask[0]) == picture


@pytest.mark.parametrize(
    ("window", "picture"),
    [
        (1, "x....\n.x...\n..x..\n...x.\n....x"),
        (2, "x....\nxx...\n.xx..\n...x.\n...xx"),
        (3, "x....\nxx...\nxxx..\n...x.\n...xx"),
        (99, "x....\nxx...\nxxx..\n...x.\n...xx"),
    ],
)
def test_documents_with_a_window(window: int, picture: str):
    """A window counts the query itself, and never reaches into another document."""
    visible = Visible.of_documents(numbers(0, 0, 0, 1, 1), 5, window)
    assert drawn(visible.mask[0]) == picture
    assert drawn(Visible.of_documents(numbers(0, 0, 0, 1, 1), 2, window).mask[0]) == "\n".join(picture.split("\n")[3:])


def test_documents_of_the_last_queries():
    """With a cache the queries are the newest tokens of their row, the keys all of them."""
    keys = numbers(-1, 0, 0, 0, 0)
    assert drawn(Visible.of_documents(keys, 2).mask[0]) == ".xxx.\n.xxxx"
    assert drawn(Visible.of_documents(keys, 1).mask[0]) == ".xxxx"


def test_documents_of_every_row_are_its_own():
    mask = Visible.of_documents(torch.tensor([[0, 0, 1], [-1, 0, 0]]), 3).mask
    assert mask.shape == (2, 1, 3, 3)
    assert [drawn(row) for row in mask] == ["x..\nxx.\n..x", "x..\n.x.\n.xx"]


@pytest.mark.parametrize(
    ("s", "t", "window", "picture"),
    [
        (3, 3, None, "x..\nxx.\nxxx"),
        (2, 4, None, "xxx.\nxxxx"),
        (1, 3, None, "xxx"),
        (3, 3, 2, "x..\nxx.\n.xx"),
        (2, 4, 2, ".xx.\n..xx"),
        (1, 3, 1, "..x"),
        (2, 3, 3, "xx.\nxxx"),
        (2, 3, 9, "xx.\nxxx"),
    ],
)
def test_within(s: int, t: int, window: int | None, picture: str):
    visible = Visible.within(s, t, window, torch.device("cpu"))
    assert visible.mask.shape == (1, 1, s, t)
    assert drawn(visible.mask[0]) == picture


def assert_inverse(visible: Visible, seen_bst: Tensor) -> None:
    """`last_bt` is the last query that sees a key; of a key that nobody sees it lies before the key and the queries."""
    t = visible.keys
    assert visible.last_bt.shape == (seen_bst.shape[0], t) and visible.last_bt.dtype == torch.int64
    for last_t, seen_st in zip(visible.last_bt.tolist(), seen_bst, strict=True):
        for key, last in enumerate(last_t):
            queries = seen_st[:, key].nonzero().flatten().tolist()
            if queries:
                assert last == queries[-1] + t - seen_st.shape[0]
            else:
                assert last < max(key, t - seen_st.shape[0])


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_documents_by_the_rule(data: st.DataObject):
    t = data.draw(st.integers(1, 12))
    rows = data.draw(st.lists(st.lists(st.integers(-1, 2), min_size=t, max_size=t), min_size=1, max_size=3))
    s, window = data.draw(st.integers(1, t)), data.draw(st.none() | st.integers(1, t + 1))
    visible = Visible.of_documents(torch.tensor(rows), s, window)
    seen = torch.stack([seen_by_rule(row, s, window) for row in rows])
    assert torch.equal(visible.mask[:, 0], seen)
    assert_inverse(visible, seen)
    row = seen_by_rule([0] * t, s, window)
    assert torch.equal(Visible.within(s, t, window, torch.device("cpu")).mask[0, 0], row)
    assert seen.diagonal(t - s, 1, 2).all() and visible.sees_itself


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_any_first_keys_by_the_rule(data: st.DataObject):
    """Also those beyond the query itself, which then sees nothing."""
    t = data.draw(st.integers(1, 9))
    s = data.draw(st.integers(1, t))
    first = sorted(data.draw(st.lists(st.integers(0, t), min_size=s, max_size=s)))
    visible = Visible(torch.tensor([first]), t)
    seen = torch.tensor([[first[i] <= j <= i + t - s for j in range(t)] for i in range(s)])
    assert torch.equal(visible.mask[0, 0], seen)
    assert_inverse(visible, seen.unsqueeze(0))
    cleared = visible.clear_blind(torch.ones(1, 2, s, 3))
    assert torch.equal(cleared, seen.any(1).float()[None, None, :, None].expand(1, 2, s, 3))


# --- the weighted mean ------------------------------------------------------------------------------------------------


QKV = tuple[Tensor, Tensor, Tensor]


def random_qkv(heads: int, groups: int, s: int, t: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> QKV:
    def random(n: int, length: int) -> Tensor:
        return torch.randn(batch, n, length, 8, dtype=dtype, requires_grad=True)

    return random(heads, s), random(groups, t), random(groups, t)


def random_for(seen: Tensor, heads: int, groups: int, dtype: torch.dtype = torch.float32) -> QKV:
    return random_qkv(heads, groups, seen.shape[2], seen.shape[3], dtype)


def of_heads(x: Tensor, heads: int) -> Tensor:
    """The key/value head of each query head, in float64: consecutive heads share one."""
    return x[:, [h // (heads // x.shape[1]) for h in range(heads)]].double()


def weights_by_definition(q: Tensor, k: Tensor, seen: Tensor, scale: float | None, softcap: float) -> Tensor:
    """One query at a time, over the keys that it may see, in float64 [b, h, s, t]."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    (b, h, s), t = q.shape[:3], k.shape[2]
    seen, q, k = seen.expand(b, h, s, t), q.double(), of_heads(k, h)
    rows = []
    for where in torch.cartesian_prod(*map(torch.arange, (b, h, s))).unbind():
        row, head, query = where.tolist()
        visible = seen[row, head, query]
        scores = k[row, head, visible] @ q[row, head, query] * factor
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        rows.append(torch.zeros(t, dtype=torch.float64).masked_scatter(visible, scores.softmax(0)))
    return torch.stack(rows).view(b, h, s, t)


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None, softcap: float = 0.0
) -> Tensor:
    """The weighted mean in float64; a mean over nothing is 0."""
    return weights_by_definition(q, k, seen, scale, softcap) @ of_heads(v, q.shape[1])


def error_bound(kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    """Scores: 8 products and a scaling, of magnitude c, off by 10 u c; a soft cap has a slope of at most 1 and adds a
    division, a tanh (2 u) and a product, 4 u c; exp carries that over as a relative error, to numerator and sum; the
    sum of t terms and the mean of t values add 2 t u; with |v| as scale.
    """
    u = 2**-53 if q.dtype == torch.float64 else 2**-24
    c = scale * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()
    return (2 * 14 * c + 2 * k.shape[2] + 10) * u * v.abs().max().item()


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (5, 1)])
@pytest.mark.parametrize(("s", "t"), [(1, 1), (9, 9), (1, 9), (4, 9), (8, 9)])
def test_attention_equals_its_definition(kernel: str, heads: int, groups: int, s: int, t: int, dtype: torch.dtype):
    q, k, v = random_qkv(heads, groups, s, t, dtype)
    for scale in (None, 0.11, 1.0):
        exact = by_definition(q, k, v, seen_by_rule([0] * t, s), scale)
        bound = error_bound(kernel, q, k, v, scale or 8**-0.5)
        for visible in (None, Visible.within(s, t, None, q.device)):  # None is causal, aligned to the end
            ours = ATTENTION[kernel](q, k, v, visible, scale, 0.0)
            assert ours.dtype == dtype and ours.shape == q.shape
            assert (ours.double() - exact).abs().max() <= bound


# Documents of two rows, number of queries, window.
PLACES = {
    "whole": ([[0] * 7, [3] * 7], 7, None),
    "packed": ([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 0, 0]], 7, None),
    "padded": ([[-1, -1, 0, 0, 0, 0, 0], [0, 0, 0, -1, -1, -1, -1]], 7, None),
    "window": ([[0] * 7, [0, 0, 0, 0, 0, 1, 1]], 7, 3),
    "last": ([[-1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]], 3, None),
    "last, window": ([[0] * 7, [-1, 0, 0, 0, 0, 0, 1]], 4, 2),
}


def at(place: str) -> tuple[Visible, Tensor]:
    """Who sees whom as the library has it, and by the rule: bool [b, 1, s, t]."""
    rows, s, window = PLACES[place]
    seen = torch.stack([seen_by_rule(row, s, window) for row in rows]).unsqueeze(1)
    return Visible.of_documents(torch.tensor(rows), s, window), seen


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1)])
@pytest.mark.parametrize("place", PLACES)
def test_attention_of_a_place_equals_its_definition(kernel: str, place: str, heads: int, groups: int, softcap: float):
    if softcap and kernel not in CAPPING:
        return
    visible, seen = at(place)
    q, k, v = random_for(seen, heads, groups)
    for scale in (None, 0.7):
        exact = by_definition(q, k, v, seen, scale, softcap)
        ours = ATTENTION[kernel](q, k, v, visible, scale, softcap)
        assert (ours.double() - exact).abs().max() <= error_bound(kernel, q, k, v, scale or 8**-0.5)


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize("place", ["packed", "padded"])
def test_a_document_is_as_if_alone(kernel: str, place: str):
    visible, _ = at(place)
    q, k, v = random_qkv(4, 2, 7, 7)
    ours = ATTENTION[kernel](q, k, v, visible, None, 0.0)
    for row, numbering in enumerate(PLACES[place][0]):
        begins = [i for i in range(7) if i == 0 or numbering[i] != numbering[i - 1]]
        for begin, end in zip(begins, [*begins[1:], 7], strict=True):  # cut out of its row
            part_q, part_k, part_v = (x[row : row + 1, :, begin:end] for x in (q, k, v))
            exact = by_definition(part_q, part_k, part_v, torch.ones(end - begin, end - begin).tril().bool())
            bound = error_bound(kernel, q, k, v, 8**-0.5)
            assert (ours[row : row + 1, :, begin:end].double() - exact).abs().max() <= bound


@pytest.mark.parametrize("kernel", ATTENTION)
def test_rows_longer_than_a_tile(kernel: str):
    """300 queries of 600 tokens; documents begin and end within tiles, at their edges and across them."""
    documents = [0] * 255 + [1] + [2] * 44 + [3] * 212 + [4] * 88
    visible = Visible.of_documents(numbers(*documents), 300, 100)
    q, k, v = random_qkv(2, 1, 300, 600, batch=1)
    exact = by_definition(q, k, v, seen_by_rule(documents, 300, 100))
    assert (ATTENTION[kernel](q, k, v, visible, None, 0.0).double() - exact).abs().max() <= error_bound(
        kernel, q, k, v, 8**-0.5
    )


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize("level", [0.0, -256.0, 256.0])
def test_scores_of_any_level_count(kernel: str, level: float):
    """Equal scores, a mean of the values seen: also if they are exactly 0, or so low that exp(score) is 0 in fp32."""
    visible, seen = at("packed")
    v = torch.randn(2, 1, 7, 8)
    q, k = torch.ones(2, 1, 7, 8), torch.full((2, 1, 7, 8), level / 8)
    weight = seen.double() / seen.sum(-1, keepdim=True)
    # The weights of equal scores, and a mean of at most 7 values.
    bound = (2 * 7 + 10) * 2**-24 * v.abs().max()
    assert (ATTENTION[kernel](q, k, v, visible, 1.0, 0.0).double() - weight @ v.double()).abs().max() <= bound


def test_sdpa_refuses_to_cap():
    q, k, v = random_qkv(4, 2, 3, 3)
    with pytest.raises(ValueError, match=r"sdpa cannot cap scores .*choose attention 'eager' or 'flash'"):
        sdpa(q, k, v, None, None, 5.0)


# --- gradients --------------------------------------------------------------------------------------------------------


def their_eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, softcap: float = 0.0
) -> Tensor:
    """transformers' eager steps: Gemma 2's, which are Llama's and a cap."""
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    added = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, _ = gemma2.eager_attention_forward(module, q, k, v, added, 0.0, scale, softcap or None)
    if not softcap:
        assert torch.equal(out, llama.eager_attention_forward(module, q, k, v, added, scaling=scale)[0])
    return out.transpose(1, 2)


def cancellation(qkv: QKV, weight: Tensor, seen: Tensor, scale: float, softcap: float) -> list[Tensor]:
    """What the fused kernels may be off in addition, for each of q, k and v.

    They take the row sum of p * dp as dout . out, from the rounded output: 1 u, and 8 u for either sum of 8 products
    and 1 for their difference, of |dout| |v|. Where the difference should be 0 (a single key is seen), this is all
    there is. It goes into ds with the factor p, and from there through k to dq and through q to dk.
    """
    q, k, v = qkv
    heads, groups = q.shape[1], k.shape[1]
    u = torch.finfo(q.dtype).eps / 2
    size = weight.double().norm(dim=-1, keepdim=True) * of_heads(v, heads).norm(dim=-1).amax()
    ds = weights_by_definition(q, k, seen, scale, softcap) * size * 18 * u
    dk = (ds.transpose(2, 3) @ q.double().abs()).unflatten(1, (groups, -1)).sum(2)
    return [scale * ds @ of_heads(k, heads).abs(), scale * dk, torch.zeros_like(dk)]


def assert_gradients_close(
    kernel: str, qkv: QKV, visible: Visible | None, seen: Tensor, scale: float, softcap: float
) -> None:
    """The definition in float64 is exact; transformers' eager steps, left to autograd in the same dtype, say how far
    off rounding may be. Another order of the same operations may be off by twice that, and see `cancellation`."""
    q, _, _ = qkv
    weight = torch.randn(q.shape, dtype=q.dtype)
    blind = ~seen.any(-1, keepdim=True)
    exact, theirs, ours = (
        torch.autograd.grad((out * weight).sum(), qkv)
        for out in (
            by_definition(*qkv, seen, scale, softcap),
            their_eager(*qkv, seen, scale, softcap).masked_fill(blind, 0),
            ATTENTION[kernel](*qkv, visible, scale, softcap),
        )
    )
    with torch.no_grad():
        fused = cancellation(qkv, weight, seen, scale, softcap) if kernel != "eager" else (0, 0, 0)
    for mine, other, true, more in zip(ours, theirs, exact, fused, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype == q.dtype
        rounding = (other.double() - true.double()).abs().max().item()
        # `true` was itself rounded to the dtype when it reached q, k and v: half a unit in the last place.
        unit = torch.finfo(q.dtype).eps * true.abs().max().item()
        assert rounding < 16 * unit  # the reference is sound
        assert ((mine.double() - true.double()).abs() <= 2 * rounding + unit + more).all()


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("place", PLACES)
def test_gradients_equal_autograds(kernel: str, heads: int, groups: int, place: str, dtype: torch.dtype):
    visible, seen = at(place)
    qkv = random_for(seen, heads, groups, dtype)
    assert_gradients_close(kernel, qkv, visible, seen, 8**-0.5, 0.0)


@pytest.mark.parametrize("kernel", CAPPING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.5, 2.0, 50.0])
@pytest.mark.parametrize("place", ["packed", "last, window"])
def test_capped_gradients_equal_autograds(kernel: str, place: str, softcap: float, dtype: torch.dtype):
    visible, seen = at(place)
    assert_gradients_close(kernel, random_for(seen, 6, 2, dtype), visible, seen, 0.7, softcap)


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize(("s", "t"), [(7, 7), (3, 7), (1, 7)])
def test_gradients_without_visible_equal_autograds(kernel: str, s: int, t: int):
    seen = seen_by_rule([0] * t, s)[None, None]
    assert_gradients_close(kernel, random_qkv(4, 2, s, t), None, seen, 0.7, 0.0)


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("place", PLACES)
def test_gradients_in_float64(kernel: str, place: str, softcap: float):
    if softcap and kernel not in CAPPING:
        return
    visible, seen = at(place)
    qkv = random_for(seen, 4, 2, torch.float64)
    weight = torch.randn(qkv[0].shape, dtype=torch.float64)
    exact, ours = (
        torch.autograd.grad((out * weight).sum(), qkv)
        for out in (by_definition(*qkv, seen, 0.7, softcap), ATTENTION[kernel](*qkv, visible, 0.7, softcap))
    )
    for mine, true in zip(ours, exact, strict=True):
        assert (mine - true).abs().max() <= 1e-12


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_eager_keeps_its_inputs_and_the_probabilities(softcap: float):
    """Left to autograd, the probabilities in fp32 and the repeated keys and values would be kept, too. The derivative
    of a cap needs the capped scores."""
    qkv = random_qkv(4, 2, 7, 7, torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        eager(*qkv, None, None, softcap)
    steps = [2 * 4 * 7 * 7] * (2 if softcap else 1)
    assert sorted(t.numel() for t in saved) == sorted([*(x.numel() for x in qkv), *steps])
    assert {t.dtype for t in saved} == {torch.bfloat16}


# --- who sees nothing, and who may not be seen ------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ATTENTION)
def test_padding_is_finite_forward_and_backward(kernel: str):
    """A row that is nothing but padding, and padding on either side: no NaN may reach a weight."""
    documents = torch.tensor([[-1, -1, -1, -1], [-1, -1, 0, 0], [0, 0, -1, -1]])
    q, k, v = random_qkv(4, 2, 4, 4, batch=3)
    out = ATTENTION[kernel](q, k, v, Visible.of_documents(documents, 4), None, 0.0)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


# First keys of 3 or 5 queries among 5 tokens.
BLIND = {
    "some": [[0, 2, 2, 4, 5], [1, 1, 1, 1, 3]],
    "some of the last": [[3, 4, 5], [0, 4, 4]],
    "all": [[5, 5, 5, 5, 5], [5, 5, 5, 5, 5]],
}


@pytest.mark.parametrize(
    ("kernel", "softcap"), [("eager", 0.0), ("sdpa", 0.0), ("flash", 0.0), ("eager", 1.5), ("flash", 1.5)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", BLIND)
def test_who_sees_nothing_gets_zeros(kernel: str, softcap: float, case: str, dtype: torch.dtype):
    first = torch.tensor(BLIND[case])
    b, s = first.shape
    own = torch.arange(5 - s, 5)
    seen = ((torch.arange(5) >= first[:, :, None]) & (torch.arange(5) <= own[:, None])).unsqueeze(1)
    blind, unseen = ~seen[:, 0].any(2), ~seen[:, 0].any(1)
    assert blind.any()
    qkv = random_qkv(4, 2, s, 5, dtype, batch=b)
    visible = Visible(first, 5)
    out = ATTENTION[kernel](*qkv, visible, None, softcap)
    assert out.isfinite().all()
    assert (out.transpose(1, 2)[blind] == 0).all()
    gradients = torch.autograd.grad((out * torch.randn(out.shape)).sum(), qkv)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0].transpose(1, 2)[blind] == 0).all()
    assert all((gradient.transpose(1, 2)[unseen] == 0).all() for gradient in gradients[1:])
    if dtype == torch.float32 and case != "all":
        exact = by_definition(*qkv, seen, None, softcap)
        assert (out.double() - exact).abs().max() <= error_bound(kernel, *qkv, 8**-0.5)
        assert_gradients_close(kernel, qkv, visible, seen, 8**-0.5, softcap)


# Documents, window, tokens that are changed, and tokens that must not feel it.
ISOLATED = {
    "documents": ([[0, 0, 1, 1, -1]], None, [0, 1, 4], [2, 3]),
    "a number that comes back": ([[0, 0, 1, 0, 0]], None, [0, 1, 2], [3, 4]),
    "window": ([[0] * 6], 2, [0, 1], [3, 4, 5]),
}


@pytest.mark.parametrize(
    ("kernel", "softcap"), [("eager", 0.0), ("sdpa", 0.0), ("flash", 0.0), ("eager", 1.5), ("flash", 1.5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("case", ISOLATED)
def test_tokens_that_may_not_be_seen_change_no_bit(
    kernel: str, softcap: float, case: str, value: float, dtype: torch.dtype
):
    """Of outputs and gradients; and what is changed includes the gradient that comes in there."""
    documents, window, changed, own = ISOLATED[case]
    t = len(documents[0])
    visible = Visible.of_documents(torch.tensor(documents), t, window)
    qkv = random_qkv(4, 2, t, t, dtype, batch=1)
    weight = torch.randn(1, 4, t, 8, dtype=dtype)

    def run() -> tuple[Tensor, ...]:
        out = ATTENTION[kernel](*qkv, visible, None, softcap)
        return out, *torch.autograd.grad(out, qkv, weight)

    before = run()
    with torch.no_grad():
        for x in (*qkv, weight):
            x[:, :, changed] = value
    for ours, expected in zip(run(), before, strict=True):
        assert torch.equal(ours[:, :, own], expected[:, :, own])
        assert not torch.equal(ours[:, :, changed], expected[:, :, changed])


# --- the steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("place", PLACES)
def test_every_step_is_what_its_name_says(place: str, softcap: float, dtype: torch.dtype):
    """Each step in float64 from the numbers of the step before; rounded to the dtype once more than there (u)."""
    visible, seen = at(place)
    q, k, v = (x.detach() for x in random_for(seen, 6, 2, dtype))
    steps = attention_steps(q, k, v, visible, 0.7, softcap)
    u, t = torch.finfo(dtype).eps / 2, k.shape[2]
    scores = torch.einsum("bhse,bhte->bhst", q.double(), of_heads(k, 6)) * 0.7
    # Product and scaling are rounded to the dtype (2 u), and sum 8 terms in fp32 (8 u at most, if it is the dtype);
    # division, tanh and product round 3 times more. The magnitude is |q| |k| before a cap.
    size = 0.7 * (q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()).item()
    if softcap:
        scores = softcap * (scores / softcap).tanh()
        assert steps.scores_bhst.abs().max() <= softcap
    assert (steps.scores_bhst.double() - scores).abs().max() <= 14 * u * size
    assert steps.mask.dtype == torch.bool and torch.equal(steps.mask, seen)

    shown = seen.expand(steps.scores_bhst.shape)
    assert torch.equal(steps.masked_bhst[shown], steps.scores_bhst[shown])
    assert (steps.masked_bhst[~shown] == torch.finfo(dtype).min).all()

    p = steps.probabilities_bhst
    assert p.dtype == dtype
    assert (p[~shown] == 0).all() and (p[shown] > 0).all()
    # Taken in fp32: difference (its magnitude below 2 size), exp, t additions, division; then one rounding to dtype.
    relative = (2 * size + t + 8) * 2**-24 + u
    exact = steps.masked_bhst.double().masked_fill(~seen, -torch.inf).softmax(-1)
    # fp16 has numbers below 6e-5 only in steps of 2^-24.
    assert ((p.double() - exact).abs() <= relative * exact + (2**-25 if dtype == torch.float16 else 0)).all()
    assert (p.double().sum(-1) - 1).abs().max() <= relative + t * 2**-25

    out = torch.einsum("bhst,bhte->bhse", p.double(), of_heads(v, 6))
    assert (steps.out_bhse.double() - out).abs().max() <= (t + 2) * u * v.abs().max().item()
    assert torch.equal(steps.out_bhse, eager(q, k, v, visible, 0.7, softcap))


def test_steps_without_visible_are_causal():
    q, k, v = (x.detach() for x in random_qkv(4, 2, 3, 5))
    ours, expected = attention_steps(q, k, v), attention_steps(q, k, v, Visible.within(3, 5, None, q.device), 8**-0.5)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, expected, strict=True))
    assert torch.equal(ours.out_bhse, eager(q, k, v))


# --- the same bits as transformers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("place", PLACES)
def test_kernels_equal_those_of_transformers(place: str, groups: int, dtype: torch.dtype):
    """The same casts in the same order: equal bit for bit, whatever the dtype."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    visible, seen = at(place)
    q, k, v = random_for(seen, 4, groups, dtype)
    for scale in (None, 0.7):
        for softcap in (0.0, 1.5, 50.0):
            expected = their_eager(q, k, v, seen, scale, softcap)
            assert torch.equal(eager(q, k, v, visible, scale, softcap), expected)
            assert torch.equal(attention_steps(q, k, v, visible, scale, softcap).out_bhse, expected)
    module = SimpleNamespace(num_key_value_groups=4 // groups, training=False, is_causal=True)
    theirs, _ = sdpa_attention_forward(module, q, k, v, seen, scaling=0.7)  # pyright: ignore[reportArgumentType]
    assert torch.equal(sdpa(q, k, v, visible, 0.7).transpose(1, 2), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("s", [1, 7])
def test_kernels_without_visible_equal_those_of_transformers(s: int, groups: int, dtype: torch.dtype):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, k, v = random_qkv(4, groups, s, 7, dtype)
    assert torch.equal(eager(q, k, v), their_eager(q, k, v, seen_by_rule([0] * 7, s)[None, None]))
    module = SimpleNamespace(num_key_value_groups=4 // groups, training=False, is_causal=True)
    # A single query's heads are packed as queries of their key/value head; transformers does so if there is a mask.
    mask = torch.ones(1, 1, 1, 7, dtype=torch.bool) if s == 1 else None
    theirs, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=8**-0.5)  # pyright: ignore[reportArgumentType]
    assert torch.equal(sdpa(q, k, v).transpose(1, 2), theirs)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (9, 3), (5, 1)])
def test_heads_are_repeated_as_in_transformers(heads: int, groups: int):
    x = torch.randn(2, groups, 3, 4)
    assert torch.equal(repeat_heads(x, heads), llama.repeat_kv(x, heads // groups))


# --- a shared prefix --------------------------------------------------------------------------------------------------


def rows_separately(
    prefix: int, rows: Sequence[int], qkv: QKV, window: int | None, scale: float | None, softcap: float
) -> Tensor:
    """By the definition: the prefix alone, then each row with the prefix in front of it; the rows' own outputs one
    behind the other."""

    def alone(*slots: slice) -> Tensor:
        q, k, v = (torch.cat([x[:, :, where] for where in slots], dim=2) for x in qkv)
        n = q.shape[2]
        return by_definition(q, k, v, seen_by_rule([0] * n, n, window), scale, softcap)

    outputs, start = [alone(slice(prefix))], prefix
    for length in rows:
        outputs.append(alone(slice(prefix), slice(start, start + length))[:, :, prefix:])
        start += length
    return torch.cat(outputs, dim=2)


PREFIXES = [(5, (3, 3)), (5, (1, 4, 2)), (1, (6, 1)), (7, (2,)), (3, (1, 1, 1))]


@pytest.mark.parametrize(("kernel", "softcap"), [("sdpa", 0.0), ("flash", 0.0), ("flash", 1.5)])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 6])
@pytest.mark.parametrize(("prefix", "rows"), PREFIXES)
def test_after_prefix_equals_the_rows_separately(
    prefix: int, rows: tuple[int, ...], window: int | None, kernel: str, softcap: float
):
    n = prefix + sum(rows)
    qkv = random_qkv(4, 2, n, n, torch.float64, batch=1)
    shared = SharedPrefix(prefix, rows)
    slots = shared.slots(torch.device("cpu"))
    ours = after_prefix(ATTENTION[kernel], shared, slots, window, *qkv, scale=0.7, softcap=softcap)
    theirs = rows_separately(prefix, rows, qkv, window, 0.7, softcap)
    assert ours.shape == theirs.shape == (1, 4, n, 8)
    assert (ours - theirs).abs().max() <= 1e-12
    weight = torch.randn(ours.shape, dtype=torch.float64)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), qkv), torch.autograd.grad((theirs * weight).sum(), qkv), strict=True
    ):
        assert (mine - other).abs().max() <= 1e-12


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize(("prefix", "rows"), PREFIXES)
def test_after_prefix_written_out(prefix: int, rows: tuple[int, ...], softcap: float, groups: int):
    n = prefix + sum(rows)
    qkv = random_qkv(4, groups, n, n, batch=1)
    shared = SharedPrefix(prefix, rows)
    ours = after_prefix(eager, shared, shared.slots(torch.device("cpu")), None, *qkv, softcap=softcap)
    theirs = rows_separately(prefix, rows, qkv, None, None, softcap)
    assert (ours.double() - theirs).abs().max() <= error_bound("eager", *qkv, 8**-0.5)


@pytest.mark.parametrize(
    ("rows", "expected"), [((2, 3, 1), [0, 1, 3, 4, 5, 6]), ((4,), [0, 1, 2, 3]), ((1, 1), [0, 1])]
)
def test_slots(rows: tuple[int, ...], expected: list[int]):
    assert SharedPrefix(9, rows).slots(torch.device("cpu")).tolist() == expected
