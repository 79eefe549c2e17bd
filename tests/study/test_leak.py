"""Wrong masks are noticed by both checks, and the right ones pass them."""

import math

import pytest
import torch

from minift.model.attention import ATTENTION
from minift.study.leak import MASKS, mask_after_softmax, mask_one_too_far, no_mask, noise_losses, seen_ahead, tiny_model

IDS = torch.randint(16, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ATTENTION)
def test_no_attention_of_the_library_sees_ahead(name: str):
    assert seen_ahead(tiny_model(ATTENTION[name]), IDS) == 0


@pytest.mark.parametrize("name", MASKS)
def test_wrong_masks_see_ahead(name: str):
    moved = seen_ahead(tiny_model(MASKS[name]), IDS)
    assert moved == 0 if name == "mask before the softmax" else moved > 1e-4


def test_what_each_mistake_computes():
    """One head of three tokens with scores of 0 everywhere: by hand."""
    q, k = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2)
    v = torch.tensor([[3.0, 0], [0, 3], [3, 3]])[None, None]
    assert torch.allclose(mask_after_softmax(q, k, v)[0, 0], torch.tensor([[1.0, 0], [1, 1], [2, 2]]))
    assert torch.allclose(mask_one_too_far(q, k, v)[0, 0], torch.tensor([[1.5, 1.5], [2, 2], [2, 2]]))
    assert torch.allclose(no_mask(q, k, v)[0, 0], torch.tensor([[2.0, 2]] * 3))


def test_grouped_heads_find_their_values():
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.allclose(no_mask(q, k, v), whole, atol=1e-5)
    assert torch.allclose(mask_one_too_far(q, k, v)[:, :, -2:], whole[:, :, -2:], atol=1e-5)
    assert torch.allclose(mask_after_softmax(q, k, v)[:, :, -1], whole[:, :, -1], atol=1e-5)


def test_noise_cannot_be_predicted_but_by_looking():
    """The mean of 512 losses of a model that knows nothing is off by less than 0.05 from log 16, see the first steps of
    training, where it is above."""
    honest = noise_losses(tiny_model(MASKS["mask before the softmax"]), steps=60)
    looked = noise_losses(tiny_model(MASKS["one token too far"]), steps=60)
    assert min(honest) > math.log(16) - 0.05
    assert looked[-1] < 0.1 < 2 < looked[0]
    assert len(honest) == 60


def test_the_wrong_place_of_the_mask_is_enough():
    """No later token has a weight, and the loss falls below what is possible."""
    assert noise_losses(tiny_model(mask_after_softmax), steps=80)[-1] < math.log(16) - 1


def test_runs_repeat_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    first, second = (noise_losses(tiny_model(no_mask), steps=3) for _ in range(2))
    assert first == second and torch.equal(torch.get_rng_state(), state)
    assert noise_losses(tiny_model(no_mask, seed=1), steps=1) != first[:1]
