"""The Triton kernels of tiled attention: against the definition in float64, and that they stay within their tensors."""

import pytest
import torch
from exact_attention import LAYOUTS, assert_is_attention, exact_attention, first_keys
from guards import DEVICES, UnreadablePages, guard_bands, on_cuda_path, skip_unless_pages_can_be_protected
from torch import Tensor

from minift.model.flash import last_queries

Four = tuple[Tensor, Tensor, Tensor, Tensor]

pytestmark = pytest.mark.parametrize("device", DEVICES)

# Tiles of fp32 have 32 queries and 16 to 32 keys, those of 16 bits 32 to 128 queries and 64 keys: lengths around them.
FP32_LENGTHS = [(1, 1), (3, 3), (15, 15), (16, 17), (31, 31), (32, 32), (33, 33), (69, 69), (1, 69), (3, 40), (17, 69)]
CASES = [(*lengths, (8, 13, 64)[i % 3], 1 + i // 2 % 3) for i, lengths in enumerate(FP32_LENGTHS)]
LENGTHS_16_BITS = [(3, 3), (63, 63), (64, 65), (129, 129), (5, 133)]


def random_inputs(
    heads: int, groups: int, s: int, t: int, e: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Four:
    """q, k, v and the gradient of the output; two rows."""
    shapes = [(2, heads, s, e), (2, groups, t, e), (2, groups, t, e), (2, heads, s, e)]
    q, k, v, grad = (torch.randn(shape).to(dtype).to(device) for shape in shapes)
    return q, k, v, grad


def inverse(first: Tensor | None, t: int) -> Tensor | None:
    return None if first is None else last_queries(first, t)


def guarded(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, first: Tensor | None, scale: float, softcap: float, device: str
) -> list[Tensor]:
    """Run the kernels between guard bands, check them, and return out, dq, dk, dv on the CPU."""
    from minift_kernels.flash import flash_attention, flash_attention_backward

    with guard_bands(device) as guards:
        inputs = [guards.input(x) for x in (q, k, v, grad, first, inverse(first, k.shape[2]))]
        q_in, k_in, v_in, grad_in, first_in, last_in = inputs
        out, dq, dk, dv = (guards.output(x.numel(), x.dtype).view(x.shape) for x in (q, q, k, v))
        lse = guards.output(q.numel() // q.shape[-1], torch.float32).view(q.shape[:3])
        written = flash_attention(q_in, k_in, v_in, first_in, scale, softcap, out=(out, lse))  # pyright: ignore
        grads = flash_attention_backward(
            grad_in, q_in, k_in, v_in, out, lse, first_in, last_in, scale, softcap, grads=(dq, dk, dv)  # pyright: ignore
        )  # fmt: skip
        assert [x.data_ptr() for x in (*written, *grads)] == [x.data_ptr() for x in (out, lse, dq, dk, dv)]
    return [x.cpu() for x in (out, dq, dk, dv)]


def operator(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, first: Tensor | None, scale: float, softcap: float
) -> list[Tensor]:
    """What the dispatcher calls for CUDA tensors: out, dq, dk, dv."""
    last = inverse(first, k.shape[2])
    out, lse = on_cuda_path("flash_attention", q, k, v, first, last, scale, softcap)
    grads = on_cuda_path("flash_attention_backward", grad, q, k, v, out, lse, first, last, scale, softcap)
    return [out, *grads]


@pytest.mark.parametrize("layout", ["causal", "packed"])
@pytest.mark.parametrize(("s", "t", "e", "repeats"), CASES)
def test_is_attention(device: str, s: int, t: int, e: int, repeats: int, layout: str):
    inputs, first = random_inputs(repeats, 1, s, t, e), first_keys(layout, 2, s, t)
    ours = guarded(*inputs, first, e**-0.5, 0.0, device)
    assert_is_attention(ours, exact_attention(*inputs, first, e**-0.5, 0.0))


@pytest.mark.parametrize("layout", LAYOUTS[2:])
@pytest.mark.parametrize(("s", "t"), [(50, 50), (33, 70)])
def test_layouts(device: str, s: int, t: int, layout: str):
    inputs, first = random_inputs(2, 2, s, t, 8), first_keys(layout, 2, s, t)
    ours = guarded(*inputs, first, 0.4, 0.0, device)
    assert_is_attention(ours, exact_attention(*inputs, first, 0.4, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["causal", "window"])
@pytest.mark.parametrize(("s", "t"), LENGTHS_16_BITS)
def test_16_bits(device: str, s: int, t: int, layout: str, dtype: torch.dtype):
    inputs, first = random_inputs(1, 1, s, t, 13, dtype), first_keys(layout, 2, s, t)
    ours = guarded(*inputs, first, 0.3, 0.0, device)
    assert [x.dtype for x in ours] == [dtype] * 4
    assert_is_attention(ours, exact_attention(*inputs, first, 0.3, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "softcap"), [(0.25, 2.0), (1.0, 50.0), (4.0, 0.5)])
def test_soft_cap(device: str, scale: float, softcap: float, dtype: torch.dtype):
    inputs, first = random_inputs(4, 2, 37, 50, 13, dtype), first_keys("packed", 2, 37, 50)
    ours = guarded(*inputs, first, scale, softcap, device)
    assert_is_attention(ours, exact_attention(*inputs, first, scale, softcap))


@pytest.mark.parametrize("e", [1, 16, 100, 256])
def test_head_widths(device: str, e: int):
    """One number, exactly a padded width, a width between two of them, the largest."""
    inputs = random_inputs(1, 1, 18, 18, e)
    assert_is_attention(
        guarded(*inputs, None, e**-0.5, 0.0, device), exact_attention(*inputs, None, e**-0.5, 0.0)
    )  # fmt: skip


def test_zero_and_huge_scores(device: str):
    """A score of 0 is one; scores of 1e4 and -1e4 do not overflow."""
    q, k, v, grad = random_inputs(2, 1, 40, 40, 16)
    q[:, :, ::2] = 0
    q, k = q * 100, k.abs() * 100
    assert (q @ k.mT * 0.1).amin() < -1e4 and (q @ k.mT * 0.1).amax() > 1e4
    ours = guarded(q, k, v, grad, None, 0.1, 0.0, device)
    assert_is_attention(ours, exact_attention(q, k, v, grad, None, 0.1, 0.0))


def test_a_query_that_sees_nothing_gives_zeros(device: str):
    inputs, first = random_inputs(1, 1, 40, 40, 8), first_keys("blind", 2, 40, 40)
    assert first is not None
    blind = first > torch.arange(40)
    out, dq, *_ = guarded(*inputs, first, 0.4, 0.0, device)
    assert blind.any() and all(bool((x.transpose(1, 2)[blind] == 0).all()) for x in (out, dq))
    nobody = guarded(*inputs, torch.full_like(first, 2**40), 0.4, 0.0, device)
    assert all(bool((x == 0).all()) for x in nobody)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_documents_do_not_touch_each_other(device: str, changed: int, dtype: torch.dtype):
    document = torch.tensor([0] * 13 + [1] * 18 + [2] * 9)
    first = torch.tensor([0] * 13 + [13] * 18 + [31] * 9).expand(2, -1)
    inputs = random_inputs(2, 1, 40, 40, 8, dtype)
    before = guarded(*inputs, first, 0.4, 0.0, device)
    for x in inputs:
        x[:, :, document == changed] *= 1e4
    for old, new in zip(before, guarded(*inputs, first, 0.4, 0.0, device), strict=True):
        assert torch.equal(old[:, :, document != changed], new[:, :, document != changed])
        assert not torch.equal(old[:, :, document == changed], new[:, :, document == changed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["causal", "packed"])
def test_operator_takes_views(device: str, layout: str, dtype: torch.dtype):
    """[b, s, h, e] seen as [b, h, s, e]; a cache longer than what is used; a gradient that is one row repeated."""
    inputs, first = random_inputs(2, 1, 19, 19, 8, dtype, device), first_keys(layout, 2, 19, 19)
    first = None if first is None else first.to(device)
    exact = exact_attention(*inputs, first, 0.4, 0.0)
    cache = (torch.cat([x, x], 2)[:, :, :19] for x in inputs)
    q, k, v, grad = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    ours = operator(q, k, v, grad, first, 0.4, 0.0)
    assert ours[0].stride() == q.stride()
    assert_is_attention(ours, exact)
    assert_is_attention(operator(*cache, first, 0.4, 0.0), exact)  # pyright: ignore (of four)
    repeated = grad[:, :, :1].expand(-1, -1, 19, -1)
    exact = exact_attention(q, k, v, repeated, first, 0.4, 0.0)
    assert_is_attention(operator(q, k, v, repeated, first, 0.4, 0.0), exact)


def test_operator_in_double_precision(device: str):
    """No kernel, but the PyTorch body, which runs anywhere."""
    inputs = random_inputs(4, 2, 9, 20, 8, torch.float64, device)
    assert_is_attention(operator(*inputs, None, 0.4, 0.0), exact_attention(*inputs, None, 0.4, 0.0))


def test_same_bits_every_time(device: str):
    inputs, first = random_inputs(2, 1, 40, 40, 8), first_keys("packed", 2, 40, 40)
    once, again = (guarded(*inputs, first, 0.4, 0.0, device) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


@pytest.mark.parametrize(("b", "s"), [(0, 3), (1, 0)])
def test_nothing_to_do(device: str, b: int, s: int):
    q, k = torch.zeros(b, 2, s, 8), torch.ones(b, 1, 3, 8)
    out, dq, dk, dv = guarded(q, k, k.clone(), q.clone(), None, 1.0, 0.0, device)
    assert out.shape == dq.shape == q.shape
    assert (dk == 0).all() and (dv == 0).all()


def test_columns_must_lie_side_by_side(device: str):
    from minift_kernels.flash import flash_attention

    q, k, v, _ = random_inputs(1, 1, 3, 3, 8, device=device)
    with pytest.raises(ValueError, match="k has strides"):
        flash_attention(q, k.mT.contiguous().mT, v, None, 1.0, 0.0)


@pytest.mark.parametrize(
    ("s", "t", "e", "layout"), [(5, 5, 13, "causal"), (33, 40, 8, "packed"), (7, 69, 64, "window")]
)
def test_reads_nothing_behind_its_inputs(device: str, s: int, t: int, e: int, layout: str):
    """A load without its mask touches the unreadable page and ends the process with a segmentation fault."""
    skip_unless_pages_can_be_protected(device)
    from minift_kernels.flash import flash_attention, flash_attention_backward

    pages, inputs, first = UnreadablePages(), random_inputs(2, 1, s, t, e), first_keys(layout, 2, s, t)
    q, k, v, grad, first_in, last = [pages.before_page(x) for x in (*inputs, first, inverse(first, t))]
    out, lse = flash_attention(q, k, v, first_in, 0.3, 0.0)  # pyright: ignore
    out, lse = pages.before_page(out), pages.before_page(lse)
    grads = flash_attention_backward(grad, q, k, v, out, lse, first_in, last, 0.3, 0.0)  # pyright: ignore
    for ours, wanted in zip((out, *grads), guarded(*inputs, first, 0.3, 0.0, device), strict=True):
        assert ours is not None and torch.equal(ours, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["causal", "packed", "window"])
@pytest.mark.parametrize("e", [64, 128])
def test_long_rows(device: str, e: int, layout: str, dtype: torch.dtype):
    """4096 tokens; the interpreter would take minutes for that, so there only the first few, of wide heads."""
    s = 4096 if device == "cuda" else 20
    inputs, first = random_inputs(2, 1, s, s, e, dtype, device), first_keys(layout, 2, s, s)
    first = None if first is None else first.to(device)
    assert_is_attention(operator(*inputs, first, e**-0.5, 0.0), exact_attention(*inputs, first, e**-0.5, 0.0))
