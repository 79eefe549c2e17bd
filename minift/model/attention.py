"""Attention: every token takes a weighted mean of the values of the tokens it may see.

    softmax(Q K^T / sqrt(e) + mask) V

Three ways to compute it, same signature, same numbers up to rounding:

    eager    each step written out (`attention_steps` returns them all); holds s x t scores a head in memory
    sdpa     the same formula handed to PyTorch's fused kernel, which never stores the scores
    flash    the same formula in tiles, written here: flash.py and its Triton kernel; memory grows with s + t, and what
             may not be seen is not even looked at, so packed rows cost no more than their documents

For rows of less than about 100 tokens on a CPU the written-out form is the fastest: 5.4 against 13.9 ms (sdpa) forward
and backward for 16 rows of 49 tokens, 9 heads, bf16, on two cores of an AMD EPYC.

Who may see whom takes no matrix, only one integer a token: the *first key* that it sees. It sees every key from there
to itself. So padding, packing, windows and the key/value cache are all the same thing:

    documents   0 0 0 1 1 -1         key  0 1 2 3 4 5      first key
                              query 0     x                    0
                                    1     x x                  0
                                    2     x x x                0
                                    3           x              3          a packed row: two documents, one pad
                                    4           x x            3
                                    5               x          5          padding sees itself

Layers with a *sliding window* of w see the last w tokens only, themselves included (Mistral): first = query - w + 1, if
that is further on. Over many layers the reach adds up. A query whose first key is behind itself sees nothing and gets
zeros.

A micro-batch whose rows all begin alike (the same system message, say) can be laid out with that beginning once:

    prefix | rest of row 0 | rest of row 1 | ...       one flat sequence for everything but attention; see
    `after_prefix`

Grouped queries: key/value head g serves h/g query heads in turn. A *soft cap* c (Gemma 2) turns scores into
c tanh(score / c), so none exceeds c; PyTorch's kernel has no place for it, so sdpa refuses.

Sources: Attention Is All You Need, arXiv 1706.03762; GQA, arXiv 2305.13245; Gemma 2, arXiv 2408.00118; the order of
casts is that of transformers (`eager_attention_forward`, `sdpa_attention_forward`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minift.model.flash import flash_attention, last_queries


@dataclass(frozen=True)
class Visible:
    """Which keys each query sees: those from its first key up to itself.

    The queries are the last s of the t tokens. What the kernels need is derived once and kept for all layers.

    Attributes:
        first_bs: first key each query sees, int64 [b, s] or [1, s]; never falls along a row.
        keys: t.
        sees_itself: no query is without any key; known of the two ways below, so that nothing needs to be checked.
    """

    first_bs: Tensor
    keys: int
    sees_itself: bool = False

    @classmethod
    def of_documents(cls, documents_bt: Tensor, queries: int, window: int | None = None) -> "Visible":
        """A query sees the tokens of its own document (a run of equal numbers), and no more than the last `window`.

        Args:
            documents_bt: document number of each token.
            queries: how many of the last tokens are queries.
            window: how many tokens a query sees, itself included; None is no limit.
        """
        t = documents_bt.shape[1]
        slots_t = torch.arange(t, device=documents_bt.device)
        begins_bt = F.pad(documents_bt[:, 1:] != documents_bt[:, :-1], (1, 0), value=True)
        first_bt = torch.where(begins_bt, slots_t, 0).cummax(dim=1).values
        if window is not None:
            first_bt = first_bt.maximum(slots_t - window + 1)
        return cls(first_bt[:, t - queries :], t, sees_itself=True)

    @classmethod
    def within(cls, s: int, t: int, window: int | None, device: torch.device) -> "Visible":
        """The last s of t tokens see all that came before, or the last `window`."""
        first_s = torch.zeros(s, dtype=torch.long, device=device)
        if window is not None:
            first_s = (torch.arange(t - s, t, device=device) - window + 1).clamp(min=0)
        return cls(first_s.unsqueeze(0), t, sees_itself=True)

    @cached_property
    def mask(self) -> Tensor:
        """The same as a matrix, bool [b, 1, s, t]: true where the query may see the key."""
        slots_t = torch.arange(self.keys, device=self.first_bs.device)
        own_s = slots_t[self.keys - self.first_bs.shape[1] :]
        return ((slots_t >= self.first_bs[:, :, None]) & (slots_t <= own_s[:, None])).unsqueeze(1)

    def clear_blind(self, x_bhse: Tensor) -> Tensor:
        """Zeros for the queries that see nothing; the softmax of no scores is not a number."""
        if self.sees_itself:
            return x_bhse
        own_s = torch.arange(self.keys - self.first_bs.shape[1], self.keys, device=self.first_bs.device)
        return x_bhse.masked_fill((self.first_bs > own_s)[:, None, :, None], 0)

    @cached_property
    def last_bt(self) -> Tensor:
        """The other way round: the last query that sees each key."""
        return last_queries(self.first_bs, self.keys)


# q, k, v, who sees whom (None: all that came before), factor of the scores (None: 1 / sqrt(e)), soft cap (0: none)
Attend = Callable[[Tensor, Tensor, Tensor, Visible | None, float | None, float], Tensor]


class Steps(NamedTuple):
    """What happens within `eager`, in order.

    Attributes:
        scores_bhst: Q K^T, scaled and capped.
        mask: true where a query may see a key, bool, broadcastable to the scores.
        masked_bhst: the scores with the lowest number where they do not count.
        probabilities_bhst: their softmax; each row adds up to 1.
        out_bhse: the probabilities times V.
    """

    scores_bhst: Tensor
    mask: Tensor
    masked_bhst: Tensor
    probabilities_bhst: Tensor
    out_bhse: Tensor


def attention_steps(
    q_bhse: Tensor,
    k_bgte: Tensor,
    v_bgte: Tensor,
    visible: Visible | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Steps:
    """Attention step by step. Shapes: q [b, h, s, e], k and v [b, g, t, e]; the result has that of q."""
    visible = visible or Visible.within(q_bhse.shape[2], k_bgte.shape[2], None, q_bhse.device)
    scores = _scores(q_bhse, k_bgte, q_bhse.shape[-1] ** -0.5 if scale is None else scale, softcap)
    masked = _masked(scores, visible)
    probabilities = _probabilities(masked)
    out = visible.clear_blind(probabilities @ repeat_heads(v_bgte, q_bhse.shape[1]))
    return Steps(scores, visible.mask, masked, probabilities, out)


def _scores(q_bhse: Tensor, k_bgte: Tensor, scale: float, softcap: float) -> Tensor:
    scores = (q_bhse @ repeat_heads(k_bgte, q_bhse.shape[1]).transpose(2, 3)) * scale
    return (scores / softcap).tanh() * softcap if softcap else scores


def _masked(scores_bhst: Tensor, visible: Visible) -> Tensor:
    return torch.where(visible.mask, scores_bhst, torch.finfo(scores_bhst.dtype).min)


def _probabilities(masked_bhst: Tensor) -> Tensor:
    """exp and the sum of t terms need fp32 at least; the probabilities themselves fit the activation dtype."""
    exact = torch.promote_types(masked_bhst.dtype, torch.float32)
    return masked_bhst.softmax(dim=-1, dtype=exact).to(masked_bhst.dtype)


def eager(
    q_bhse: Tensor,
    k_bgte: Tensor,
    v_bgte: Tensor,
    visible: Visible | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention in the steps of `attention_steps`, keeping less of them for the backward pass."""
    visible = visible or Visible.within(q_bhse.shape[2], k_bgte.shape[2], None, q_bhse.device)
    scale = q_bhse.shape[-1] ** -0.5 if scale is None else scale
    return EagerAttention.apply(q_bhse, k_bgte, v_bgte, visible, scale, softcap)


class EagerAttention(torch.autograd.Function):
    """The formula and its gradient, with S = Q K^T * scale, P = softmax(S), O = P V:

        dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(dP * P))    dQ = dS K * scale    dK = dS^T Q * scale

    and dS times 1 - (S / c)^2 where the scores are capped to c. Only Q, K, V and P are kept for it (and S, if capped);
    autograd would also keep P in fp32 and the repeated keys and values.
    """

    @staticmethod
    def forward(ctx, q_bhse: Tensor, k_bgte: Tensor, v_bgte: Tensor, visible: Visible, scale: float, cap: float):
        s_bhst = _scores(q_bhse, k_bgte, scale, cap)
        capped_bhst = s_bhst if cap else None
        s_bhst = _masked(s_bhst, visible)  # the same name: each of them fills as much memory as all the rest
        p_bhst = _probabilities(s_bhst)
        ctx.visible, ctx.scale, ctx.cap = visible, scale, cap
        ctx.save_for_backward(q_bhse, k_bgte, v_bgte, p_bhst, capped_bhst)
        return visible.clear_blind(p_bhst @ repeat_heads(v_bgte, q_bhse.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_bhse, k_bgte, v_bgte, p_bhst, s_bhst = ctx.saved_tensors
        do_bhse = ctx.visible.clear_blind(grads[0])
        heads, groups = q_bhse.shape[1], k_bgte.shape[1]
        dv_bhte = p_bhst.transpose(2, 3) @ do_bhse
        exact = torch.promote_types(q_bhse.dtype, torch.float32)
        dp_bhst = (do_bhse @ repeat_heads(v_bgte, heads).transpose(2, 3)).to(exact)
        ds_bhst = dp_bhst.sub_((dp_bhst * p_bhst).sum(-1, keepdim=True)).mul_(p_bhst)  # in place of dP: it is large
        if ctx.cap:
            ds_bhst = ds_bhst * (1 - (s_bhst.to(exact) / ctx.cap).square())
        ds_bhst = ds_bhst.to(q_bhse.dtype).mul_(ctx.scale)
        dq_bhse = ds_bhst @ repeat_heads(k_bgte, heads)
        dk_bhte = ds_bhst.transpose(2, 3) @ q_bhse
        # A key/value head gets the gradients of all query heads that it serves.
        dk_bgte, dv_bgte = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk_bhte, dv_bhte))
        return dq_bhse, dk_bgte, dv_bgte, None, None, None


def sdpa(
    q_bhse: Tensor,
    k_bgte: Tensor,
    v_bgte: Tensor,
    visible: Visible | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """PyTorch's fused attention. Arguments and result as `attention_steps`; ValueError for a soft cap."""
    if softcap:
        raise ValueError("sdpa cannot cap scores (attn_logit_softcapping); choose attention 'eager' or 'flash'")
    (heads, s), (groups, t) = q_bhse.shape[1:3], k_bgte.shape[1:3]
    if s == 1:  # query heads of one key/value head are as good as queries of it: nothing needs to be repeated
        mask = None if visible is None else visible.mask
        out = F.scaled_dot_product_attention(
            q_bhse.reshape(-1, groups, heads // groups, q_bhse.shape[3]), k_bgte, v_bgte, attn_mask=mask, scale=scale
        ).reshape(q_bhse.shape)
    elif visible is None and s == t:
        return F.scaled_dot_product_attention(
            q_bhse, k_bgte, v_bgte, is_causal=True, enable_gqa=groups != heads, scale=scale
        )
    else:
        mask = (visible or Visible.within(s, t, None, q_bhse.device)).mask
        # With a mask the fused kernels want one key/value head for each query head; grouping would fall back to steps.
        k_bhte, v_bhte = repeat_heads(k_bgte, heads), repeat_heads(v_bgte, heads)
        out = F.scaled_dot_product_attention(q_bhse, k_bhte, v_bhte, attn_mask=mask, scale=scale)
    return out if visible is None else visible.clear_blind(out)


def flash(
    q_bhse: Tensor,
    k_bgte: Tensor,
    v_bgte: Tensor,
    visible: Visible | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Tiled attention (flash.py). Arguments and result as `attention_steps`."""
    if visible is None:
        return flash_attention(q_bhse, k_bgte, v_bgte, scale=scale, softcap=softcap)
    first_bs, last_bt = (x.expand(q_bhse.shape[0], -1) for x in (visible.first_bs, visible.last_bt))
    return flash_attention(q_bhse, k_bgte, v_bgte, first_bs, last_bt, scale, softcap)


ATTENTION: dict[str, Attend] = {"eager": eager, "sdpa": sdpa, "flash": flash}


@dataclass(frozen=True)
class SharedPrefix:
    """How a flat sequence is laid out: `length` tokens that all rows share, then the rows one behind the other."""

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
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of a flat sequence [1, h, prefix + sum(rows), e]: every row sees the prefix and itself, causally.

    The rows' outputs and gradients are those they would have with the prefix in front of each of them; the prefix's own
    gradient is the sum over the rows. Rows are padded on the right for attention only.
    """
    length, count, longest = shared.length, len(shared.rows), max(shared.rows)
    beyond = window is not None and length > window
    within = Visible.within(length, length, window, q_bhse.device) if beyond else None
    q_prefix, k_prefix, v_prefix = (x[:, :, :length] for x in (q_bhse, k_bgse, v_bgse))
    prefix_out = attend(q_prefix, k_prefix, v_prefix, within, scale, softcap)

    def rows_of(x: Tensor) -> Tensor:  # [1, h, length + sum(rows), e] -> [count, h, longest, e]
        padded = x.new_zeros(x.shape[1], count * longest, x.shape[3]).index_copy(1, slots_n, x[0, :, length:])
        return padded.unflatten(1, (count, longest)).transpose(0, 1)

    def with_prefix(x: Tensor) -> Tensor:  # [count, g, length + longest, e]
        return torch.cat([x[:, :, :length].expand(count, -1, -1, -1), rows_of(x)], dim=2)

    visible = Visible.within(longest, length + longest, window, q_bhse.device)
    rows_out = attend(rows_of(q_bhse), with_prefix(k_bgse), with_prefix(v_bgse), visible, scale, softcap)
    flat_out = rows_out.transpose(0, 1).flatten(1, 2).index_select(1, slots_n)
    return torch.cat([prefix_out, flat_out.unsqueeze(0)], dim=2)


def repeat_heads(x_bgte: Tensor, heads: int) -> Tensor:
    """Give each query head its key/value head: [b, g, t, e] -> [b, h, t, e]."""
    repeats = heads // x_bgte.shape[1]
    return x_bgte if repeats == 1 else x_bgte.repeat_interleave(repeats, dim=1)
