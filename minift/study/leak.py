"""Seeing the future: a wrong mask, and the two ways to notice it.

A decoder predicts each token from those before it. If its attention sees more, training copies the answer instead of
guessing it: the loss falls nicely, falls below anything possible, and the model generates nonsense, since the future is
not there then. Nothing raises an error. Two checks find it at once:

    change the last token    no logits of earlier positions may move (`seen_ahead`)
    train on noise           of v equally likely tokens nobody can predict the next: the loss stays at log v
                             (`noise_losses`); whatever falls below has looked

Three mistakes, each an attention for a model:

    mask after the softmax   later tokens get the weight 0, but stay in the sum that all weights are divided by. Rows no
                             longer add up to 1, and by how much they fail to tells of the future
    one token too far        the diagonal of the mask is off by one: each token sees the next one, its own label
    no mask                  as in an encoder
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.model.attention import Attend, Visible, attention_steps, eager, repeat_heads
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.optim.adamw import AdamW


def mask_after_softmax(
    q_bhse: Tensor,
    k_bgte: Tensor,
    v_bgte: Tensor,
    visible: Visible | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Wrong: the weights of later tokens are set to 0 after the softmax has divided by a sum that holds them."""
    steps = attention_steps(q_bhse, k_bgte, v_bgte, visible, scale, softcap)
    return (steps.scores_bhst.softmax(-1) * steps.mask) @ repeat_heads(v_bgte, q_bhse.shape[1])


def mask_one_too_far(
    q_bhse: Tensor,
    k_bgte: Tensor,
    v_bgte: Tensor,
    visible: Visible | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Wrong: each token sees the next one, too."""
    steps = attention_steps(q_bhse, k_bgte, v_bgte, visible, scale, softcap)
    mask_st = torch.ones_like(steps.scores_bhst[0, 0], dtype=torch.bool).tril(1)
    return steps.scores_bhst.masked_fill(~mask_st, -torch.inf).softmax(-1) @ repeat_heads(v_bgte, q_bhse.shape[1])


def no_mask(
    q_bhse: Tensor,
    k_bgte: Tensor,
    v_bgte: Tensor,
    visible: Visible | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Wrong for a decoder: each token sees all."""
    steps = attention_steps(q_bhse, k_bgte, v_bgte, visible, scale, softcap)
    return steps.scores_bhst.softmax(-1) @ repeat_heads(v_bgte, q_bhse.shape[1])


MASKS: dict[str, Attend] = {
    "mask before the softmax": eager,
    "mask after the softmax": mask_after_softmax,
    "one token too far": mask_one_too_far,
    "no mask": no_mask,
}


def tiny_model(attend: Attend, vocabulary: int = 16, seed: int = 0) -> CausalLM:
    """Two random Llama blocks of width 32 that attend like this."""
    config = ModelConfig.from_dict({
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    })  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CausalLM(config)
    model.attention = attend
    return model


def noise_losses(model: CausalLM, steps: int = 120, seed: int = 1) -> list[float]:
    """Train on rows of random tokens, new ones in each step, and return the loss of each; log(vocabulary) is the floor.

    Args:
        steps: of AdamW, 32 rows of 16 tokens each. The model is changed.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer, losses = AdamW(model.parameters(), lr=0.01, weight_decay=0.0), []
    for _ in range(steps):
        ids_bs = torch.randint(model.config.vocab_size, (32, 16), generator=generator)
        loss = F.cross_entropy(model(ids_bs)[:, :-1].flatten(0, 1), ids_bs[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def seen_ahead(model: CausalLM, input_ids_bs: Tensor) -> float:
    """How far the logits of all positions but the last move when the last token is another: 0 for a decoder."""
    other_bs = input_ids_bs.clone()
    other_bs[:, -1] = (other_bs[:, -1] + 1) % model.config.vocab_size
    with torch.no_grad():
        return (model(input_ids_bs) - model(other_bs))[:, :-1].abs().max().item()
