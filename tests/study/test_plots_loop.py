"""Stages, schedules and loops in disorder: their numbers against torch and arithmetic, and what is drawn of them."""

from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from pictures import texts
from transformers import get_scheduler

from minift.adapters.lora import LoraConfig
from minift.study.book_memory import OPT_PARAMETERS
from minift.study.book_tables import OPT_350M
from minift.study.loop_mistakes import LOOPS, ROWS, WIDTH, WILD, run_loop, run_loops
from minift.study.plots.loop import loop_mistakes, schedule_curves, training_loop
from minift.study.setting import Setting
from minift.study.shrinking import STAGES, Shrinking, shrinking

PLAIN = Setting(OPT_350M, batch=4, length=256, attention="eager", optimizer="adamw")


@pytest.fixture(scope="module")
def parts() -> dict[str, Shrinking]:
    return {part.part: part for part in shrinking(PLAIN)}


# --- stages -----------------------------------------------------------------------------------------------------------


def test_the_stages_of_equation_5_1(parts: dict[str, Shrinking]):
    """bf16 weights and gradients take 2 bytes a parameter, Adam's state 8; the rest is the ledger's."""
    assert parts["weights"].bytes == parts["gradients"].bytes == 2 * OPT_PARAMETERS
    assert parts["optimizer"].bytes == pytest.approx(8 * OPT_PARAMETERS, rel=1e-6)  # and a step count a tensor
    assert [part.stage for part in parts.values()] == sorted(part.stage for part in parts.values())
    assert {part.stage for part in parts.values()} == set(range(len(STAGES)))


def test_what_each_technique_leaves(parts: dict[str, Shrinking]):
    activations, optimizer, gradients = parts["activations"], parts["optimizer"], parts["gradients"]
    assert activations.left["accumulation"] == pytest.approx(activations.bytes / 4, rel=0.02)
    assert activations.left["checkpointing"] < activations.bytes / 8
    # Written out, each layer keeps n_heads * s^2 probabilities a row in 2 bytes.
    scores = 24 * 4 * 16 * 256**2 * 2
    assert activations.bytes - activations.left["fused attention"] == pytest.approx(scores, rel=0.1)
    assert optimizer.left["8-bit state"] == pytest.approx(optimizer.bytes / 4, rel=0.03)
    assert optimizer.left["LoRA"] < 0.02 * optimizer.bytes and gradients.left["LoRA"] < 0.03 * gradients.bytes
    assert parts["weights"].left["NF4 and LoRA"] < 0.4 * parts["weights"].bytes
    assert parts["batch"].left["accumulation"] * 4 == parts["batch"].bytes


def test_accumulation_leaves_gradients_and_optimizer_as_they_are(parts: dict[str, Shrinking]):
    """Equation 5.6 says otherwise."""
    for name in ("gradients", "optimizer"):
        assert parts[name].left["accumulation"] == parts[name].bytes


@pytest.mark.parametrize("changed", [
    {"lora": LoraConfig()}, {"checkpointing": True}, {"batch": 1}, {"accumulation": 2}, {"attention": "sdpa"},
    {"attention": None}, {"optimizer": "adamw8bit"},
])  # fmt: skip
def test_it_starts_from_a_plain_step(changed: dict):
    with pytest.raises(ValueError, match="start from a plain step"):
        shrinking(replace(PLAIN, **changed))


def test_the_bars_of_the_stages(parts: dict[str, Shrinking], figures: list[Figure]):
    training_loop(list(parts.values()), "a title")
    (axes,) = figures[0].axes
    widths = [bar.get_width() for bar in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert widths == [size / 1e6 for part in parts.values() for size in (part.bytes, *part.left.values())]
    written = texts(figures[0])
    assert all(f"stage {number}\n{name}" in written for number, name in enumerate(STAGES))
    assert "662 MB" in written and "with checkpointing" in written and "a title" in written
    hatches = [bar.get_hatch() for bar in axes.patches]
    assert hatches == [mark for part in parts.values() for mark in ("", *["//"] * len(part.left))]
    with pytest.raises(ValueError, match="nothing to draw"):
        training_loop([])


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_the_curves_are_transformers(figures: list[Figure]):
    schedule_curves(20, 4, 3e-4)
    lines = {line.get_label(): line for line in figures[0].axes[0].get_lines()}
    for ours, theirs in (("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
        scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=4, num_training_steps=20)
        rates = []
        for _ in range(20):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        assert torch.as_tensor(lines[ours].get_ydata()).tolist() == pytest.approx(rates, abs=1e-12)
    assert len({line.get_linestyle() for line in lines.values()}) == 3


# --- lines in the wrong order -----------------------------------------------------------------------------------------


def test_the_right_order_is_what_torch_does_by_hand():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, ROWS, WIDTH, generator=generator).double()
    true = torch.randn(WIDTH, generator=generator).double()
    y = x @ true + 0.1 * torch.randn(40, ROWS, generator=generator).double()
    w, losses = torch.zeros(WIDTH).double(), []
    for step in range(40):
        losses.append(float(((x @ w - y) ** 2).mean()))
        target = y[step] * (100 if step == WILD else 1)
        grad = 2 * x[step].T @ (x[step] @ w - target) / ROWS
        w = w - 0.1 * grad * min(1.0, 1.0 / (float(grad.norm()) + 1e-6))
    run = run_loop(LOOPS["right"])
    assert run.losses[:-1] == pytest.approx(losses, rel=1e-3)  # fp32 against fp64, 40 steps
    assert max(run.norms) <= 1 + 1e-5


def test_each_mistake_does_its_harm():
    runs = run_loops()
    right = runs["right"].losses
    assert max(right[WILD + 1 :]) < 1.1 * right[WILD]  # clipped
    assert runs["clipped after step"].losses[WILD + 1] > 100 * right[WILD + 1]
    assert max(runs["clipped after step"].norms) > 100
    assert runs["never cleared"].losses[-1] > 3 * right[-1]
    late = runs["step before backward"].losses
    assert late[0] == late[1] and late[-1] == pytest.approx(right[-1], rel=0.1)


def test_the_curves_of_the_loops(figures: list[Figure]):
    runs = run_loops()
    loop_mistakes(runs)
    lines = figures[0].axes[0].get_lines()
    for line, (name, run) in zip(lines, runs.items(), strict=False):
        assert tuple(torch.as_tensor(line.get_ydata()).tolist()) == run.losses and str(line.get_label()).startswith(
            name
        )
    assert len({line.get_linestyle() for line in lines[:4]}) == 4
