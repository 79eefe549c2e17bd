"""Passes watched: bytes and flops that can be counted by hand, gradients of autograd itself, silent mistakes."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minift.adapters.lora import LoraConfig
from minift.model.decoder import Checkpointing
from minift.study.again import (
    Pass,
    gradient_gap,
    run_blocks,
    same_gradients,
    tiny_model,
    toy_blocks,
    watch_model,
    watch_pass,
)

MB = 1_000_000
WAYS: dict[str, Checkpointing] = {"off": False, "on": True, "selective": "selective"}
IDS = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2500, 100)


def watched(blocks: nn.Module, x: torch.Tensor, again: bool = False, **options: object) -> Pass:
    torch.manual_seed(7)
    return watch_pass(lambda: run_blocks(blocks.children(), x, again, **options), blocks.parameters())


@pytest.mark.parametrize(("blocks", "depth"), [(8, 4), (4, 4), (16, 1)])
def test_what_is_kept_is_counted_by_hand(x: torch.Tensor, blocks: int, depth: int):
    """A tanh keeps its result of 1 MB; 8 bytes are the loss and its gradient. A block's input, its last result and
    those of its inside come back when it is computed again, and two more in its backward pass."""
    toy = toy_blocks(blocks, depth)
    kept, again = watched(toy, x), watched(toy, x, again=True)
    assert abs(kept.kept - blocks * depth * MB) <= 16
    assert abs(again.kept - blocks * MB) <= 16
    assert kept.peak > kept.kept and again.peak - again.kept <= (depth + 3) * MB + 16
    assert 0 < kept.turn < len(kept.history) < len(again.history)
    assert max(kept.history) == kept.peak and max(again.history) == again.peak


def test_gradients_are_those_of_autograd(x: torch.Tensor):
    toy = toy_blocks(3, 2)
    kept, again = watched(toy, x), watched(toy, x, again=True)
    assert all(p.grad is None for p in toy.parameters())
    loss = run_blocks(toy, x)
    theirs = torch.autograd.grad(loss, list(toy.parameters()))
    assert loss.item() == kept.loss == again.loss
    for taken in (kept, again):
        assert all(torch.equal(a, b) for a, b in zip(theirs, taken.gradients, strict=True) if b is not None)
        assert None not in taken.gradients
    assert same_gradients(kept, again) and gradient_gap(kept, again) == 0


def test_flops_are_those_of_pytorchs_counter(x: torch.Tensor):
    """And by hand: 2 n i o for each of 6 layers forward, twice that backward but for the first layer's input."""
    toy = toy_blocks(3, 2)
    taken = watched(toy, x)
    with FlopCounterMode(display=False) as theirs:
        run_blocks(toy, x).backward()
    one = 2 * 2500 * 100 * 100
    assert (taken.forward_flops, taken.backward_flops) == (6 * one, 11 * one)
    assert taken.flops == theirs.get_total_flops()
    assert watched(toy, x, again=True).flops == (6 + 6 + 11) * one


def test_gaps_are_lengths():
    three = torch.tensor([3.0])
    one = Pass(0.0, 0, 0, 0, 0, [], 0, [three, None, torch.tensor([0.0, 4.0])])
    other = Pass(0.0, 0, 0, 0, 0, [], 0, [three, None, torch.tensor([0.0, 1.0])])
    assert gradient_gap(one, other) == pytest.approx(3 / 5)
    assert not same_gradients(one, other) and same_gradients(one, one)
    with pytest.raises(ValueError, match="in one of the passes only"):
        gradient_gap(one, Pass(0.0, 0, 0, 0, 0, [], 0, [None, None, torch.zeros(2)]))


def test_other_random_numbers_go_unnoticed_but_for_the_gradients(x: torch.Tensor):
    toy = toy_blocks(4, 2, dropout=0.1)
    kept, saved, unsaved = watched(toy, x), watched(toy, x, True), watched(toy, x, True, preserve_rng_state=False)
    assert kept.loss == saved.loss == unsaved.loss
    assert same_gradients(kept, saved) and gradient_gap(kept, unsaved) > 0.1


@pytest.mark.parametrize("lora", [None, LoraConfig(r=8), LoraConfig(r=8, dropout=0.1)])
def test_a_models_gradients_are_equal_however_they_are_kept(lora: LoraConfig | None):
    model = tiny_model(lora, layers=2)
    passes = {name: watch_model(model, IDS, way) for name, way in WAYS.items()}
    assert all(same_gradients(passes["off"], taken) for taken in passes.values())
    assert passes["on"].kept < min(passes["off"].kept, passes["selective"].kept)


def test_what_it_costs():
    """Recomputing adds a product to three, of frozen layers to two; less, since the head is no block and the last
    product of each block is not needed again. Selective adds none, and keeps more than nothing with LoRA only."""
    full, lora = (
        {name: watch_model(tiny_model(config, layers=4), IDS, way) for name, way in WAYS.items()}
        for config in (None, LoraConfig(r=8))
    )
    assert 1.2 < full["on"].flops / full["off"].flops < 4 / 3
    assert 1.4 < lora["on"].flops / lora["off"].flops < 3 / 2
    for passes in (full, lora):
        assert passes["selective"].flops == passes["off"].flops
    assert full["selective"].kept < full["off"].kept
    assert lora["selective"].kept > lora["off"].kept


def test_nothing_is_drawn_from_the_global_generator():
    state = torch.get_rng_state()
    watch_model(tiny_model(LoraConfig(r=8, dropout=0.1), layers=1), IDS, True)
    assert torch.equal(torch.get_rng_state(), state)
