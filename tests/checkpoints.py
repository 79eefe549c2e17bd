"""Tiny random checkpoints of every family, made by transformers, and how to compare with it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import sdpa_mask

from minift.model.decoder import CausalLM

BASE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Divisors of longrope for the 8 pairs of a head of 16, and for the 6 pairs of three quarters of it.
SHORT, LONG = [1.0, 1.1, 1.2, 1.4, 1.6, 1.9, 2.3, 2.8], [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
# Windows are shorter than the inputs of the tests; contexts shorter than them where the name says "beyond".
FAMILY_CASES: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mistral without a window": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, window in the upper layer": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen3, listed layers, biases": {
        "model_type": "qwen3", "head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "smollm3, listed layers": {"model_type": "smollm3", "no_rope_layers": [0, 1], "tie_word_embeddings": False},
    "smollm3, window where it does not turn": {
        "model_type": "smollm3", "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4,
    },
    "phi3, window": {"model_type": "phi3", "sliding_window": 9},
    "phi3, part of a head turns": {"model_type": "phi3", "partial_rotary_factor": 0.75, "num_key_value_heads": 4},
    "phi3, longrope, within its context": {
        "model_type": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 256,
    },
    "phi3, longrope, beyond its context": {
        "model_type": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 20,
    },
    "phi3, longrope, part of a head": {
        "model_type": "phi3", "original_max_position_embeddings": 20, "tie_word_embeddings": False,
        "rope_parameters": LONGROPE | {
            "short_factor": SHORT[:6], "long_factor": LONG[:6], "partial_rotary_factor": 0.75,
        },
    },
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "gemma, wide heads": {"model_type": "gemma", "head_dim": 32, "num_key_value_heads": 1},
    # Caps low enough that every score and logit feels them.
    "gemma2, window, caps": {
        "model_type": "gemma2", "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma2 without caps": {
        "model_type": "gemma2", "head_dim": 16, "sliding_window": 7, "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "gemma3_text, two bases": {
        "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 7, "num_hidden_layers": 3,
        "sliding_window_pattern": 2, "query_pre_attn_scalar": 24, "rope_theta": 1e6,
    },
    "gemma3_text, stretched": {
        "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "opt": {"model_type": "opt", "ffn_dim": 96},
    "opt, narrow embedding, norms after": {
        "model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 24, "do_layer_norm_before": False,
    },
    "opt, no biases, bare norms": {
        "model_type": "opt", "ffn_dim": 96, "enable_bias": False, "layer_norm_elementwise_affine": False,
        "activation_function": "gelu", "tie_word_embeddings": False,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt2, own width, unscaled": {
        "model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 3, "n_inner": 80, "scale_attn_weights": False,
        "activation_function": "gelu", "tie_word_embeddings": False, "n_positions": 64,
    },
}  # fmt: skip
# One of each that differs where positions and neighbours matter.
FAMILY_NAMES = {
    "llama": {},
    "mistral": FAMILY_CASES["mistral"],
    "qwen2": FAMILY_CASES["qwen2, window in the upper layer"],
    "qwen3": FAMILY_CASES["qwen3"],
    "smollm3": FAMILY_CASES["smollm3, window where it does not turn"],
    "phi3": FAMILY_CASES["phi3, window"],
    "gemma": FAMILY_CASES["gemma"],
    "gemma2": FAMILY_CASES["gemma2, window, caps"],
    "gemma3_text": FAMILY_CASES["gemma3_text, two bases"],
    "opt": FAMILY_CASES["opt, narrow embedding, norms after"],
    "gpt2": FAMILY_CASES["gpt2"],
}


def checkpoint(folder: Path, **changes: Any) -> Path:
    """A random model in which no parameter has a value that would hide a mistake (norms 1, biases 0)."""
    settings: dict[str, Any] = {"pad_token_id": None} | BASE | changes
    config = transformers.AutoConfig.for_model(settings.pop("model_type", "llama"), **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters()}
    with torch.no_grad():
        for value in model.parameters():
            noise = 0.1 * torch.randn(value.shape)
            value.copy_(1 + noise if id(value) in norms else noise)
    model.save_pretrained(folder)
    return folder


def load_theirs(folder: Path, attention: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=dtype)


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The formula in the dtype of its inputs, no shortcuts: transformers' own kernels take the softmax in fp32, and
    their mask of the lowest float64 is an infinity there."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    s, t = scores.shape[-2:]
    seen = torch.ones(s, t, dtype=torch.bool).tril(t - s) if attention_mask is None else attention_mask
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2), None


transformers.AttentionInterface.register("exact", exact_attention)
transformers.AttentionMaskInterface.register("exact", sdpa_mask)


def in_fp64(theirs: nn.Module) -> nn.Module:
    """A copy in float64, attention and all."""
    model = copy.deepcopy(theirs).double()
    model.set_attn_implementation("exact")  # pyright: ignore[reportCallIssue]
    return model


def assert_close(run: Callable[[nn.Module], Tensor], ours: Tensor, theirs: nn.Module, roundings: int = 4) -> None:
    """Both libraries evaluate the same formula in fp32, each with a rounding error of about

        E = max |theirs in fp32 - theirs in fp64|

    which is measured on the same input. Two such errors may add up, and E is itself one sample, so ours may differ from
    theirs by 4 E (`roundings`; twice that where ours is another algorithm: flash subtracts a sum that it takes from its
    rounded output).
    """
    with torch.no_grad():
        expected, exact = run(theirs), run(in_fp64(theirs))
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype == torch.float32
    rounding = (expected - exact).abs().max().item()
    assert 0 < rounding < 1e-4  # the reference itself is sound
    assert (ours - expected).abs().max().item() <= roundings * rounding


Gradients = dict[str, Tensor]


def gradients(model: nn.Module, loss: Tensor) -> Gradients:
    """Of every parameter, as the checkpoint stores it: GPT-2's linears are transposed."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    if isinstance(model, CausalLM) and model.config.family.transposed:
        found |= {name: grad.t() for name, grad in found.items() if ".c_" in name and grad.dim() == 2}
    return found


def assert_gradients_close(
    loss: Callable[[nn.Module], Tensor], ours: Gradients, theirs: nn.Module, roundings: int = 4
) -> None:
    """As assert_close, E relative to each tensor's largest entry, the worst of all tensors counting, so that a small
    tensor that happened to round luckily sets no bound of its own."""
    reference = in_fp64(theirs)
    expected, exact = gradients(theirs, loss(theirs)), gradients(reference, loss(reference))
    assert ours.keys() == expected.keys()
    # A constant added to every key changes no attention: such biases have no gradient but rounding.
    most = max(value.abs().max().item() for value in exact.values())
    largest = {name: value.abs().max().item() for name, value in exact.items()}
    largest = {name: value for name, value in largest.items() if value > 1e-12 * most}
    assert all("k_proj.bias" in name for name in exact.keys() - largest.keys())
    rounding = max((expected[name] - exact[name]).abs().max().item() / largest[name] for name in largest)
    assert 0 < rounding < 1e-3
    for name in largest:
        assert (ours[name] - expected[name]).abs().max().item() <= roundings * rounding * largest[name], name


def assert_as_close(mine: Gradients, other: Gradients, exact: Gradients) -> None:
    """Each tensor of mine within four times the largest relative rounding error that `other` has, of `exact`."""
    largest = {key: value.abs().max().item() for key, value in exact.items()}
    assert min(largest.values()) > 0
    rounding = max((other[key] - exact[key]).abs().max().item() / largest[key] for key in exact)
    assert 0 < rounding < 1e-4
    for key, value in mine.items():
        assert (value - other[key]).abs().max().item() <= 4 * rounding * largest[key], key


def random_ids(config: Any, *shape: int) -> Tensor:
    """Not the special tokens: transformers' embedding gives the padding token no gradient."""
    return torch.randint(3, config.vocab_size, shape)
