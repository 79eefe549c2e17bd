"""The Triton kernel of 8-bit AdamW against the PyTorch body of its operator, bit for bit (see guards.py).

optim/test_adamw8bit.py holds the body against float64. Several steps each, so that codes and scales are those of a run.
"""

from typing import Any

import pytest
import torch
from guards import (
    DEVICES,
    DTYPES,
    INTERPRETED,
    UnreadablePages,
    bits,
    guard_bands,
    on_cuda_path,
    skip_unless_pages_can_be_protected,
)
from torch import Tensor

from minift.optim.adamw8bit import AdamW8bit
from minift.optim.update8bit import factors

BLOCK, TILE = 256, 2048
# Around a block and a tile, several tiles with a rest; one tensor and many.
LARGE = [[4096], [4097, 4351, 4096, 3 * TILE + 1, 2 * TILE - 1, 5000]]
SMALL = [[1], [1, 2, 255, 256, 257, TILE - 1, TILE, TILE + 1, 4095]]
GROUP = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "order": "torch"}
SEEDS = [0, 1, 16, 2**32 + 5, 2**63 - 1, -1]

pytestmark = pytest.mark.parametrize("device", DEVICES)


class Tensors:
    """Arguments of the operator, all zero state; a copy of them can be moved into guarded memory."""

    def __init__(self, params: list[Tensor], eight_bit: bool):
        self.params, self.grads = params, [torch.zeros_like(p) for p in params]
        n = sum(-(-p.numel() // BLOCK) * BLOCK for p in params)
        if eight_bit:
            self.state = [torch.full((n,), 127, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)]
            self.state += [torch.zeros(n // BLOCK), torch.zeros(n // BLOCK)]
        else:
            self.state = [torch.zeros(n), torch.zeros(n)]

    def all(self) -> list[Tensor]:
        return self.params + self.state

    def arguments(self, group: dict, step: int, stochastic: bool, seed: int, first: int) -> tuple:
        state = self.state if len(self.state) == 4 else [*self.state, None, None]
        return (self.params, self.grads, *state, list(factors(group, step)), stochastic, seed, first)


def step_guarded(theirs: Tensors, device: str, *settings: Any) -> list[Tensor]:
    """One step of the kernel on copies between guard bands; what it changed, on the CPU."""
    ours = Tensors([], True)
    with guard_bands(device) as guards:
        ours.params, ours.state = (
            [guards.output(x.numel(), x.dtype).view(x.shape).copy_(x) for x in tensors]
            for tensors in (theirs.params, theirs.state)
        )
        ours.grads = [x for x in map(guards.input, theirs.grads) if x is not None]
        on_cuda_path("adamw8bit_", *ours.arguments(*settings))
    return [x.cpu() for x in ours.all()]


def assert_steps_equal(
    theirs: Tensors, device: str, group: dict | None = None, steps: int = 3, stochastic: bool = False,
    seed: int = 5, first: int = 0, gradient: Any = None,
) -> None:  # fmt: skip
    """Steps of both from the same state; all bits of parameters, codes (or means) and scales."""
    for step in range(1, steps + 1):
        for g in theirs.grads:
            g.copy_(gradient(g, step) if gradient else awkward(g.shape))
        settings = (group or GROUP, step, stochastic, seed, first)
        found = step_guarded(theirs, device, *settings)
        torch.ops.minift.adamw8bit_(*theirs.arguments(*settings))
        for index, (ours, wanted) in enumerate(zip(found, theirs.all(), strict=True)):
            wrong = torch.nonzero(bits(ours).flatten() != bits(wanted).flatten()).flatten()[:5]
            there = [x.flatten()[wrong].tolist() for x in (ours, wanted)]
            assert len(wrong) == 0, (step, index, wrong.tolist(), there)


def awkward(shape: torch.Size) -> Tensor:
    """Over eight decades, with zeros here and there."""
    return torch.randn(shape) * 10 ** (torch.rand(shape) * 8 - 6) * (torch.rand(shape) > 0.1)


def random_params(sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(n).to(dtype) for n in sizes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "eight_bit"), [(s, True) for s in LARGE] + [(s, False) for s in SMALL])
@pytest.mark.parametrize("order", ["torch", "bnb"])
def test_equals_the_pytorch_body(device: str, order: str, sizes: list[int], eight_bit: bool, dtype: torch.dtype):
    assert_steps_equal(Tensors(random_params(sizes, dtype), eight_bit), device, GROUP | {"order": order})


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.0}, {"weight_decay": 0.0}, {"weight_decay": 5.0, "lr": 0.3}, {"eps": 1.0}, {"eps": 1e-30},
        {"betas": (0.0, 0.0)}, {"betas": (0.5, 0.9)}, {"betas": (0.99, 0.99999)},
    ],
)  # fmt: skip
def test_settings(device: str, change: dict):
    assert_steps_equal(Tensors(random_params([5000], torch.float32), True), device, GROUP | change)


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("stochastic", [True, False])
def test_dtypes_together(device: str, stochastic: bool, eight_bit: bool):
    """Parameters of all dtypes in turn, gradients of others than their parameters."""
    tensors = Tensors([torch.randn(4096 + 100 * i).to(DTYPES[i % 3]) for i in range(6)], eight_bit)
    tensors.grads[1], tensors.grads[3] = tensors.grads[1].float(), tensors.grads[3].bfloat16()
    assert_steps_equal(tensors, device, stochastic=stochastic)


def test_one_launch_for_each_dtype(device: str, monkeypatch: pytest.MonkeyPatch):
    """Twelve tensors of two dtypes: two launches."""
    from minift_kernels import adamw8bit

    kernel, grids = adamw8bit._adamw8bit_kernel, []

    class Counted:
        def __getitem__(self, grid: tuple):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(adamw8bit, "_adamw8bit_kernel", Counted())
    tensors = Tensors([torch.randn(4096 + i).to(DTYPES[i % 2]) for i in range(12)], True)
    assert_steps_equal(tensors, device, steps=1)
    assert grids == [(2 + 5 * 3,), (6 * 3,)]


@pytest.mark.parametrize("shift", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_addresses_that_are_not_multiples_of_16(device: str, dtype: torch.dtype, shift: int):
    """Views into a larger tensor; the state, too, may begin anywhere."""
    step = (GROUP, 1, False, 0, 0)
    params = [torch.randn(4500 + shift).to(dtype), torch.randn(5000).to(dtype)]
    grads, results = [torch.randn_like(p) for p in params], []
    for where, call in ((device, lambda *a: on_cuda_path("adamw8bit_", *a)), ("cpu", torch.ops.minift.adamw8bit_)):
        tensors = Tensors([p.clone().to(where) for p in params], True)
        tensors.state = [torch.cat([x[:shift], x]).to(where)[shift:] for x in tensors.state]
        whole, tensors.params[0] = tensors.params[0], tensors.params[0][shift:]
        tensors.grads = [g.to(where) for g in grads]
        tensors.grads[0] = tensors.grads[0][shift:]
        n = sum(-(-p.numel() // BLOCK) * BLOCK for p in tensors.params)
        tensors.state = [x[: n if x.dtype == torch.uint8 else n // BLOCK] for x in tensors.state]
        call(*tensors.arguments(*step))
        results.append([x.cpu() for x in [whole, *tensors.all()]])
    assert not torch.equal(results[0][0], params[0])
    assert all(torch.equal(bits(ours), bits(wanted)) for ours, wanted in zip(*results, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_by_seed(device: str, dtype: torch.dtype, seed: int):
    assert_steps_equal(Tensors(random_params([4096 + 257], dtype), True), device, stochastic=True, seed=seed, steps=1)


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("first", [256, 2**32 - 256, 2**34 - 1024, 2**34, 3 * 2**40 + 512])
def test_stochastic_rounding_by_place(device: str, first: int, eight_bit: bool):
    """Places that only a page far behind has: the counter's second word begins at place 2^34."""
    params = random_params([4096, 257], torch.bfloat16)
    assert_steps_equal(Tensors(params, eight_bit), device, stochastic=True, first=first, steps=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_over_the_whole_range(device: str, dtype: torch.dtype):
    """Subnormal and largest parameters, rate 0: what is rounded are the numbers themselves, decayed a little."""
    largest = torch.finfo(dtype).max
    sizes = torch.tensor([largest, largest * 0.9, 1.0, 2.0**-14, 2.0**-15, 2.0**-24, 1e-7, 0.0])
    p = (sizes.repeat(600) * (torch.randint(0, 2, (4800,)) * 2 - 1)).to(dtype)
    assert_steps_equal(Tensors([p], True), device, GROUP | {"lr": 1e-3}, stochastic=True, steps=2)
    assert_steps_equal(Tensors([p], True), device, GROUP | {"lr": -1e-3}, stochastic=True, steps=2)


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1e-30, 1e-19, 1e18, 3e19])
@pytest.mark.parametrize("eight_bit", [True, False])
def test_gradients_of_every_size(device: str, eight_bit: bool, scale: float):
    """Nothing at all, squares that are denormal or vanish, squares near the largest number."""
    tensors = Tensors(random_params([4096, 300], torch.float32), eight_bit)
    assert_steps_equal(tensors, device, gradient=lambda g, _: torch.randn(g.shape) * scale)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_seen(device: str, dtype: torch.dtype, bad: float):
    """In the parameter and in the scales of the block; elsewhere the bits are those without it."""
    tensors = Tensors(random_params([4096 + 100], dtype), True)
    tensors.grads[0].copy_(torch.randn(4196))
    tensors.grads[0][300] = bad
    settings = (GROUP, 1, False, 0, 0)
    p, m, v, m_absmax, v_absmax = step_guarded(tensors, device, *settings)
    torch.ops.minift.adamw8bit_(*tensors.arguments(*settings))
    assert p.isnan().nonzero().flatten().tolist() == [300]
    assert (~m_absmax.isfinite()).tolist() == (~v_absmax.isfinite()).tolist() == [i == 1 for i in range(17)]
    theirs = [x.clone() for x in tensors.all()]
    good = torch.ones(17, dtype=torch.bool)
    good[1] = False
    wide = good.repeat_interleave(BLOCK)
    for ours, wanted, where in zip((m, v, m_absmax, v_absmax), theirs[1:], (wide, wide, good, good), strict=True):
        assert torch.equal(ours[where], wanted[where])
    assert torch.equal(p[wide[:4196]], theirs[0][wide[:4196]])
    assert torch.equal(p.isnan(), theirs[0].isnan())


@pytest.mark.parametrize("eight_bit", [True, False])
def test_nothing_to_do(device: str, eight_bit: bool):
    """No tensor, or none with an element: no launch (a grid of 0 programs is an error on a GPU)."""
    for params in ([], [torch.zeros(0)], [torch.zeros(0, 4), torch.randn(5), torch.zeros(0)]):
        assert_steps_equal(Tensors(params, eight_bit), device, steps=1)


@pytest.mark.parametrize("n", [1, 257, TILE + 3])
@pytest.mark.parametrize("eight_bit", [True, False])
def test_reads_nothing_behind_its_inputs(device: str, eight_bit: bool, n: int):
    """A load without its mask touches the unreadable page and ends the process with a segmentation fault."""
    skip_unless_pages_can_be_protected(device)
    ours, theirs = Tensors([torch.ones(n)], eight_bit), Tensors([torch.ones(n)], eight_bit)
    theirs.grads[0].copy_(torch.randn(n))
    pages = UnreadablePages()
    ours.params, ours.grads, ours.state = (
        [copy for copy in map(pages.before_page, tensors) if copy is not None]
        for tensors in (theirs.params, theirs.grads, theirs.state)
    )
    settings = (GROUP, 1, False, 0, 0)
    on_cuda_path("adamw8bit_", *ours.arguments(*settings))
    torch.ops.minift.adamw8bit_(*theirs.arguments(*settings))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours.all(), theirs.all(), strict=True))


def test_was_interpreted_or_compiled(device: str):
    """The comparison is one of two things: the operator on the CPU does not reach the kernel by itself."""
    from minift_kernels.adamw8bit import _adamw8bit_kernel

    assert ("Interpreted" in type(_adamw8bit_kernel).__name__) == INTERPRETED


# --- the optimizer on a GPU -------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("budget", [None, 1, 3, 100])
def test_optimizer_equals_that_of_the_cpu(device: str, budget: int | None, stochastic: bool):
    """Twenty steps of all dtypes, with state on the device or in pages of 8 blocks, one to all of them resident."""
    if device == "cpu":
        pytest.skip("the optimizer takes the kernel for CUDA tensors only")
    start = [torch.randn(n).to(dtype) for dtype in DTYPES for n in (4096, 10_000, 300, 70_001)]
    start.append(torch.randn(90, 100).T)
    page = 8 * 520
    paging = {} if budget is None else {"paged": True, "page_bytes": page, "budget_bytes": budget * page}
    ours_params = [torch.nn.Parameter(p.to(device)) for p in start]
    theirs_params = [torch.nn.Parameter(p.clone()) for p in start]
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "stochastic_rounding": stochastic}
    ours, theirs = AdamW8bit(ours_params, **settings, **paging), AdamW8bit(theirs_params, **settings)
    for _ in range(20):
        for our, their in zip(ours_params, theirs_params, strict=True):
            their.grad = awkward(their.shape).to(their.dtype)
            our.grad = their.grad.to(device)
        ours.step()
        theirs.step()
    for our, their in zip(ours_params, theirs_params, strict=True):
        assert torch.equal(bits(our.detach().cpu().contiguous()), bits(their.detach().contiguous()))
    ours_state, theirs_state = (each.state_dict()["state"]["group0"] for each in (ours, theirs))
    for name, value in theirs_state.items():
        assert torch.equal(torch.as_tensor(ours_state[name]).cpu(), torch.as_tensor(value)), name
    if ours.pool is not None and budget is not None:
        assert ours.pool.resident_bytes() <= budget * page
        assert ours_state["m_codes"].is_pinned()
