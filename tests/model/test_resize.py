"""Resizing against transformers' resize_token_embeddings, and against the claims of the lesson.

The rows must be equal to the bit, and so the hidden states. Logits come out of a product with more columns, which a
BLAS library may sum in another order; `sum_bound` says how much that can be.
"""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILY_NAMES, checkpoint, random_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import minift
from minift.adapters.lora import LoraLinear
from minift.model.resize import Resized, resize_embeddings
from minift.quant import Linear4bit

VOCAB = 384  # of the tiny checkpoints
IDS = torch.arange(0, VOCAB, 7).view(1, -1)


@pytest.fixture(params=["tiny", "tiny_odd"], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def matrices(model: minift.CausalLM) -> tuple[Tensor, Tensor]:
    return model.model.embed_tokens.weight, model.lm_head.weight


def sum_bound(hidden: Tensor, weight: Tensor) -> Tensor:
    """How far two sums of the same d products can be apart: 2 d eps times the sum of their sizes."""
    return 2 * weight.shape[1] * torch.finfo(weight.dtype).eps * (hidden.abs() @ weight.abs().T)


@pytest.mark.parametrize("multiple_of", [1, 64, 100])
@torch.no_grad()
def test_what_the_model_knew_is_unchanged(folder: Path, multiple_of: int):
    model = minift.load_model(folder)
    tied = model.config.tie_word_embeddings
    rows, hidden, logits = [weight.clone() for weight in matrices(model)], model.hidden(IDS), model(IDS)
    report = resize_embeddings(model, VOCAB + 3, multiple_of)
    wanted = {1: 387, 64: 448, 100: 400}[multiple_of]
    assert report == Resized(VOCAB, wanted, tied)
    assert report.added == wanted - VOCAB
    for before, after in zip(rows, matrices(model), strict=True):
        assert len(after) == wanted
        assert after[:VOCAB].equal(before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.model.embed_tokens.num_embeddings == model.lm_head.out_features == model.config.vocab_size == wanted
    assert model.hidden(IDS).equal(hidden)
    assert ((model(IDS)[..., :VOCAB] - logits).abs() <= sum_bound(hidden, rows[1])).all()


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_every_family(tmp_path: Path, family: str):
    """Wherever its checkpoints keep the embedding, and however wide that is."""
    model = minift.load_model(checkpoint(tmp_path / "old", **FAMILY_NAMES[family]))
    ids = random_ids(model.config, 1, 9)
    hidden, rows = model.hidden(ids), model.config.vocab_size
    assert resize_embeddings(model, rows + 5) == Resized(rows, rows + 5, model.config.tie_word_embeddings)
    assert model.hidden(ids).equal(hidden)
    minift.save_model(model, tmp_path / "new")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "new", attn_implementation="eager")
    assert theirs.get_input_embeddings().weight.equal(model.decoder.embed_tokens.weight)
    assert minift.load_model(tmp_path / "new").hidden(ids).equal(hidden)


@pytest.mark.parametrize("multiple_of", [1, 64])
@torch.no_grad()
def test_shapes_and_the_centre_of_new_rows_equal_transformers(folder: Path, multiple_of: int):
    ours = minift.load_model(folder)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    resize_embeddings(ours, VOCAB + 5, multiple_of)
    theirs.resize_token_embeddings(VOCAB + 5, pad_to_multiple_of=multiple_of)
    assert ours.config.vocab_size == theirs.config.vocab_size
    for mine, other in zip(
        matrices(ours), (theirs.get_input_embeddings(), theirs.get_output_embeddings()), strict=True
    ):
        assert mine.shape == other.weight.shape
        assert mine[:VOCAB].equal(other.weight[:VOCAB])
        # Theirs are drawn around the mean with 1e-9 of the old rows' variance: 8 deviations, and the rounding of fp32.
        spread = 8 * (1e-9 * mine[:VOCAB].var(0)).sqrt() + 1e-7
        assert ((mine[VOCAB:] - other.weight[VOCAB:]).abs() <= spread).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_new_rows_are_the_fp32_mean_rounded_once(folder: Path, dtype: torch.dtype):
    model = minift.load_model(folder, dtype=dtype)
    for weight in matrices(model):  # sixteenths: every dtype holds them, and fp32 adds them without rounding
        weight.copy_(torch.randint(-40, 40, weight.shape) / 16)
    sums = [(weight.double() * 16).sum(0).long().tolist() for weight in matrices(model)]
    resize_embeddings(model, VOCAB + 2)
    for weight, column in zip(matrices(model), sums, strict=True):
        mean = torch.tensor([float(Fraction(total, 16 * VOCAB)) for total in column], dtype=torch.float32).to(dtype)
        assert weight.dtype == dtype
        assert weight[VOCAB].equal(mean) and weight[VOCAB + 1].equal(mean)


@torch.no_grad()
def test_an_untrained_token_is_never_likelier_than_one_in_the_vocabulary(tiny_odd: Path):
    """Also where all logits are far below zero, so that a row of zeros would win."""
    model = minift.load_model(tiny_odd)
    last = model.hidden(IDS)[0, -1]
    model.lm_head.weight -= 20 * last / last.square().sum()  # 20 lower in this place, and only a shift: same text
    before = model(IDS)[0, -1].softmax(-1)
    assert model(IDS)[0, -1].max() < -5
    resize_embeddings(model, VOCAB + 10)
    after = model(IDS)[0, -1].softmax(-1)
    assert (after[VOCAB:] < 1 / VOCAB).all()
    # The old ones only make room: each is scaled by 1 - p(new tokens). A logit that is off by x is a factor of 1 + x,
    # in the numerator and in the sum.
    bound = 2 * sum_bound(last, model.lm_head.weight).max().item()
    torch.testing.assert_close(after[:VOCAB] / (1 - after[VOCAB:].sum()), before, rtol=bound, atol=0)
    assert bound < 0.01


def test_gradients_reach_new_rows(folder: Path):
    model = minift.load_model(folder)
    resize_embeddings(model, VOCAB + 2)
    used, target = VOCAB, VOCAB + 1
    logits = model(torch.tensor([[5, used, 9]]))
    nn.functional.cross_entropy(logits[0], torch.tensor([7, 8, target])).backward()
    embedding, head = (weight.grad for weight in matrices(model))
    assert embedding is not None and head is not None
    assert embedding[used].any() and head[target].any()


@pytest.mark.parametrize("trained", [(True, True), (False, False), (True, False)])
def test_what_was_frozen_stays_frozen(tiny_odd: Path, trained: tuple[bool, bool]):
    model = minift.load_model(tiny_odd)
    for weight, wanted in zip(matrices(model), trained, strict=True):
        weight.requires_grad_(wanted)
    resize_embeddings(model, VOCAB + 1)
    assert tuple(weight.requires_grad for weight in matrices(model)) == trained
    assert all(isinstance(weight, nn.Parameter) for weight in matrices(model))


@pytest.mark.parametrize("tokens", [1, VOCAB - 1, VOCAB])
def test_with_room_nothing_happens(folder: Path, tokens: int):
    model = minift.load_model(folder)
    config, before = model.config, matrices(model)
    assert resize_embeddings(model, tokens, multiple_of=256) == Resized(VOCAB, VOCAB, model.config.tie_word_embeddings)
    assert model.config is config
    assert all(a is b for a, b in zip(matrices(model), before, strict=True))


def test_rows_are_removed_only_when_asked(folder: Path):
    model = minift.load_model(folder)
    first = [weight[:320].clone() for weight in matrices(model)]
    assert resize_embeddings(model, 300, multiple_of=256, shrink=True).added == 0  # 512 would be more than there are
    report = resize_embeddings(model, 300, multiple_of=64, shrink=True)
    assert (report.new_rows, report.added) == (320, -64)
    assert all(a.equal(b) for a, b in zip(matrices(model), first, strict=True))
    assert model(torch.tensor([[319]])).shape == (1, 1, 320)


def test_the_bias_of_a_head_grows_with_it(tiny_odd: Path):
    model = minift.load_model(tiny_odd)
    bias = torch.arange(VOCAB) / 4
    model.lm_head.bias = nn.Parameter(bias.clone(), requires_grad=False)
    resize_embeddings(model, VOCAB + 2)
    mean = (VOCAB - 1) / 8  # of 0, 1/4, ... (VOCAB - 1)/4; exact in fp32
    assert model.lm_head.bias.tolist() == [*bias.tolist(), mean, mean]
    assert not model.lm_head.bias.requires_grad
    assert model(IDS).shape[-1] == VOCAB + 2


def test_a_resized_model_is_saved_and_loaded_here_and_in_transformers(folder: Path, tmp_path: Path):
    model = minift.load_model(folder)
    raw = dict(model.config.raw)
    old = model.config.raw
    resize_embeddings(model, VOCAB + 3, multiple_of=32)
    assert old == raw  # the old dictionary may belong to somebody else
    minift.save_model(model, tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert content["vocab_size"] == model.config.vocab_size == 416
    ours = minift.load_model(tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[3, VOCAB + 1, 415]])
    with torch.no_grad():
        assert ours(ids).equal(model(ids))
        # fp32 logits of a few units after two blocks: the bound of the decoder's tests
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-5, atol=1e-5)
    assert ours.config.tie_word_embeddings == (ours.lm_head.weight is ours.model.embed_tokens.weight)


def test_a_new_token_can_be_read_after_resizing(folder: Path):
    model, tokenizer = minift.load_model(folder), minift.load_tokenizer(folder)
    (index,) = tokenizer.add_tokens(["<|think|>"])
    ids = torch.tensor([tokenizer.encode("so <|think|> yes")])
    assert index == VOCAB and index in ids
    with pytest.raises(IndexError):
        model(ids)
    resize_embeddings(model, len(tokenizer))
    assert model(ids).isfinite().all()


def test_quantized_and_adapted_heads_are_refused(tiny_odd: Path):
    model = minift.load_model(tiny_odd)
    head = model.lm_head
    for layer in (Linear4bit.from_linear(head), LoraLinear(head)):
        model.lm_head = layer  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(ValueError, match=rf"lm_head is a {type(layer).__name__}.*before.*quantized.*merge_lora"):
            resize_embeddings(model, VOCAB + 1)
    model.lm_head, model.model.embed_tokens = head, nn.EmbeddingBag(3, 65)  # pyright: ignore
    with pytest.raises(ValueError, match="embed_tokens is a EmbeddingBag"):
        resize_embeddings(model, VOCAB + 1)


@pytest.mark.parametrize("wrong", [0, -1, 2.0, "400"])
def test_wrong_numbers_are_refused(tiny: Path, wrong: object):
    model = minift.load_model(tiny)
    with pytest.raises(ValueError, match="tokens must be a positive integer"):
        resize_embeddings(model, wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="multiple_of must be a positive integer"):
        resize_embeddings(model, VOCAB + 1, wrong)  # pyright: ignore[reportArgumentType]
    assert model.config.vocab_size == VOCAB
