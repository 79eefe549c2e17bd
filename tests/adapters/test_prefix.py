"""Prefix tuning: what is in the cache, what the slots themselves compute, how many parameters. (Against PEFT:
test_prompt.py; packed, padded and cached rows: test_virtual.py.)
"""

from pathlib import Path

import pytest
import torch
from checkpoints import FAMILY_NAMES, checkpoint

import minift
from minift.adapters.inject import count_parameters
from minift.adapters.prefix import PrefixTuningConfig
from minift.adapters.prompt import PromptTuningConfig
from minift.adapters.ptuning import PTuningConfig
from minift.adapters.verbs import add_adapter
from minift.model.cache import KVCache
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM

N = 4


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_cache_holds_the_trained_numbers_bit_for_bit(tmp_path: Path, name: str, padded: bool):
    """After q and k norms and the rotation, in the slots of each row, layer by layer: keys, then values."""
    model = minift.load_model(checkpoint(tmp_path / "model", **FAMILY_NAMES[name]))
    add_adapter(model, PrefixTuningConfig(N, init="random"))
    config = model.config
    table = model.get_parameter("virtual.encoder.prompt_embeddings").detach()
    pads = (0, 3) if padded else (0, 0)
    documents = torch.tensor([[-1] * p + [0] * (7 - p) for p in pads]) if padded else None
    cache = KVCache(config, 2, 7 + N, model.dtype, model.device)
    model.hidden(torch.randint(3, 101, (2, 7)), documents_bs=documents, cache=cache)
    assert cache.length == 7 + N and all(layer.length == 7 + N for layer in cache.layers)
    g, e = config.num_key_value_heads, config.head_dim
    assert table.shape == (N, config.num_hidden_layers * 2 * g * e)
    for number, layer in enumerate(cache.layers):
        for which, found in enumerate((layer.k_bgte, layer.v_bgte)):
            for head in range(g):
                start = ((number * 2 + which) * g + head) * e
                for row, p in enumerate(pads):
                    assert torch.equal(found[row, head, p : p + N], table[:, start : start + e])


def test_what_the_slots_compute_is_never_seen(tmp_path: Path):
    """Not their embedding (that of token 0, which no word is), and it gets no gradient from the words."""
    model = minift.load_model(checkpoint(tmp_path / "model", model_type="llama", tie_word_embeddings=False))
    add_adapter(model, PrefixTuningConfig(N, init="random"))
    ids, documents = torch.randint(3, 101, (2, 9)), torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    expected = model(ids, None, documents)
    embedding = model.decoder.embed_tokens.weight
    embedding.data[0] = 50 * torch.randn(64)
    assert torch.equal(model(ids, None, documents), expected)
    embedding.requires_grad_(True)
    (grad,) = torch.autograd.grad(model(ids, None, documents).square().sum(), [embedding])
    assert not grad[0].any() and grad[ids.unique()].abs().amax(1).all()


@pytest.mark.parametrize("projection", [False, True])
def test_zero_is_not_no_change(tiny: Path, projection: bool):
    """A key of zeros has the score 0: with one word, whose score is c, the prefix leaves it a share of
    exp(c) / (n + exp(c)) of its attention."""
    model = minift.load_model(tiny)
    ids = torch.randint(3, 380, (1, 6))
    plain = model(ids)
    add_adapter(model, PrefixTuningConfig(N, init="zero", projection=projection))
    encoder = model.get_submodule("virtual.encoder")
    assert not encoder().any()
    changed = model(ids)
    assert (changed - plain).abs().max() > 1e-2 * plain.abs().max()
    gradients = torch.autograd.grad(changed.square().sum(), [p for p in model.parameters() if p.requires_grad])
    # Through weights of zero nothing reaches what is below them, at the first step.
    assert gradients[-1].any() and (gradients[0].any() != projection)


def smollm2() -> CausalLM:
    """SmolLM2-135M's shape, without its numbers."""
    config = ModelConfig.from_dict(
        {
            "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    with torch.device("meta"):
        return CausalLM(config)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (PromptTuningConfig(20), 20 * 576),
        (PTuningConfig(20), 20 * 576 + 3 * (576 * 576 + 576)),
        (PrefixTuningConfig(20), 20 * 30 * 2 * 3 * 64),
        (PrefixTuningConfig(20, projection=True), 20 * 192 + 192 * 192 + 192 + 193 * 30 * 2 * 3 * 64),
    ],
    ids=["prompt", "mlp", "prefix", "projection"],
)
def test_parameters_are_those_of_the_formulas(method: PromptTuningConfig, expected: int):
    model = smollm2()
    add_adapter(model, method)
    assert count_parameters(model)[0] == expected
    base = sum(p.numel() for p in smollm2().parameters())
    assert count_parameters(model)[1] == base + expected
