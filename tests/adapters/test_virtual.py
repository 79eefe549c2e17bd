"""Virtual tokens wherever documents can be: alone, packed, padded on either side, after a shared beginning, in a cache.

What a layout is, is compared with lists; what a model computes with slots, with the same model on each document alone,
and with the plain model on words that stand where the slots are. E is the distance of a reference in fp32 from the same
in float64; two such errors may add up and E is one sample, so 4 E are allowed, as everywhere.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILY_NAMES, checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minift
from minift.adapters.config import LoraConfig
from minift.adapters.method import method_of
from minift.adapters.prefix import PrefixTuningConfig
from minift.adapters.prompt import PromptTuningConfig
from minift.adapters.ptuning import PTuningConfig
from minift.adapters.verbs import METHODS, add_adapter, delete_method
from minift.adapters.virtual import VirtualMethod, lay_out
from minift.data.collate import Batch, collate, flatten, share_prefix, stack
from minift.data.encode import Example
from minift.model.attention import ATTENTION
from minift.model.cache import KVCache
from minift.model.decoder import CausalLM
from minift.model.generate import generate_tokens
from minift.model.save import save_model
from minift.train.step import backward, train_step

N = 3
METHOD = {"prompt": PromptTuningConfig(N), "mlp": PTuningConfig(N), "prefix": PrefixTuningConfig(N, init="random")}
KINDS = ["prompt", "prefix"]
LENGTHS = (6, 1, 9, 4)


def adapted(folder: Path, kind: str, attention: str = "eager") -> CausalLM:
    model = minift.load_model(folder, attention=attention)
    add_adapter(model, METHOD[kind])
    return model


def in_fp64(model: CausalLM) -> CausalLM:
    exact = copy.deepcopy(model).double()
    exact.attention = ATTENTION["eager"]
    return exact


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def documents(model: CausalLM, lengths: tuple[int, ...] = LENGTHS) -> list[Example]:
    rows = [torch.randint(3, model.config.vocab_size, (length,)).tolist() for length in lengths]
    return [Example(row, row) for row in rows]


def run(model: CausalLM, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Logits of all tokens of a batch that are not padding, one behind the other, and gradients of a loss on them."""
    needs = batch.documents_bs if batch.needs_mask else None
    logits = model(batch.input_ids_bs, batch.positions_bs, needs)[batch.documents_bs >= 0]
    return logits.detach(), list(torch.autograd.grad(logits.square().sum() / 100, trained(model)))


def one_by_one(model: CausalLM, examples: list[Example]) -> tuple[Tensor, list[Tensor]]:
    runs = [run(model, flatten([example])) for example in examples]
    gradients = zip(*(found for _, found in runs), strict=True)
    return torch.cat([logits for logits, _ in runs]), [torch.stack(parts).sum(0) for parts in gradients]


def assert_as_alone(model: CausalLM, examples: list[Example], batch: Batch) -> None:
    mine, alone, exact = run(model, batch), one_by_one(model, examples), one_by_one(in_fp64(model), examples)
    flat = [(x[0], *x[1]) for x in (mine, alone, exact)]
    rounding = max((a - e).abs().max() / e.abs().max() for _, a, e in zip(*flat, strict=True))
    assert 0 < rounding < 1e-4
    for m, a, e in zip(*flat, strict=True):
        assert (m - a).abs().max() <= 4 * rounding * e.abs().max()


# --- where slots are --------------------------------------------------------------------------------------------------


def listed(n: int, ids: list[int], positions: list[int], numbers: list[int]) -> list[tuple[int, int, int]]:
    """A row with slots, token by token."""
    row: list[tuple[int, int, int]] = []
    for j, token in enumerate(zip(ids, positions, numbers, strict=True)):
        if numbers[j] >= 0 and (j == 0 or numbers[j] != numbers[j - 1]):
            row += [(0, positions[j] + i, numbers[j]) for i in range(n)]
        row.append((token[0], token[1] + n, token[2]))
    return row


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.randoms(use_true_random=False))
def test_a_layout_is_what_a_list_is(n: int, b: int, s: int, random: Any):
    numbers = [[random.choice((-1, 0, 1, 2)) for _ in range(s)] for _ in range(b)]
    ids, positions = ([[random.randrange(1, 50) for _ in range(s)] for _ in range(b)] for _ in range(2))
    layout = lay_out(n, torch.tensor(ids), torch.tensor(positions), torch.tensor(numbers))
    rows = [listed(n, *row) for row in zip(ids, positions, numbers, strict=True)]
    longest = max(map(len, rows))
    rows = [[(0, 0, -1)] * (longest - len(row)) + row for row in rows]
    assert layout.documents_bt is not None
    for column, found in enumerate((layout.input_ids_bt, layout.positions_bt, layout.documents_bt)):
        assert found.tolist() == [[token[column] for token in row] for row in rows]
    assert layout.words(layout.input_ids_bt.unsqueeze(-1)).squeeze(-1).tolist() == ids
    values = torch.arange(1.0, n + 1)
    filled = layout.fill(torch.zeros(b, longest, 1), values[:, None]).flatten()
    assert (filled > 0).nonzero().flatten().tolist() == sorted(layout.slots_m.tolist())
    assert filled[layout.slots_m].tolist() == values.tolist() * (len(layout.slots_m) // n)


@pytest.mark.parametrize("positions", [None, torch.tensor([[4, 5, 6]])])
def test_without_documents_slots_are_in_front_of_each_row(positions: Tensor | None):
    layout = lay_out(2, torch.tensor([[7, 8, 9], [5, 6, 0]]), positions, None)
    assert layout.documents_bt is None
    assert layout.input_ids_bt.tolist() == [[0, 0, 7, 8, 9], [0, 0, 5, 6, 0]]
    first = 0 if positions is None else 4
    assert layout.positions_bt.tolist() == [list(range(first, first + 5))] * 2


# --- what a model computes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_slots_that_say_what_words_say_are_words(tmp_path: Path, name: str, kind: str):
    """The plain model reads n words more. Theirs as embeddings, or as keys and values of its cache, are the prompt."""
    model = minift.load_model(checkpoint(tmp_path / "model", **FAMILY_NAMES[name]), attention="eager")
    config, ids = model.config, torch.randint(3, model.config.vocab_size, (2, 12))
    ids[1, :N] = ids[0, :N]
    expected = model(ids)[:, N:]
    if kind == "prompt":
        values = model.embed_words(ids[0, :N])
    else:
        cache = KVCache(config, 1, N, model.dtype, model.device)
        model.hidden(ids[:1, :N], cache=cache)
        # [layer, key or value, g, n, e] -> [n, layer, key or value, g, e]
        layers = torch.stack([torch.stack([layer.k_bgte[0], layer.v_bgte[0]]) for layer in cache.layers])
        values = layers.permute(3, 0, 1, 2, 4).flatten(1)
    add_adapter(model, METHOD[kind])
    trained(model)[0].data.copy_(values)
    found = model(ids[:, N:])
    if kind == "prompt":
        assert torch.equal(found, expected)
    else:
        # The prefix was computed from 3 tokens and not from 12, which adds up in another order.
        assert (found - expected).abs().max() <= 64 * 2**-24 * expected.abs().max()
    model.virtual = None
    assert (model(ids[:, N:]) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("kind", METHOD)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash"])
def test_packed_documents_are_as_alone(tiny: Path, attention: str, kind: str):
    """Rows of three documents, of one and padding, and of four."""
    model = adapted(tiny, kind, attention)
    examples = documents(model, (6, 2, 9, 11, 5, 3, 4, 2))
    rows = [flatten(examples[:3]), flatten(examples[3:4]), flatten(examples[4:])]
    assert_as_alone(model, examples, stack(rows, pad_id=0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "smollm3", "opt", "gpt2"])
def test_packed_documents_are_as_alone_in_other_families(tmp_path: Path, name: str, kind: str):
    model = adapted(checkpoint(tmp_path / "model", **FAMILY_NAMES[name]), kind)
    examples = documents(model, (11, 2, 14))
    assert_as_alone(model, examples, flatten(examples))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_are_as_alone(tiny: Path, kind: str, side: Any):
    model = adapted(tiny, kind)
    examples = documents(model)
    assert_as_alone(model, examples, collate(examples, 0, padding_side=side))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "mistral", "opt"])
def test_a_shared_beginning_changes_nothing(tmp_path: Path, name: str, kind: str):
    model = adapted(checkpoint(tmp_path / "model", **FAMILY_NAMES[name]), kind)
    same = torch.randint(3, 101, (10,)).tolist()
    rows = [same + torch.randint(3, 101, (length,)).tolist() for length in (5, 2, 8)]
    batch = collate([Example(row, [-100] * 11 + row[11:]) for row in rows], 0)
    shared = share_prefix(batch)
    assert shared.shared_prefix == (10, (5, 2, 8))
    results = []
    for tried, laid_out in [(model, batch), (model, shared), (in_fp64(model), batch)]:
        tried.zero_grad()
        loss = backward(tried, laid_out, batch.trained_tokens)
        results.append([loss, *(p.grad for p in trained(tried) if p.grad is not None)])
    plain, mine, exact = results
    rounding = max((a - e).abs().max() / e.abs().max() for a, e in zip(plain, exact, strict=True))
    assert len(mine) == 2 and 0 < rounding < 1e-5
    for m, a, e in zip(mine, plain, exact, strict=True):
        assert (m - a).abs().max() <= 4 * rounding * e.abs().max()


@pytest.mark.parametrize("how", [True, "selective"])
@pytest.mark.parametrize("kind", METHOD)
def test_gradient_checkpointing_changes_no_bit(tiny: Path, kind: str, how: Any):
    """Two forward passes before the backward passes, which compute each of them again."""
    model = adapted(tiny, kind, "sdpa")
    first, second = torch.randint(3, 380, (2, 9)), torch.randint(3, 380, (1, 14))
    packed = torch.tensor([[0] * 5 + [1] * 9])

    def gradients(checkpointing: Any) -> list[Tensor]:
        outs = [
            model.hidden(first, gradient_checkpointing=checkpointing),
            model.hidden(second, None, packed, gradient_checkpointing=checkpointing),
        ]
        found = [torch.autograd.grad(out.square().sum(), trained(model), retain_graph=True) for out in outs]
        return [grad for part in found for grad in part]

    for mine, expected in zip(gradients(how), gradients(False), strict=True):
        assert torch.equal(mine, expected) and expected.abs().max() > 0


# --- generation -------------------------------------------------------------------------------------------------------

# Words that are likely, so that a wrong position or a missing slot changes the text soon.
LONGROPE = FAMILY_NAMES["phi3"] | {
    "original_max_position_embeddings": 20,
    "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8},
}


@pytest.mark.parametrize("kind", METHOD)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "opt", "gpt2", "longrope"])
def test_rows_of_a_batch_go_on_as_if_read_from_the_beginning(tmp_path: Path, name: str, kind: str):
    """Against the model without a cache on each row alone. Longrope turns faster beyond 20 tokens, slots included."""
    model = adapted(checkpoint(tmp_path / "model", **(FAMILY_NAMES | {"longrope": LONGROPE})[name]), kind)
    prompts = [torch.randint(3, 101, (length,)).tolist() for length in (9, 4, 12)]
    batches = [[0, 1, 2], [1]]
    for rows in batches if name != "longrope" else [[0], [1], [2]]:  # whose rotation follows the longest row
        found = torch.stack(list(generate_tokens(model, [prompts[row] for row in rows], 10)), dim=1).tolist()
        for row, tokens in zip(rows, found, strict=True):
            text = list(prompts[row])
            for token in tokens:
                scores = model(torch.tensor([text]))[0, -1]
                # Equal, or so close that another order of sums decides.
                assert scores[token] >= scores.max() - 1e-4 * scores.abs().max()
                text.append(token)


def test_slots_take_room_in_the_context(tmp_path: Path):
    model = adapted(checkpoint(tmp_path / "model", model_type="llama", max_position_embeddings=20), "prefix")
    assert model.virtual_tokens == N
    assert len(list(generate_tokens(model, [[5] * 10], 20 - N - 10))) == 7
    with pytest.raises(ValueError, match="10 tokens, 3 virtual ones and 8 new ones exceed the model's context of 20"):
        next(generate_tokens(model, [[5] * 10], 8))


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_texts_that_slots_push_out_of_the_learned_positions_are_refused(tmp_path: Path, name: str):
    folder = checkpoint(tmp_path / "model", **FAMILY_NAMES[name] | {"max_position_embeddings": 64})
    model = adapted(folder, "prompt")
    ids = torch.randint(3, 101, (1, 64))
    assert model(ids[:, :61]).shape == (1, 61, 101)
    with pytest.raises(ValueError, match="position 64 is beyond the 64 positions"):
        model(ids[:, :62])


# --- the model around them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METHOD)
def test_only_they_are_trained_and_can_be_removed(tiny: Path, tmp_path: Path, kind: str):
    model = minift.load_model(tiny)
    names, ids = [name for name, _ in model.named_parameters()], torch.randint(3, 380, (2, 7))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = model(ids)
    add_adapter(model, METHOD[kind])
    assert all(p.requires_grad == name.startswith("virtual.") for name, p in model.named_parameters())
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    losses = [train_step(model, [collate(documents(model), 0)], optimizer).loss for _ in range(2)]
    assert losses[0] != losses[1] and all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match=r"virtual\.encoder\.\S+ is not part of a llama checkpoint"):
        save_model(model, tmp_path / "whole")
    with pytest.raises(ValueError, match="cannot be added"):
        add_adapter(model, LoraConfig())
    delete_method(model)
    assert method_of(model) is None and model.virtual is None and model.virtual_tokens == 0
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model(ids), plain)
    save_model(model, tmp_path / "whole")


def test_steps_lower_the_loss(tiny: Path):
    torch.manual_seed(3)
    for config in METHOD.values():
        model = minift.load_model(tiny)
        add_adapter(model, config)
        batch = stack([flatten(documents(model)), flatten(documents(model)[:2])], 0)
        optimizer = torch.optim.Adam(trained(model), lr=0.1)
        losses = [train_step(model, [batch], optimizer).loss for _ in range(12)]
        # 38 random tokens of 380 with a fixed model: 5 % is far more than rounding or one lucky step.
        assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("config", METHOD.values(), ids=list(METHOD))
def test_more_virtual_tokens_than_the_context_holds_are_refused(tmp_path: Path, config: VirtualMethod):
    model = minift.load_model(checkpoint(tmp_path / "model", model_type="llama", max_position_embeddings=20))
    add_adapter(model, replace(config, num_virtual_tokens=19))
    delete_method(model)
    with pytest.raises(ValueError, match="20 virtual tokens leave no room for text in a context of 20"):
        add_adapter(model, replace(config, num_virtual_tokens=20))
    assert model.virtual is None and method_of(model) is None


class QuantizedEmbedding(nn.Module):
    """Any embedding that is no table of floating-point numbers."""

    def __init__(self, plain: nn.Embedding):
        super().__init__()
        self.register_buffer("weight", plain.weight.data)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.get_buffer("weight"))


@pytest.mark.parametrize("kind", ["prompt", "mlp"])
def test_quantized_embeddings_are_refused_where_prompts_stand_among_them(tiny: Path, kind: str):
    model = minift.load_model(tiny)
    model.set_submodule("model.embed_tokens", QuantizedEmbedding(model.decoder.embed_tokens))
    with pytest.raises(ValueError, match="those of this model are a QuantizedEmbedding"):
        add_adapter(model, METHOD[kind])
    add_adapter(model, METHOD["prefix"])  # which needs none of them


def test_tokens_that_the_vocabulary_does_not_have_are_refused(tiny: Path):
    model = minift.load_model(tiny)
    with pytest.raises(ValueError, match=f"no token {model.config.vocab_size} in a vocabulary of"):
        add_adapter(model, PromptTuningConfig(4, "text", (5, model.config.vocab_size)))


def test_all_three_are_among_the_methods():
    assert {type(config) for config in METHOD.values()} <= set(METHODS)
    assert len({method.peft_type for method in METHODS}) == len(METHODS) == len({method.name for method in METHODS})
