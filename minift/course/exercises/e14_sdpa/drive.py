"""e14: writes down what scaled_dot_product_attention is given. Replaced here, before the submission is loaded."""

import functools

import torch.nn.functional as F

calls = []
original = F.scaled_dot_product_attention


@functools.wraps(original)
def noted(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **rest):
    calls.append({"attn_mask": attn_mask is not None, "is_causal": bool(is_causal)})
    return original(query, key, value, attn_mask, dropout_p, is_causal, **rest)


F.scaled_dot_product_attention = noted


def arguments(student, **given):
    """For each call of the kernel that one call of attention makes: is there a mask, is is_causal set."""
    calls.clear()
    student.attention(**given)
    return list(calls)
