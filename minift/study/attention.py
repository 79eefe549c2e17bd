"""Looking into attention: the textbook's heads, why scores are scaled, and every step of a real model.

    attention(Q, K, V) = softmax(Q K^T / sqrt(e)) V                   q . k = |q| |k| cos(angle between them)

A score is a cosine similarity that also grows with the lengths of its two vectors. *Heads*: the width d is cut into h
pieces of e = d/h, each piece attends for itself, and a last linear layer mixes what they found:

    x [b,s,d] --linear--> q, k, v [b,h,s,e] --> scores [b,h,s,s] --> probabilities --> context [b,s,d] --linear--> out

Everything has b s d numbers, but for the three that have b h s s. One row of 256 tokens, width 1024, 16 heads:

    q, k, v, context, out                   262,144 numbers each       grows with length
    scores, masked scores, probabilities  1,048,576 numbers each       grows with length squared

Written out, these three travel to memory and back: for one head, 5 tokens and e = 3, 160 numbers are read or written,
where a fused kernel reads q, k and v, writes the result and moves 60. At 1024 tokens, 2 rows, 16 heads and 16 bits,
each of the three is 67.1 MB. `sdpa` and `flash` (model/attention.py) never store them.

*Why divide by sqrt(e)?* The product of two random vectors of e numbers is a sum of e random terms, so it spreads like
sqrt(e). Without the division the softmax sees differences of dozens and puts all weight on one key. Its derivative,
p_i (1 [i = j] - p_j), is then next to 0 in most rows, and they learn nothing. `scaling_study(1024)`, 64 keys a query:

                 std of scores    entropy of a row                   derivative: mean    middle row
    q k^T                 32.1    0.11 nats (almost one key)                     0.06        0.0001
    q k^T / 32             1.0    3.68 nats (all alike: log 64 = 4.16)           0.18        0.18

Left out of the textbook's heads: biases, dropout, positions, grouped queries; the model has them, and `trace_attention`
shows them at work.

Source: Attention Is All You Need, arXiv 1706.03762.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.model.attention import Steps, Visible, attention_steps
from minift.model.decoder import CausalLM


class HeadSteps(NamedTuple):
    """What `multi_head_attention` computes, in order: see the picture in the module docstring.

    Attributes:
        masked_bhst: the scores, with minus infinity where a token would see a later one.
        context_bsd: what the heads found, side by side.
        out_bsd: mixed by the last linear layer.
    """

    q_bhse: Tensor
    k_bhte: Tensor
    v_bhte: Tensor
    scores_bhst: Tensor
    masked_bhst: Tensor
    probabilities_bhst: Tensor
    context_bsd: Tensor
    out_bsd: Tensor


def multi_head_attention(
    x_bsd: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    heads: int,
    scaled: bool = True,
    mask: bool = True,
) -> HeadSteps:
    """The textbook's self-attention, every step by name, in the dtype of x.

    Args:
        x_bsd: what the tokens are, any floating dtype.
        w_q, w_k, w_v, w_o: weights of the four linear layers, [d, d], out by in as in nn.Linear.
        heads: a divisor of d.
        scaled: divide the scores by sqrt(d / heads).
        mask: no token sees a later one.

    Raises:
        ValueError: d is no multiple of `heads`.
    """
    _check_heads(x_bsd.shape[-1], heads)
    q, k, v = (F.linear(x_bsd, w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (w_q, w_k, w_v))
    scores = q @ k.transpose(2, 3)
    if scaled:
        scores = scores / q.shape[-1] ** 0.5
    s = x_bsd.shape[1]
    seen_st = torch.ones(s, s, dtype=torch.bool, device=x_bsd.device)
    masked = scores.masked_fill(~(seen_st.tril() if mask else seen_st), -torch.inf)
    probabilities = masked.softmax(-1)
    context = (probabilities @ v).transpose(1, 2).flatten(2)
    return HeadSteps(q, k, v, scores, masked, probabilities, context, F.linear(context, w_o))


def element_counts(b: int, s: int, d: int, heads: int) -> dict[str, int]:
    """How many numbers each tensor of `HeadSteps` holds, by its name, without computing any.

    Raises:
        ValueError: d is no multiple of `heads`.
    """
    _check_heads(d, heads)
    return {name: b * heads * s * s if name.endswith("_bhst") else b * s * d for name in HeadSteps._fields}


def _check_heads(d: int, heads: int) -> None:
    if heads < 1 or d % heads:
        raise ValueError(f"a width of {d} cannot be cut into {heads} heads; choose a divisor of {d}")


class ScoreStudy(NamedTuple):
    """What a softmax makes of rows of scores.

    Attributes:
        std: standard deviation of the scores.
        entropy: of the probabilities of a row, mean over rows, in nats: from 0 (one key) to log t (all alike).
        gradient: size of the derivative of a row's probabilities by its scores (Frobenius norm), mean over rows.
        median_gradient: the same of the row in the middle; a few rows with two close winners make up most of the mean.
    """

    std: float
    entropy: float
    gradient: float
    median_gradient: float


def study_scores(scores_nt: Tensor) -> ScoreStudy:
    """These numbers for n rows of t scores, any floating dtype, computed in float64."""
    scores_nt = scores_nt.double()
    p_nt = scores_nt.softmax(-1)
    # d p_i / d score_j = p_i (1 [i = j] - p_j)
    jacobian_ntt = torch.diag_embed(p_nt) - p_nt[:, :, None] * p_nt[:, None, :]
    size_n = torch.linalg.matrix_norm(jacobian_ntt)
    return ScoreStudy(
        std=scores_nt.std().item(),
        entropy=torch.special.entr(p_nt).sum(-1).mean().item(),
        gradient=size_n.mean().item(),
        median_gradient=size_n.quantile(0.5).item(),
    )


class ScalingStudy(NamedTuple):
    """The same scores as they are, and divided by sqrt(d_k)."""

    raw: ScoreStudy
    scaled: ScoreStudy


def scaling_study(d_k: int, queries: int = 512, keys: int = 64, seed: int = 0) -> ScalingStudy:
    """What dividing by sqrt(d_k) does to random queries and keys of d_k standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    q_se, k_te = (torch.randn(n, d_k, dtype=torch.float64, generator=generator) for n in (queries, keys))
    scores_st = q_se @ k_te.t()
    return ScalingStudy(study_scores(scores_st), study_scores(scores_st / d_k**0.5))


def trace_attention(
    model: CausalLM, input_ids_bs: Tensor, documents_bs: Tensor | None = None, positions_bs: Tensor | None = None
) -> list[Steps]:
    """The steps of every layer's attention on an input, first layer first. No gradients.

    While it runs, the model attends in eager steps that are written down, whatever it attends with otherwise. They hold
    about 3 b h s s numbers a layer: for short texts.

    Args:
        model: any; adapters, windows, soft caps and grouped queries included.
        input_ids_bs, documents_bs, positions_bs: as for calling the model.
    """
    steps: list[Steps] = []

    def record(
        q_bhse: Tensor, k_bgte: Tensor, v_bgte: Tensor, visible: Visible | None, scale: float | None, softcap: float
    ) -> Tensor:
        steps.append(attention_steps(q_bhse, k_bgte, v_bgte, visible, scale, softcap))
        return steps[-1].out_bhse

    attention, model.attention = model.attention, record
    try:
        with torch.no_grad():
            model.hidden(input_ids_bs, positions_bs, documents_bs)
    finally:
        model.attention = attention
    return steps
