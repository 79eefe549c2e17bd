"""TrainConfig refuses every bad value when it is made, and names the field: not a step, an hour or an epoch later."""

import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from minift.train.config import TrainConfig

INTEGERS = {
    "epochs": 1, "max_steps": 0, "batch_size": 1, "gradient_accumulation": 1, "warmup_steps": 0, "max_length": 2,
    "seed": 0, "save_every": 0, "log_every": 1, "keep_last": 1, "eval_every": 0, "patience": 0,
    "page_budget": 1,
}  # with the smallest value  # fmt: skip
NUMBERS = ("lr", "weight_decay", "max_grad_norm")
CHOICES = {
    "schedule": ("linear", "cosine", "constant"),
    "optimizer": ("adamw8bit", "adamw"),
    "decay_order": ("torch", "bnb"),
    "gradient_checkpointing": ("off", "on", "selective"),
    "loss_on": ("all", "completion", "assistant", "assistant_with_header"),
    "problems": ("stop", "drop"),
    "packing": ("none", "bfd", "bfd_split", "wrapped"),
}
SWITCHES = (
    "share_prefix", "shuffle", "group_by_length", "resume", "best", "tensorboard", "paged", "stochastic_rounding",
)  # fmt: skip

BELOW = [(name, least - 1) for name, least in INTEGERS.items()] + [(name, -100) for name in INTEGERS]
NEGATIVE = [("lr", 0), ("lr", 0.0), ("lr", -1e-4), ("weight_decay", -1e-9), ("max_grad_norm", -0.5)]
# An infinite max_grad_norm is harmless: it turns clipping off, as 0 does.
NOT_FINITE = [(name, value) for name in NUMBERS for value in (math.nan, -math.inf)]
NOT_FINITE += [("lr", math.inf), ("weight_decay", math.inf)]
NOT_WHOLE = [(name, value) for name in INTEGERS for value in (2.5, math.nan, math.inf)]
UNKNOWN = [(name, value) for name in CHOICES for value in ("nonsense", "", None, "Linear", 1)]
WRONG_TYPE = [(name, value) for name in (*INTEGERS, *NUMBERS) for value in ("3", None, [1])]
WRONG_TYPE += [(name, value) for name in SWITCHES for value in ("no", None, [])]


def test_every_field_is_covered():
    covered = {*INTEGERS, *NUMBERS, *CHOICES, *SWITCHES, "output_dir", "cache"}
    assert covered == {setting.name for setting in fields(TrainConfig)}


@pytest.mark.parametrize(("name", "value"), BELOW + NEGATIVE)
def test_values_out_of_range_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=rf"^{name} must be .*{value}"):
        TrainConfig(**{name: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("name", "value"), NOT_FINITE)
def test_numbers_that_are_not_finite_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("name", "value"), NOT_WHOLE)
def test_counts_must_be_whole(name: str, value: float):
    """epochs=2.5 is what transformers takes; here it would fail only in the middle of the run, without a name."""
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPE)
def test_other_types_are_refused_by_name(name: str, value: Any):
    with pytest.raises((ValueError, TypeError), match=name):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), UNKNOWN)
def test_unknown_choices_are_refused_and_the_known_ones_listed(name: str, value: Any):
    with pytest.raises(ValueError, match=f"unknown {name} ") as caught:
        TrainConfig(**{name: value})
    assert all(choice in str(caught.value) for choice in CHOICES[name])


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CHOICES.items() for value in values])
def test_every_choice_is_accepted(name: str, value: Any):
    assert getattr(TrainConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"), [*INTEGERS.items(), ("lr", 1e-12), ("weight_decay", 0), ("max_grad_norm", 0), ("lr", 1)]
)
def test_the_smallest_values_are_accepted(name: str, value: Any):
    assert getattr(TrainConfig(**{name: value}), name) == value


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="learning_rate"):
        TrainConfig(learning_rate=1e-3)  # pyright: ignore[reportCallIssue]


def test_a_config_does_not_change():
    with pytest.raises(FrozenInstanceError):
        TrainConfig().lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_every_field_has_a_help_text_and_its_choices():
    for setting in fields(TrainConfig):
        assert setting.metadata["help"].endswith(".")
        assert setting.metadata["choices"] == CHOICES.get(setting.name)


def test_batches_by_length_are_drawn_at_random():
    with pytest.raises(ValueError, match="group_by_length draws batches in random order: leave shuffle on"):
        TrainConfig(group_by_length=True, shuffle=False)


@pytest.mark.parametrize("setting", [{"patience": 1}, {"best": True}], ids=str)
def test_what_compares_evaluations_needs_some(setting: dict[str, Any]):
    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name} compares evaluations during the run: set eval_every"):
        TrainConfig(**setting)
    assert TrainConfig(**setting, eval_every=1).eval_every == 1


@pytest.mark.parametrize("setting", [{"paged": True}, {"stochastic_rounding": True}, {"decay_order": "bnb"}], ids=str)
def test_what_only_the_8_bit_optimizer_has_is_not_silently_left_out(setting: dict[str, Any]):
    (name,) = setting
    with pytest.raises(ValueError, match=rf"^{name} (True|bnb) needs optimizer adamw8bit, got adamw"):
        TrainConfig(**setting, optimizer="adamw")
    assert getattr(TrainConfig(**setting), name) == setting[name]


@pytest.mark.parametrize(
    ("given", "name", "taken"),
    [("off", "off", False), ("on", "on", True), ("selective", "selective", "selective"), (False, "off", False),
     (True, "on", True)],
)  # fmt: skip
def test_gradient_checkpointing_by_name_or_as_a_truth_value(given: Any, name: str, taken: Any):
    config = TrainConfig(gradient_checkpointing=given)
    assert (config.gradient_checkpointing, config.checkpointing) == (name, taken)
