"""AdamW against torch.optim.AdamW, bit for bit in fp32, and its rule for 16-bit parameters spelled out."""

import copy
import math

import pytest
import torch
from torch import Tensor

from minift import AdamW

SHAPES = [(1,), (7,), (33, 65), (5000,), (2, 3, 4)]
GROUPS = [
    {"lr": 1e-3, "weight_decay": 0.0},
    {"lr": 3e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)},
    {"lr": 1e-4, "weight_decay": 1.0, "eps": 1e-3},
]


def parameters(dtype: torch.dtype = torch.float32) -> list[list[torch.nn.Parameter]]:
    """One list of parameters a group."""
    return [[torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES] for _ in GROUPS]


def grouped(params: list[list[torch.nn.Parameter]]) -> list[dict]:
    return [{"params": group, **settings} for group, settings in zip(params, GROUPS, strict=True)]


def flat(groups: list[list[torch.nn.Parameter]]) -> list[torch.nn.Parameter]:
    return [p for group in groups for p in group]


def set_gradients(*copies: list[list[torch.nn.Parameter]]) -> None:
    """The same random gradients, of many magnitudes, for each copy of the parameters."""
    for same in zip(*(flat(groups) for groups in copies), strict=True):
        gradient = torch.randn(same[0].shape) * 10 ** torch.empty(same[0].shape).uniform_(-6, 2)
        for p in same:
            p.grad = gradient.to(p.dtype).clone()


def test_equals_torch():
    """20 steps with several groups. The operations are those of torch's one-tensor path, in its order: equal bits."""
    ours_params = parameters()
    theirs_params = copy.deepcopy(ours_params)
    ours, theirs = AdamW(grouped(ours_params)), torch.optim.AdamW(grouped(theirs_params), foreach=False)
    for _ in range(20):
        set_gradients(ours_params, theirs_params)
        ours.step()
        theirs.step()
        for our, their in zip(flat(ours_params), flat(theirs_params), strict=True):
            assert torch.equal(our, their)
            assert torch.equal(ours.state[our]["m"], theirs.state[their]["exp_avg"])
            assert torch.equal(ours.state[our]["v"], theirs.state[their]["exp_avg_sq"])


def test_learning_rate_can_change_between_steps():
    ours_params, theirs_params = parameters(), parameters()
    for ours_group, theirs_group in zip(ours_params, theirs_params, strict=True):
        for our, their in zip(ours_group, theirs_group, strict=True):
            their.data.copy_(our)
    ours, theirs = AdamW(grouped(ours_params)), torch.optim.AdamW(grouped(theirs_params), foreach=False)
    for step in range(5):
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = step * 1e-3  # the first step of a warm-up has rate 0
        set_gradients(ours_params, theirs_params)
        ours.step()
        theirs.step()
    assert all(map(torch.equal, flat(ours_params), flat(theirs_params)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rule_for_16_bit_parameters(dtype: torch.dtype):
    """The state is fp32 and exact; the parameter is rounded (to nearest) after the decay and again after the update.

    torch.optim.AdamW keeps the state in the parameter's dtype; we do not. The arithmetic in between is fp32, so the
    reference is the same two statements on an fp32 copy.
    """
    p = torch.nn.Parameter(torch.randn(1000).to(dtype))
    optimizer = AdamW([p], lr=1e-2, weight_decay=0.1)
    wanted, m, v = p.detach().clone(), torch.zeros(1000), torch.zeros(1000)
    for step in range(1, 21):
        p.grad = torch.randn(1000).to(dtype)
        optimizer.step()
        m.lerp_(p.grad.float(), 1 - 0.9)
        v.mul_(0.999).addcmul_(p.grad.float(), p.grad.float(), value=1 - 0.999)
        wanted = (wanted.float() * (1 - 1e-2 * 0.1)).to(dtype)
        denominator = v.sqrt() / math.sqrt(1 - 0.999**step) + 1e-8
        wanted = torch.addcdiv(wanted.float(), m, denominator, value=-1e-2 / (1 - 0.9**step)).to(dtype)
        assert torch.equal(p, wanted)
        assert optimizer.state[p]["m"].dtype == torch.float32 and torch.equal(optimizer.state[p]["m"], m)
        assert optimizer.state[p]["v"].dtype == torch.float32 and torch.equal(optimizer.state[p]["v"], v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_dict_continues_to_the_bit(dtype: torch.dtype):
    """Five steps, save, load into a fresh optimizer, five more: as without the break. The state stays fp32."""
    params = parameters(dtype)
    optimizer = AdamW(grouped(params))
    for _ in range(5):
        set_gradients(params)
        optimizer.step()
    resumed_params = copy.deepcopy(params)
    resumed = AdamW(grouped(resumed_params))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in flat(resumed_params):
        assert resumed.state[p]["step"] == 5
        assert resumed.state[p]["m"].dtype == resumed.state[p]["v"].dtype == torch.float32
    for _ in range(5):
        set_gradients(params, resumed_params)
        optimizer.step()
        resumed.step()
    assert all(map(torch.equal, flat(params), flat(resumed_params)))


def test_loaded_state_is_a_copy():
    """State taken from a living optimizer: the two then go on without touching each other's means or counts."""
    source, target = (torch.nn.Parameter(torch.ones(100)) for _ in range(2))
    ours, loaded = AdamW([source]), AdamW([target])
    source.grad = torch.ones(100)
    ours.step()
    loaded.load_state_dict(ours.state_dict())
    ours.step()
    assert (ours.state[source]["step"], loaded.state[target]["step"]) == (2, 1)
    assert (ours.state[source]["m"] > loaded.state[target]["m"]).all()


def test_parameter_without_gradient_is_left_alone():
    """As torch does; when its gradient comes, it starts at step 1."""
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamW([used, unused], lr=0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused, torch.ones(3)) and unused not in optimizer.state
    unused.grad = torch.ones(3)
    optimizer.step()
    assert (optimizer.state[used]["step"], optimizer.state[unused]["step"]) == (2, 1)


def test_closure_sees_gradients_and_its_loss_is_returned():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0  # pyright: ignore[reportArgumentType]
    assert (p < 1).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
    ],
)
def test_bad_settings_are_refused(settings: dict):
    with pytest.raises(ValueError):
        AdamW([torch.nn.Parameter(torch.ones(3))], **settings)
