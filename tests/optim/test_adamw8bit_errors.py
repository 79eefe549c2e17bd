"""What AdamW8bit refuses, what it lets be seen, and what may be loaded into it."""

import copy
import math

import pytest
import torch

from minift import AdamW8bit

BLOCK = 256


@pytest.mark.parametrize(("n", "mean"), [(5000, "m_absmax"), (100, "m_fp32")])
def test_loaded_state_is_a_copy(n: int, mean: str):
    """State taken from a living optimizer: the two then go on without touching each other's means or counts."""
    source, target = (torch.nn.Parameter(torch.ones(n)) for _ in range(2))
    ours, loaded = AdamW8bit([source]), AdamW8bit([target])
    source.grad = torch.ones(n)
    ours.step()
    loaded.load_state_dict(ours.state_dict())
    ours.step()
    ours_state, loaded_state = (each.state["group0"] for each in (ours, loaded))  # pyright: ignore[reportArgumentType]
    assert (ours_state["step"], loaded_state["step"]) == (2, 1)
    assert (ours_state[mean][0] > loaded_state[mean][0]).all()


@pytest.mark.parametrize("n", [5000, 100])
def test_missing_gradient_is_refused(n: int):
    """Skipping it would leave its momentum as it was, one step behind the group's step count."""
    params = [torch.nn.Parameter(torch.randn(n)) for _ in range(3)]
    optimizer = AdamW8bit(params)
    params[0].grad = torch.randn(n)
    with pytest.raises(ValueError, match="2 of 3"):
        optimizer.step()


def test_refused_step_changes_nothing():
    """All parameters are checked before the first is moved: one can add the gradient and step again."""
    large, small = torch.nn.Parameter(torch.randn(5000)), torch.nn.Parameter(torch.randn(10))
    theirs_params = copy.deepcopy([large, small])
    ours, theirs = AdamW8bit([large, small]), AdamW8bit(theirs_params)
    gradients = [torch.randn(5000), torch.randn(10)]
    large.grad = gradients[0]
    with pytest.raises(ValueError):
        ours.step()
    assert torch.equal(large, theirs_params[0])
    small.grad = gradients[1]
    for p, gradient in zip(theirs_params, gradients, strict=True):
        p.grad = gradient.clone()
    ours.step()
    theirs.step()
    assert torch.equal(large, theirs_params[0]) and torch.equal(small, theirs_params[1])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -1.0}, "lr"), ({"lr": math.nan}, "lr"), ({"lr": math.inf}, "lr"), ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"), ({"betas": (1.0, 0.9)}, "betas"), ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.9,)}, "betas"), ({"order": "adam"}, "order"),
        ({"paged": True, "page_bytes": 4096, "budget_bytes": 4095}, "budget_bytes"),
        ({"paged": True, "page_bytes": 519, "budget_bytes": 4095}, "520"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict, said: str):
    with pytest.raises(ValueError, match=said):
        AdamW8bit([torch.nn.Parameter(torch.ones(3))], **settings)


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"order": "adam"}])
def test_bad_settings_of_a_group_are_refused(settings: dict):
    with pytest.raises(ValueError):
        AdamW8bit([{"params": [torch.nn.Parameter(torch.ones(3))], **settings}])


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="float64"):
        AdamW8bit([torch.nn.Parameter(torch.ones(3, dtype=torch.float64))])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("n", [5000, 100])
def test_bad_gradients_are_not_hidden(n: int, bad: float):
    """They reach the parameter at once, and in 8 bits the rest of the block in the next step, through its scale."""
    p = torch.nn.Parameter(torch.ones(n))
    optimizer = AdamW8bit([p])
    p.grad = torch.ones(n)
    p.grad[50] = bad
    optimizer.step()
    assert p.isnan().nonzero().flatten().tolist() == [50]
    p.grad[50] = 1.0
    optimizer.step()
    assert int(p.isnan().sum()) == (BLOCK if n == 5000 else 1)


def test_autograd_notices_the_step():
    """A parameter that a graph still needs has been changed in place: backward says so, as for torch's optimizers."""
    for n in (5000, 100):
        p = torch.nn.Parameter(torch.ones(n))
        loss = p.square().sum()
        p.grad = torch.ones(n)
        AdamW8bit([p]).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_state_of_an_older_version_loads():
    """Groups saved without the newer settings keep what the optimizer was made with."""
    p = torch.nn.Parameter(torch.randn(5000))
    p.grad = torch.randn(5000)
    old, new = AdamW8bit([p]), AdamW8bit([p], order="bnb", seed=3)
    old.step()
    saved = old.state_dict()
    for name in ("order", "stochastic_rounding", "seed"):
        del saved["param_groups"][0][name]
    new.load_state_dict(saved)
    assert new.param_groups[0]["order"] == "bnb" and new.param_groups[0]["seed"] == 3
    new.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler that opcheck imports
@pytest.mark.parametrize("eight_bit", [True, False])
def test_operator_passes_opcheck(eight_bit: bool):
    """It changes what its schema says it changes, and nothing else."""
    params, grads = [torch.randn(300), torch.randn(40).bfloat16()], [torch.randn(300), torch.randn(40).bfloat16()]
    state: list = [torch.zeros(768), torch.zeros(768), None, None]
    if eight_bit:
        state = [torch.full((768,), 127, dtype=torch.uint8), torch.zeros(768, dtype=torch.uint8)]
        state += [torch.zeros(3), torch.zeros(3)]
    numbers = [0.9, 1.0, 0.9, 0.1, 0.999, 0.001, 1e-3, 1e-8]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.minift.adamw8bit_.default, (params, grads, *state, numbers, True, 5, 0), test_utils=checks
    )
