"""Attention: every token takes a weighted mean of the values of the tokens it may see.

    softmax(Q K^T / sqrt(e) + mask) V

`eager` writes each step out and holds the score matrix of s x t numbers per head in memory; `sdpa` hands the same
formula to PyTorch's fused kernel, which never stores the scores. Same signature, same numbers up to rounding. For rows
of less than about 100 tokens on a CPU the written-out form is the faster one: 5.4 against 13.9 ms forward and backward
for 16 rows of 49 tokens, 9 heads, bf16, on two cores of an AMD EPYC.

Which token may see which is decided once per forward pass, from *document numbers* (one integer a token; see
`document_mask`), so padding, packing and the key/value cache need no masks of their own:

    documents   0 0 0 1 1 -1         key  0 1 2 3 4 5
                              query 0     x
                                    1     x x
                                    2     x x x
                                    3           x          a packed row: two documents, one pad
                                    4           x x
                                    5               x      padding sees itself: a row without any key would be NaN

Layers with a *sliding window* of w see the last w tokens only, themselves included (Mistral); over many layers the
reach adds up.

A micro-batch whose rows all begin alike (the same system message, say) can be laid out with that beginning once:

    prefix | rest of row 0 | rest of row 1 | ...       one flat sequence for everything but attention; see
    `after_prefix`

Grouped queries: key/value head g serves h/g query heads in turn.

Sources: Attention Is All You Need, arXiv 1706.03762; GQA, arXiv 2305.13245; the order of casts is that of transformers
(`eager_attention_forward`, `sdpa_attention_forward`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # q, k, v, mask -> out


def document_mask(documents_bs: Tensor, documents_bt: Tensor, window: int | None = None) -> Tensor:
    """Which query may see which key: same document, not later in the row, not too far back. bool [b, 1, s, t].

    Args:
        documents_bs: document number of each query; the queries are the last s of the t tokens of their row.
        documents_bt: document number of each key.
        window: how many tokens a query sees, itself included; None is no limit.
    """
    s, t = documents_bs.shape[1], documents_bt.shape[1]
    causal_st = causal_mask(s, t, documents_bt.device, window)
    return (documents_bs[:, None, :, None] == documents_bt[:, None, None, :]) & causal_st


def eager(q_bhse: Tensor, k_bgte: Tensor, v_bgte: Tensor, mask: Tensor | None) -> Tensor:
    """Attention step by step. mask: bool, broadcastable to [b, h, s, t]; None is causal. Returns [b, h, s, e]."""
    if mask is None:
        mask = causal_mask(q_bhse.shape[2], k_bgte.shape[2], q_bhse.device)
    return EagerAttention.apply(q_bhse, k_bgte, v_bgte, mask)


class EagerAttention(torch.autograd.Function):
    """The formula and its gradient, with S = Q K^T / sqrt(e), P = softmax(S), O = P V:

        dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(dP * P))    dQ = dS K / sqrt(e)    dK = dS^T Q / sqrt(e)

    Only Q, K, V and P are kept for it; autograd would also keep P in fp32 and the repeated keys and values.
    """

    @staticmethod
    def forward(ctx, q_bhse: Tensor, k_bgte: Tensor, v_bgte: Tensor, mask: Tensor) -> Tensor:
        k_bhte, v_bhte = repeat_heads(k_bgte, q_bhse.shape[1]), repeat_heads(v_bgte, q_bhse.shape[1])
        score_bhst = (q_bhse @ k_bhte.transpose(2, 3)) * q_bhse.shape[-1] ** -0.5
        score_bhst = score_bhst.masked_fill(~mask, torch.finfo(score_bhst.dtype).min)
        # exp and the sum of t terms need fp32; the probabilities themselves fit the activation dtype.
        probability_bhst = score_bhst.softmax(dim=-1, dtype=torch.float32).to(q_bhse.dtype)
        ctx.save_for_backward(q_bhse, k_bgte, v_bgte, probability_bhst)
        return probability_bhst @ v_bhte

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_bhse, k_bgte, v_bgte, p_bhst = ctx.saved_tensors
        (do_bhse,) = grads
        heads, groups, scale = q_bhse.shape[1], k_bgte.shape[1], q_bhse.shape[-1] ** -0.5
        dv_bhte = p_bhst.transpose(2, 3) @ do_bhse
        dp_bhst = (do_bhse @ repeat_heads(v_bgte, heads).transpose(2, 3)).float()
        ds_bhst = p_bhst * (dp_bhst - (dp_bhst * p_bhst).sum(-1, keepdim=True))
        ds_bhst = ds_bhst.to(q_bhse.dtype) * scale
        dq_bhse = ds_bhst @ repeat_heads(k_bgte, heads)
        dk_bhte = ds_bhst.transpose(2, 3) @ q_bhse
        # A key/value head gets the gradients of all query heads that it serves.
        dk_bgte, dv_bgte = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk_bhte, dv_bhte))
        return dq_bhse, dk_bgte, dv_bgte, None


def sdpa(q_bhse: Tensor, k_bgte: Tensor, v_bgte: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's fused attention. Arguments and result as `eager`."""
    if mask is None:
        causal, grouped = q_bhse.shape[2] > 1, k_bgte.shape[1] != q_bhse.shape[1]
        return F.scaled_dot_product_attention(q_bhse, k_bgte, v_bgte, is_causal=causal, enable_gqa=grouped)
    # With a mask the fused kernels want one key/value head per query head; grouping would fall back to eager steps.
    k_bhte, v_bhte = repeat_heads(k_bgte, q_bhse.shape[1]), repeat_heads(v_bgte, q_bhse.shape[1])
    return F.scaled_dot_product_attention(q_bhse, k_bhte, v_bhte, attn_mask=mask)


ATTENTION = {"eager": eager, "sdpa": sdpa}


@dataclass(frozen=True)
class SharedPrefix:
    """How a flat sequence is divided: a prefix of `length` tokens, then rows of `rows[0]`, `rows[1]`, ... tokens."""

    length: int
    rows: tuple[int, ...]

    def slots(self, device: torch.device) -> Tensor:
        """Where each token behind the prefix stands once the rows are padded to the longest, int64 [sum(rows)]."""
        longest = max(self.rows)
        return torch.cat([torch.arange(n, device=device) + i * longest for i, n in enumerate(self.rows)])


def after_prefix(
    attend: Attend,
    shared: SharedPrefix,
    slots_n: Tensor,
    window: int | None,
    q_bhse: Tensor,
    k_bgse: Tensor,
    v_bgse: Tensor,
) -> Tensor:
    """Attention of a flat sequence [1, h, prefix + sum(rows), e]: every row sees the prefix and itself, causally.

    The rows' outputs and gradients are those they would have with the prefix in front of each of them; the prefix's own
    gradient is the sum over the rows. Rows are padded on the right for attention only.
    """
    length, count, longest = shared.length, len(shared.rows), max(shared.rows)
    beyond = window is not None and length > window
    prefix_mask = causal_mask(length, length, q_bhse.device, window) if beyond else None
    prefix_out = attend(q_bhse[:, :, :length], k_bgse[:, :, :length], v_bgse[:, :, :length], prefix_mask)

    def rows_of(x: Tensor) -> Tensor:  # [1, h, length + sum(rows), e] -> [count, h, longest, e]
        padded = x.new_zeros(x.shape[1], count * longest, x.shape[3]).index_copy(1, slots_n, x[0, :, length:])
        return padded.unflatten(1, (count, longest)).transpose(0, 1)

    def with_prefix(x: Tensor) -> Tensor:  # [count, g, length + longest, e]
        return torch.cat([x[:, :, :length].expand(count, -1, -1, -1), rows_of(x)], dim=2)

    mask_st = causal_mask(longest, length + longest, q_bhse.device, window)
    rows_out = attend(rows_of(q_bhse), with_prefix(k_bgse), with_prefix(v_bgse), mask_st)
    flat_out = rows_out.transpose(0, 1).flatten(1, 2).index_select(1, slots_n)
    return torch.cat([prefix_out, flat_out.unsqueeze(0)], dim=2)


def causal_mask(s: int, t: int, device: torch.device, window: int | None = None) -> Tensor:
    """True where query - window < key <= query, for the last s of t tokens. bool [s, t]."""
    mask_st = torch.ones(s, t, dtype=torch.bool, device=device).tril(t - s)
    return mask_st if window is None else mask_st.triu(t - s - window + 1)


def repeat_heads(x_bgte: Tensor, heads: int) -> Tensor:
    """Give each query head its key/value head: [b, g, t, e] -> [b, h, t, e]."""
    repeats = heads // x_bgte.shape[1]
    return x_bgte if repeats == 1 else x_bgte.repeat_interleave(repeats, dim=1)
