"""What a LoRA trains besides linear layers, against PEFT: embeddings, whole modules, single tokens, biases.

The same parameters and initial values from the same seed, and the same logits and gradients. Tolerances are those of
test_lora.py: with E the rounding error of PEFT's own numbers, measured against float64, ours may be off by E as well,
so the two may differ by 4 E, E being one sample of it.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from beside_kinds import (
    KINDS,
    TOKENS,
    VOCAB,
    add_theirs,
    base_of,
    config_of,
    maker,
    our_tensors,
    randomize,
    some_ids,
    their_tensors,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import minift
from minift.adapters.embedding import LoraEmbedding
from minift.adapters.inject import count_parameters, low_rank_layers
from minift.adapters.lora import LoraConfig
from minift.quant import QuantConfig

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return maker(tmp_path_factory.mktemp("models"))


def assert_equals_peft(ours: nn.Module, theirs: Any, reference: Any, rounding_below: float) -> None:
    """Logits and all gradients, against `theirs` and against `reference`, the same in float64."""
    ids, runs = some_ids(), []
    for logits, parameters in [
        (ours(ids), our_tensors(ours)),
        (theirs(ids).logits, their_tensors(theirs)),
        (reference(ids).logits, their_tensors(reference)),
    ]:
        squares = logits.square() if logits.dtype == torch.float64 else logits.float().square()
        gradients = torch.autograd.grad(squares.mean(), tuple(parameters.values()))
        runs.append({"logits": logits.detach()} | dict(zip(parameters, gradients, strict=True)))
    mine, other, exact = runs
    assert mine.keys() == other.keys() == exact.keys()
    # A bias of the keys moves all scores of a query alike, so its gradient is zero but for rounding: measured against
    # that of the values.
    largest = {key: exact[key.replace("k_proj.bias", "v_proj.bias")].abs().max().item() for key in exact}
    assert min(largest.values()) > 0
    rounding = max((other[key] - exact[key]).abs().max().item() / largest[key] for key in exact)
    assert 0 < rounding < rounding_below
    for key, value in mine.items():
        assert value.dtype == other[key].dtype
        assert (value - other[key]).abs().max().item() <= 4 * rounding * largest[key], key


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_logits_and_gradients_are_pefts(models: Any, kind: str):
    folder, config = models(KINDS[kind][0]), config_of(kind)
    ours, base = minift.load_model(folder).train(), base_of(folder)
    torch.manual_seed(5)
    minift.add_lora(ours, config)
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    theirs = add_theirs(base, config)
    if not config.ensure_weight_tying:  # then PEFT draws a head, and throws it away
        assert torch.equal(drawn, torch.get_rng_state())
    mine, other = our_tensors(ours), their_tensors(theirs)
    assert mine.keys() == other.keys()
    assert {p for p in ours.parameters() if p.requires_grad} == set(mine.values())
    for name, value in mine.items():
        assert value.dtype == other[name].dtype
        # DoRA's norms are sums of squares, added up in another order.
        assert torch.allclose(value, other[name], rtol=1e-6 if "magnitude" in name else 0, atol=0), name
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()
    randomize(ours, theirs)
    assert_equals_peft(ours, theirs, copy.deepcopy(theirs).double(), 1e-4)


@pytest.mark.parametrize("kind", ["embedding, narrow", "norms", "whole, shared", "tokens, tied", "all biases"])
def test_over_bf16(models: Any, kind: str):
    """Low-rank matrices and rows are fp32, as PEFT's; copies and biases have the model's dtype, as PEFT's."""
    folder, config = models(KINDS[kind][0]), config_of(kind)
    ours, theirs = (
        minift.load_model(folder, dtype=torch.bfloat16).train(),
        add_theirs(base_of(folder, "bfloat16"), config),
    )
    minift.add_lora(ours, config)
    mine, other = our_tensors(ours), their_tensors(theirs)
    assert {name: value.dtype for name, value in mine.items()} == {name: value.dtype for name, value in other.items()}
    randomize(ours, theirs)
    assert ours(some_ids()).dtype == torch.bfloat16
    assert_equals_peft(ours, theirs, copy.deepcopy(theirs).double(), 0.2)


@pytest.mark.parametrize("kind", ["embedding, narrow", "norms", "whole, shared", "tokens, tied", "all biases"])
def test_over_nf4(models: Any, kind: str):
    """Without double quantization and in training mode, as in test_lora.py."""
    pytest.importorskip("bitsandbytes")
    folder, config = models(KINDS[kind][0]), config_of(kind)
    ours = minift.load_model(folder, QuantConfig(double_quant=False)).train()
    minift.add_lora(ours, config)
    theirs = add_theirs(peers.peer_base(folder, double_quant=False), config)
    weights = peers.peer_nf4_weights(folder, double_quant=False)
    reference = add_theirs(peers.peer_base(folder, weights=weights), config)
    randomize(ours, theirs, reference)
    assert_equals_peft(ours, theirs, reference.double(), 1e-4)


def test_low_rank_changes_of_an_embedding_add_up(models: Any):
    ours, ids = minift.load_model(models("untied")), some_ids()
    for name in ("one", "two"):
        minift.add_lora(ours, LoraConfig(r=2, target_modules=("embed_tokens",)), name)
    place = ours.decoder.embed_tokens
    assert isinstance(place, LoraEmbedding)
    with torch.no_grad():
        for parameter in place.parameters():
            parameter.normal_()
    table_vd = (place.base.weight + (place.delta("one") + place.delta("two")).T).double()
    exact = nn.functional.embedding(ids, table_vd)
    # Each entry: two products of rank 2 and two sums, in fp32 both ways.
    assert (place(ids) - exact).abs().max() <= 16 * 2**-24 * exact.abs().max() + 1e-5
    assert list(low_rank_layers(ours)) == ["model.embed_tokens"]


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "untied"])
def test_trained_tokens_make_no_matrix_of_the_size_of_the_table(models: Any, name: str):
    """Neither forwards nor backwards is there a tensor [v, d] other than the frozen table."""
    ours = minift.load_model(models(name))
    minift.add_lora(ours, LoraConfig(r=1, target_modules=("q_proj",), trainable_token_indices=TOKENS))
    made: list[tuple[int, ...]] = []
    frozen = {p.untyped_storage().data_ptr() for p in ours.parameters() if not p.requires_grad}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in frozen:
                    made.append(tuple(tensor.shape))
            return out

    with Watch():
        ours(some_ids()).sum().backward()
    assert len(made) > 50
    assert (VOCAB, 64) not in made and (64, VOCAB) not in made
    (rows,) = (t for n, t in our_tensors(ours).items() if "token_adapter" in n)
    assert rows.grad is not None and rows.grad.shape == (3, 64)
    assert ours.decoder.get_parameter("embed_tokens.base.weight").grad is None
