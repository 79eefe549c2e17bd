"""AdamW8bit against an emulation in float64, tensor by tensor and block by block; against bitsandbytes.

The emulation decodes the state that our optimizer holds, takes one exact AdamW step in float64 (decay first, torch's
order) and searches the nearest code among all 256 distances. Taking our state as the start of every step keeps the
comparison sharp: an early difference of one code cannot grow into something that a loose bound would have to allow. The
parameters of the emulation run on their own for all 50 steps.
"""

import copy
import io
import math
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from torch import Tensor

from minift import AdamW8bit
from minift.quant import dynamic_map

BLOCK = 256
SIZES = [(4096,), (64, 65), (77, 100), (8193,)]  # just 8-bit; odd rows; a short last block of 20; of 1
ULP = 2.0**-24  # half the distance of neighbouring fp32 numbers at 1: the largest relative error of one rounding


class Emulation:
    """One parameter. `codes` and `absmax` are views of our state; p and its bound are the emulation's own."""

    def __init__(self, p: Tensor, state: dict, start: int):
        self.p, self.bound = p.detach().double().numpy().ravel().copy(), np.zeros(p.numel())
        self.state, self.start, self.n = state, start, p.numel()
        self.maps = {"m": dynamic_map(True).double().numpy(), "v": dynamic_map(False).double().numpy()}

    def decoded(self, name: str) -> np.ndarray:
        """The mean that our optimizer remembers; its product of two fp32 numbers is rounded to fp32."""
        if "m_fp32" in self.state:
            return self.state[f"{name}_fp32"][self.start : self.start + self.n].numpy()
        codes = self.state[f"{name}_codes"][self.start : self.start + self.n].numpy()
        blocks = self.start // BLOCK + np.arange(self.n) // BLOCK
        return (self.maps[name][codes] * self.state[f"{name}_absmax"].double().numpy()[blocks]).astype(np.float32)

    def step(
        self, gradient: Tensor, step: int, lr: float, betas: tuple[float, float], eps: float, decay: float, order: str
    ) -> None:
        """Keep the exact new means and their error bounds; move p.

        Bounds, in units of ULP, elementwise. m = b1 m + (1 - b1) g: three roundings, of numbers no larger than
        |m| + |g|, and two factors are rounded: 4 (|m| + |g|). v = b2 v + (1 - b2) g g: all terms positive, four
        roundings, two factors rounded: 8 v. The update u = lr/c1 m / (sqrt(v)/c2 + eps): the error of m, half of that
        of v, six more roundings: 10 u and lr/c1/denominator times the error of m. p (1 - lr decay) - u, or (p - u)(1 -
        lr decay): the factor and two results are rounded, 4 (|p| + |u|). All are doubled for what is of second order.
        """
        g = gradient.double().numpy().ravel()
        m, v = self.decoded("m").astype(np.float64), self.decoded("v").astype(np.float64)
        self.error = {"m": 8 * ULP * (np.abs(m) + np.abs(g))}
        self.exact = {"m": betas[0] * m + (1 - betas[0]) * g, "v": betas[1] * v + (1 - betas[1]) * g * g}
        self.error["v"] = 16 * ULP * self.exact["v"]
        denominator = np.sqrt(self.exact["v"]) / math.sqrt(1 - betas[1] ** step) + eps
        rate = lr / (1 - betas[0] ** step)
        update = rate * self.exact["m"] / denominator
        kept = 1 - lr * decay
        self.p = self.p * kept - update if order == "torch" else (self.p - update) * kept
        self.bound += rate * self.error["m"] / denominator + ULP * (28 * np.abs(update) + 8 * np.abs(self.p))

    def check(self, p: Tensor) -> int:
        """Compare with our new state and p; return the number of codes that are not the emulation's."""
        differ = 0
        for name, values in self.maps.items():
            if "m_fp32" in self.state:
                assert (np.abs(self.decoded(name) - self.exact[name]) <= self.error[name]).all(), name
                continue
            codes = self.state[f"{name}_codes"][self.start : self.start + self.n].numpy()
            for start in range(0, self.n, BLOCK):
                block = slice(start, min(start + BLOCK, self.n))
                exact, error = self.exact[name][block], self.error[name][block]
                absmax = np.abs(exact).max()
                found = self.state[f"{name}_absmax"][(self.start + start) // BLOCK].item()
                assert abs(found - absmax) <= error.max(), (name, start)
                if absmax == 0:
                    assert (codes[block] == (127 if name == "m" else 0)).all()
                    continue
                # Our x / absmax is off by the errors of both, and by the roundings of the reciprocal and the product.
                normalized = exact / absmax
                slack = error / absmax + np.abs(normalized) * (error.max() / absmax + 4 * ULP)
                distance = np.abs(normalized[:, None] - values[None, :])
                nearest, ours = distance.argmin(1), codes[block].astype(int)
                assert (distance[np.arange(len(ours)), ours] <= distance.min(1) + 2 * slack).all(), (name, start)
                assert (np.abs(nearest - ours) <= 1).all(), (name, start)
                differ += int((nearest != ours).sum())
        assert (np.abs(p.detach().double().numpy().ravel() - self.p) <= self.bound).all()
        return differ


def awkward_gradient(shape: tuple[int, ...], step: int) -> Tensor:
    """Magnitudes over six decades, one block without any gradient, zeros here and there, now and then all zero."""
    gradient = torch.randn(shape) * 10 ** torch.empty(shape).uniform_(-5, 1)
    flat = gradient.view(-1)
    flat[BLOCK : 2 * BLOCK] = 0
    flat[torch.rand(len(flat)) < 0.1] = 0
    return gradient * (step % 7 != 3)


def first_step(optimizer: AdamW8bit, params: list[torch.nn.Parameter]) -> list[Emulation]:
    """A step that makes the state; no gradient, no rate: nothing else may happen."""
    lr = optimizer.param_groups[0]["lr"]
    for p in params:
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    assert all(map(torch.equal, params, before))
    state = optimizer.state["group0"]  # pyright: ignore[reportArgumentType]
    starts = np.cumsum([0] + [-(-p.numel() // BLOCK) * BLOCK for p in params[:-1]])
    return [Emulation(p, state, int(start)) for p, start in zip(params, starts, strict=True)]


@pytest.mark.parametrize(("decay", "order"), [(0.0, "torch"), (1.0, "torch"), (1.0, "bnb")])
def test_equals_emulation(decay: float, order: str):
    """100 steps. With lr x decay = 0.01 the order of decay and update is 10,000 times the bound apart."""
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SIZES]
    optimizer = AdamW8bit(params, weight_decay=decay, order=order, **settings)
    emulations = first_step(optimizer, params)
    state = optimizer.state["group0"]  # pyright: ignore[reportArgumentType]
    assert (state["m_codes"] == 127).all() and (state["v_codes"] == 0).all()
    differ = 0
    for step in range(2, 102):
        for p, emulation in zip(params, emulations, strict=True):
            p.grad = awkward_gradient(p.shape, step)
            emulation.step(p.grad, step, decay=decay, order=order, **settings)
        optimizer.step()
        differ += sum(emulation.check(p) for p, emulation in zip(params, emulations, strict=True))
    # Each difference was shown to be a near tie; slack is around 2^-19 of a value, a gap at least 2^-7 of it.
    assert differ < 2**-10 * 100 * 2 * sum(p.numel() for p in params)


@pytest.mark.parametrize("order", ["torch", "bnb"])
def test_small_tensors_keep_fp32_state(order: str):
    """Below 4096 elements: the same recurrences, remembered without rounding to codes."""
    params = [torch.nn.Parameter(torch.randn(n)) for n in (1, 2, 255, 256, 257, 1000, 4095)]
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
    optimizer = AdamW8bit(params, weight_decay=1.0, order=order, **settings)
    emulations = first_step(optimizer, params)
    for step in range(2, 32):
        for p, emulation in zip(params, emulations, strict=True):
            p.grad = awkward_gradient(p.shape, step)
            emulation.step(p.grad, step, decay=1.0, order=order, **settings)
        optimizer.step()
        assert sum(emulation.check(p) for p, emulation in zip(params, emulations, strict=True)) == 0


@pytest.mark.parametrize("n", [5000, 1000])
def test_16_bit_parameters_are_rounded_once_a_step(n: int):
    """A bf16 parameter moves as its fp32 copy would in one step, then is rounded to nearest; the state is the same."""
    p = torch.nn.Parameter(torch.randn(n).bfloat16())
    wide = torch.nn.Parameter(p.detach().float())
    ours, theirs = AdamW8bit([p], lr=1e-2, weight_decay=0.1), AdamW8bit([wide], lr=1e-2, weight_decay=0.1)
    for _ in range(10):
        p.grad = torch.randn(n).bfloat16()
        wide.grad = p.grad.float()
        ours.step()
        theirs.step()
        assert torch.equal(p, wide.bfloat16())
        wide.data.copy_(p)


@pytest.mark.parametrize("small", [0, 1])
def test_where_8_bits_begin(small: int):
    optimizer = AdamW8bit([p := torch.nn.Parameter(torch.randn(4096 - small))])
    p.grad = torch.ones_like(p)
    optimizer.step()
    keys = set(optimizer.state["group0"])  # pyright: ignore[reportArgumentType]
    assert keys == {"step", *(("m_fp32", "v_fp32") if small else ("m_codes", "v_codes", "m_absmax", "v_absmax"))}


def test_many_at_once_equal_each_alone():
    """One flat update, chunks of 2^15 elements, padding between tensors: none of it may show, to the bit.

    Sizes around a block, a chunk and the 8-bit threshold, two dtypes, a transposed (not contiguous) parameter.
    """
    sizes = [4096, 4097, 10, 5000, 255, 33_000, 1, 32_768, 70_001, 4095, 2**15 - 256 + 1]
    together = [torch.nn.Parameter(torch.randn(n)) for n in sizes]
    together += [torch.nn.Parameter(torch.randn(4200).bfloat16()), torch.nn.Parameter(torch.randn(70, 90).T)]
    assert not together[-1].is_contiguous()
    alone = [torch.nn.Parameter(p.detach().clone().contiguous()) for p in together]
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    ours, theirs = AdamW8bit(together, **settings), [AdamW8bit([p], **settings) for p in alone]
    for _ in range(10):
        for our, their in zip(together, alone, strict=True):
            our.grad = torch.randn(our.shape).to(our.dtype)
            their.grad = our.grad.clone()
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    for our, their in zip(together, alone, strict=True):
        assert torch.equal(our, their), our.shape


def test_padding_stays_zero():
    """The tail of the last block of each tensor keeps the codes of 0, and so cannot reach a neighbour's scale."""
    params = [torch.nn.Parameter(torch.randn(n)) for n in (4097, 5000)]
    optimizer = AdamW8bit(params, lr=1e-2, weight_decay=0.1)
    for _ in range(10):
        for p in params:
            p.grad = torch.randn_like(p) + 1
        optimizer.step()
    state = optimizer.state["group0"]  # pyright: ignore[reportArgumentType]
    padded = 17 * BLOCK
    tails = [slice(4097, padded), slice(padded + 5000, None)]
    for tail in tails:
        assert len(state["m_codes"][tail]) in (255, 120)
        assert (state["m_codes"][tail] == 127).all() and (state["v_codes"][tail] == 0).all()
    assert (state["m_codes"][:4097] != 127).float().mean() > 0.9


def test_groups_have_their_own_settings_and_state():
    first, second = ([torch.nn.Parameter(torch.randn(n)) for n in (5000, 100)] for _ in range(2))
    alone = copy.deepcopy([first, second])
    settings = [{"lr": 1e-2, "weight_decay": 0.1}, {"lr": 1e-3, "betas": (0.5, 0.9), "eps": 1e-4}]
    together = AdamW8bit([{"params": p, **s} for p, s in zip((first, second), settings, strict=True)])
    separate = [AdamW8bit(p, **s) for p, s in zip(alone, settings, strict=True)]
    for _ in range(5):
        for our, their in zip(first + second, alone[0] + alone[1], strict=True):
            our.grad = torch.randn_like(our)
            their.grad = our.grad.clone()
        together.step()
        for optimizer in separate:
            optimizer.step()
    assert all(map(torch.equal, first + second, alone[0] + alone[1]))


def test_rate_zero_moves_nothing():
    """The first step of a warm-up; the state is filled all the same."""
    p = torch.nn.Parameter(torch.randn(5000))
    before = p.detach().clone()
    optimizer = AdamW8bit([p], lr=0.0, weight_decay=1.0)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert torch.equal(p, before)
    assert (optimizer.state["group0"]["m_codes"] != 127).any()  # pyright: ignore[reportArgumentType]


def test_regression_reaches_the_same_loss_as_bitsandbytes():
    """Least squares with noise: both come within 2 % of the best possible loss, from 50 times as much.

    The trajectories differ (its CPU kernel rounds to a coarser table first, see test_blockwise.py), so the loss that
    remains is what can be compared; the optimum is known exactly.
    """
    inputs, target = torch.randn(1024, 64), None
    truth = torch.randn(64, 80)
    target = inputs @ truth + torch.randn(1024, 80)
    best = (target - inputs @ torch.linalg.lstsq(inputs, target).solution).square().mean().item()
    losses = {}
    for name, kind in (("ours", AdamW8bit), ("theirs", bitsandbytes.optim.AdamW8bit)):
        weight = torch.nn.Parameter(torch.zeros(64, 80))
        assert weight.numel() >= 4096
        optimizer = kind([weight], lr=0.1, weight_decay=0.0)
        first = None
        for step in range(200):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 - step / 200)
            optimizer.zero_grad()
            loss = (inputs @ weight - target).square().mean()
            loss.backward()
            optimizer.step()
            first = first or loss.item()
        losses[name] = (inputs @ weight - target).square().mean().item()
        assert first > 50 * best
    assert best <= losses["ours"] <= 1.02 * best and best <= losses["theirs"] <= 1.02 * best, (best, losses)


def test_state_dict_continues_to_the_bit():
    """Saved to a file as a checkpoint does, loaded without pickle's code, into a fresh optimizer."""
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5000, 100, 4096)]
    optimizer = AdamW8bit([{"params": params[:2]}, {"params": params[2:], "lr": 1e-2}], weight_decay=0.1)

    def steps(*optimizers: torch.optim.Optimizer) -> None:
        for _ in range(5):
            gradients = [torch.randn_like(p) for p in params]
            for each in optimizers:
                held = [p for group in each.param_groups for p in group["params"]]
                for p, gradient in zip(held, gradients, strict=True):
                    p.grad = gradient.clone()
                each.step()

    steps(optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_params = copy.deepcopy(params)
    resumed = AdamW8bit([{"params": resumed_params[:2]}, {"params": resumed_params[2:]}])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [group["lr"] for group in resumed.param_groups] == [3e-4, 1e-2]
    steps(optimizer, resumed)
    assert all(map(torch.equal, params, resumed_params))
    for index in range(2):
        ours, theirs = resumed.state[f"group{index}"], optimizer.state[f"group{index}"]  # pyright: ignore
        assert ours["step"] == theirs["step"] == 10
        for name in ours.keys() - {"step"}:
            assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype


def test_bytes_of_state():
    """Two bytes an element, two fp32 scales for 256 of them; only the last block of each tensor is padded."""
    sizes = [4096, 100_000, 5001]
    params = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    optimizer = AdamW8bit(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = optimizer.state["group0"]  # pyright: ignore[reportArgumentType]
    blocks = sum(-(-n // BLOCK) for n in sizes)
    assert sum(value.nbytes for value in held.values() if isinstance(value, Tensor)) == blocks * (2 * BLOCK + 2 * 4)


def test_closure_sees_gradients_and_its_loss_is_returned():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW8bit([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0  # pyright: ignore[reportArgumentType]
    assert (p < 1).all()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_steps_equal_those_of_bitsandbytes(decay: float):
    """100 steps of the installed library's CPU code, each from our state: its decay comes first, as in torch.

    Parameters and scales agree to rounding: both make at most a dozen fp32 roundings on the way to u, and p is rounded
    by each: 32 ULP of |p| + |u|, and 16 of a scale. (The first moment could cancel; the gradients here keep their
    signs.) Codes: theirs snap the value to the nearest of 65,536 cells of [-1, 1] first, and then take the nearest
    entry. So from 10^-4 on, where entries lie 5.6 x 10^-5 apart at least, nearly two cells of 2^-15, theirs is at most
    one code away. Below, entries of one cell cannot be told apart: a cell and the largest step there, 6.8 x 10^-5.
    """
    p = torch.nn.Parameter(torch.randn(8193))
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": decay}
    optimizer = AdamW8bit([p], **settings)
    sign = torch.randn(8193).sign()
    maps = (dynamic_map(True), dynamic_map(False))
    for step in range(1, 101):
        p.grad = torch.randn(8193).abs() * sign
        theirs_p = p.detach().clone()
        if step == 1:
            held = [torch.full((8193,), 127, dtype=torch.uint8), torch.zeros(8193, dtype=torch.uint8)]
            held += [torch.zeros(33), torch.zeros(33)]
        else:
            state = optimizer.state["group0"]  # pyright: ignore[reportArgumentType]
            held = [state[name].clone() for name in ("m_codes", "v_codes", "m_absmax", "v_absmax")]
            held[:2] = [codes[:8193] for codes in held[:2]]
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam", p.grad, theirs_p, held[0], held[1], 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-2,
            *maps, held[2], held[3], decay, 1.0, False,
        )  # fmt: skip
        before = p.detach().clone()
        optimizer.step()
        size = p.detach().abs() + (p.detach() - before).abs()
        assert ((p - theirs_p).abs() <= 32 * ULP * size).all(), step
        state = optimizer.state["group0"]  # pyright: ignore[reportArgumentType]
        for name, values, codes, absmax in zip("mv", maps, held[:2], held[2:], strict=True):
            ours = state[f"{name}_absmax"]
            assert ((ours - absmax).abs() <= 16 * ULP * absmax).all(), (step, name)
            ours_codes, codes = state[f"{name}_codes"][:8193].int(), codes.int()
            coarse = values[codes].abs() >= 1e-4
            assert coarse.float().mean() > 0.5 and ((ours_codes - codes)[coarse].abs() <= 1).all(), (step, name)
            assert ((values[ours_codes] - values[codes])[~coarse].abs() <= 2**-15 + 6.8e-5).all(), (step, name)
