"""Generation against its definition.

Decoding with the key/value cache is compared with running the whole text through the model again for every token.
Stopping, drawing and streaming are tested on a model that does exactly what the test says (`Scripted`), so that no test
depends on what random weights happen to prefer. Whole texts are compared with transformers' `generate` on the tiny
checkpoint: the same tokens, drawn ones too, from the same seed. How a single token is chosen: test_sampling.py.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from torch import Tensor
from transformers import AutoModelForCausalLM

import minift
from minift.model.decoder import CausalLM
from minift.model.generate import GREEDY, Sampling, generate, generate_batch, generate_tokens, stream


class Scripted:
    """Stands in for a model: `logits(last token of each row [b])` -> [b, v] decides what comes next."""

    dtype, device, virtual_tokens = torch.float32, torch.device("cpu"), 0

    def __init__(
        self, logits: Callable[[Tensor], Tensor], eos: tuple[int, ...] = (), context: int = 1000, **generation: Any
    ):
        self.config = SimpleNamespace(
            max_position_embeddings=context, eos_token_ids=eos, num_hidden_layers=0, num_key_value_heads=1, head_dim=2,
            generation=generation, rope={"rope_type": "default"}, vocab_size=1 << 20,
        )  # fmt: skip
        self.following = logits

    def hidden(self, input_ids_bs: Tensor, *_: object) -> Tensor:
        return input_ids_bs.unsqueeze(-1)

    def logits(self, last_b1: Tensor) -> Tensor:
        return self.following(last_b1.squeeze(-1))


def successor(table: dict[int, int], **options: Any) -> CausalLM:
    """A model that follows every token of `table` by the one it names."""

    def logits(last_b: Tensor) -> Tensor:
        following = torch.tensor([table[token] for token in last_b.tolist()])
        return 10.0 * torch.nn.functional.one_hot(following, 1 + max(table.values())).float()

    return cast(CausalLM, Scripted(logits, **options))


def columns(tokens: Any) -> list[list[int]]:
    """What `generate_tokens` yields, as one list a row."""
    return torch.stack(list(tokens), dim=1).tolist()


# --- the cache --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def recomputed(model: CausalLM, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy decoding without a cache, one row at a time."""
    ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([ids]))[0, -1]
        first, second = logits.topk(2).values.tolist()
        assert first - second > 1e-4  # far above rounding (1e-6), so that no other order of additions turns it
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
@pytest.mark.parametrize("lengths", [[1], [17], [5, 5], [12, 1, 7]])
def test_cached_decoding_equals_full_recompute(
    request: pytest.FixtureRequest, name: str, lengths: list[int], attention: str
):
    model = minift.load_model(request.getfixturevalue(name), attention=attention)
    prompts = [torch.randint(0, model.config.vocab_size, (length,)).tolist() for length in lengths]
    ours = columns(generate_tokens(model, prompts, 20))
    assert ours == [recomputed(model, prompt, 20) for prompt in prompts]


def test_cached_decoding_of_a_quantized_model(tiny: Path):
    model = minift.load_model(tiny, "nf4")
    assert columns(generate_tokens(model, [[5, 6, 7]], 10)) == [recomputed(model, [5, 6, 7], 10)]


@pytest.mark.parametrize(("prompts", "padded"), [([[1, 2]], False), ([[1, 2], [3, 4]], False), ([[1, 2], [3]], True)])
def test_only_padding_needs_document_numbers(prompts: list[list[int]], padded: bool):
    """Without them the decoder may leave out the mask."""
    fed: list[Any] = []
    model: Any = Scripted(lambda last_b: torch.zeros(len(last_b), 9))
    model.hidden = lambda ids, positions, documents, cache: fed.append(documents) or ids.unsqueeze(-1)
    list(generate_tokens(model, prompts, 3))
    numbers = [None if documents is None else documents.tolist() for documents in fed]
    assert numbers == ([[[0, 0], [-1, 0]], [[0], [0]], [[0], [0]]] if padded else [None] * 3)


def test_generation_builds_no_graph_and_leaves_the_model_alone(tiny: Path):
    model = minift.load_model(tiny)
    token = next(iter(generate_tokens(model, [[1, 2, 3]], 5)))
    assert not token.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


# --- stopping ---------------------------------------------------------------------------------------------------------

CHAIN = {0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 0}


def test_without_stop_ids_it_runs_to_the_limit():
    assert columns(generate_tokens(successor(CHAIN), [[0]], 10)) == [[1, 2, 3, 4, 5, 6, 7, 0, 1, 2]]


@pytest.mark.parametrize(("stops", "expected"), [({3}, [1, 2, 3]), ([5, 2], [1, 2]), ({1}, [1]), ({9}, [1, 2, 3, 4])])
def test_stop_ids_end_the_text_and_are_part_of_it(stops: Any, expected: list[int]):
    assert columns(generate_tokens(successor(CHAIN), [[0]], 4, stops)) == [expected]


def test_a_stop_id_in_the_prompt_does_not_stop():
    assert columns(generate_tokens(successor(CHAIN), [[5, 5, 5]], 2, {5})) == [[6, 7]]


def test_rows_stop_independently():
    rows = columns(generate_tokens(successor(CHAIN), [[0], [4, 3], [4]], 10, {5}))
    # A row that has stopped repeats its stop token until the slowest one has stopped, too.
    assert rows == [[1, 2, 3, 4, 5], [4, 5, 5, 5, 5], [5, 5, 5, 5, 5]]


def test_no_new_tokens():
    assert list(generate_tokens(successor(CHAIN), [[0]], 0)) == []
    with pytest.raises(ValueError, match="max_new_tokens must not be negative, got -1"):
        next(generate_tokens(successor(CHAIN), [[0]], -1))


# --- limits -----------------------------------------------------------------------------------------------------------


def test_the_context_can_be_filled_but_not_exceeded(tiny: Path):
    model = successor(CHAIN, context=12)
    assert len(list(generate_tokens(model, [[0] * 3, [0] * 10], 2))) == 2
    with pytest.raises(ValueError, match=r"10 tokens and 3 new ones exceed the model's context of 12"):
        next(generate_tokens(model, [[0] * 3, [0] * 10], 3))
    real = minift.load_model(tiny)
    with pytest.raises(ValueError, match="context of 2048"):
        next(generate_tokens(real, [[0] * 2049], 1))


@pytest.mark.parametrize("prompts", [[[]], [[1], []]])
def test_an_empty_prompt_is_refused(prompts: list[list[int]]):
    with pytest.raises(ValueError, match="empty prompt"):
        next(generate_tokens(successor(CHAIN), prompts, 3))


def test_a_token_without_an_embedding_is_refused(tiny: Path):
    model = minift.load_model(tiny)
    rows = model.config.vocab_size
    assert len(list(generate_tokens(model, [[rows - 1]], 1))) == 1
    with pytest.raises(ValueError, match=f"token {rows} of a prompt.*embedding of {rows}.*resize_embeddings"):
        next(generate_tokens(model, [[1], [2, rows, 3]], 1))


# --- sampling ---------------------------------------------------------------------------------------------------------

PROBABILITY = torch.tensor([0.02, 0.40, 0.07, 0.25, 0.15, 0.08, 0.03])  # not in order of size, no ties
DRAWS = 20000


def draw(sampling: Sampling, rows: int = DRAWS) -> Tensor:
    """How often each token was drawn, [v], in one step of many rows."""
    model = cast(CausalLM, Scripted(lambda last_b: PROBABILITY.log().expand(len(last_b), -1)))
    (token,) = generate_tokens(model, [[0]] * rows, 1, sampling=sampling)
    return torch.bincount(token, minlength=len(PROBABILITY))


def assert_distribution(counts: Tensor, expected: Tensor) -> None:
    """A count of n draws has standard deviation sqrt(n p (1 - p)). A right sampler misses by more than 5 of them once
    in 1.7 million, and the seed is fixed. Tokens of probability 0 must not appear at all."""
    n = int(counts.sum())
    deviation = (n * expected * (1 - expected)).sqrt()
    assert ((counts - n * expected).abs() <= 5 * deviation).all(), (counts / n, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_tempered_distribution(temperature: float):
    powered = PROBABILITY ** (1 / temperature)
    assert_distribution(draw(Sampling(temperature)), powered / powered.sum())


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-6, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),  # 0.40 is not enough
        (0.64, [1, 3]),
        (0.66, [1, 3, 4]),
        (0.90, [1, 3, 4, 5, 2]),
        (1.0, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]):
    expected = torch.zeros_like(PROBABILITY)
    expected[kept] = PROBABILITY[kept] / PROBABILITY[kept].sum()
    counts = draw(Sampling(1.0, top_p))
    assert counts.nonzero().flatten().tolist() == sorted(kept)
    assert_distribution(counts, expected)


def test_top_p_counts_after_the_temperature():
    # At temperature 0.5 token 1 alone has 0.16 / 0.2596 = 0.616 of the mass; at 1 it has 0.4.
    assert draw(Sampling(0.5, 0.6), 500).nonzero().flatten().tolist() == [1]
    assert draw(Sampling(1.0, 0.6), 500).nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize("sampling", [Sampling(0.0, 0.5, 3), Sampling(1e-4), Sampling(1.0, 1e-6)])
def test_temperature_0_and_its_limits_are_greedy(tiny: Path, sampling: Sampling):
    model = minift.load_model(tiny)
    prompts = [[5, 6, 7], [8]]
    greedy = columns(generate_tokens(model, prompts, 15))
    assert columns(generate_tokens(model, prompts, 15, sampling=sampling)) == greedy
    assert greedy == [recomputed(model, prompt, 15) for prompt in prompts]


def test_a_seed_fixes_the_text_and_nothing_else(tiny: Path):
    model = minift.load_model(tiny)

    def text(seed: int) -> list[list[int]]:
        return columns(generate_tokens(model, [[5, 6, 7]] * 2, 15, sampling=Sampling(1.0, 0.9, seed)))

    state = torch.get_rng_state()
    first = text(1)
    assert torch.equal(torch.get_rng_state(), state)  # training that goes on afterwards draws as if nothing had been
    torch.manual_seed(99)
    assert text(1) == first
    assert text(2) != first
    assert first[0] != first[1]  # each row has draws of its own


# --- whole texts, as transformers' generate -------------------------------------------------------------------------

PROMPTS = [[5, 6, 7, 7, 5, 300, 12], [2], [2, 0, 9, 9]]  # 2 ends a text, and is what rows are padded with


def their_rows(theirs: Any, prompts: list[list[int]], count: int, **asked: Any) -> list[list[int]]:
    """transformers' new tokens of each row, up to its end."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"attention_mask": mask, "max_new_tokens": count, "pad_token_id": 2}
    return theirs.generate(ids, **options | asked)[:, longest:].tolist()


def cut(rows: list[list[int]], stops: Sequence[int]) -> list[list[int]]:
    """Each row up to its first stop token, with it."""
    return [row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(repetition_penalty=1.3),
        Sampling(repetition_penalty=0.8),
        Sampling(1.0, seed=5),
        Sampling(0.8, 0.9, 5),
        Sampling(1.2, 1.0, 6, 10),
        Sampling(0.7, 0.95, 7, 40, 1.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS, [PROMPTS[0]] * 3], ids=["one", "unequal", "equal"])
def test_tokens_equal_transformers(tiny: Path, prompts: list[list[int]], sampling: Sampling):
    """The draws, too: on a CPU the same seed gives the same noise, and which token it picks does not turn on rounding
    (1e-6 of a probability ratio) in some 80 tokens."""
    theirs = AutoModelForCausalLM.from_pretrained(tiny)
    stops = (2, 77, 150)
    asked: dict[str, Any] = {"repetition_penalty": sampling.repetition_penalty, "eos_token_id": list(stops)}
    if sampling.temperature:
        asked |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        asked["top_k"] = sampling.top_k
    torch.manual_seed(sampling.seed)
    expected = their_rows(theirs, prompts, 25, **asked)
    ours = columns(generate_tokens(minift.load_model(tiny), prompts, 25, stops, sampling))
    assert cut(ours, stops) == cut(expected, stops)
    assert len(ours[0]) == len(expected[0])  # both end when the slowest row does


@pytest.fixture
def settled(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """settled(do_sample=True, ...) -> a copy of the tiny checkpoint with that generation_config.json."""

    def write(**generation: Any) -> Path:
        folder = Path(shutil.copytree(tiny, tmp_path / "settled", dirs_exist_ok=True))
        (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder

    return write


@pytest.mark.parametrize(
    "generation",
    [
        {},
        {"temperature": 0.6, "top_p": 0.9},  # no do_sample
        {"repetition_penalty": 1.4},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        {"do_sample": True, "temperature": 1.5, "eos_token_id": [2, 77, 150, 260, 301]},
    ],
    ids=str,
)
def test_the_checkpoints_generation_config_is_respected(settled: Callable[..., Path], generation: dict[str, Any]):
    """Without a word from the caller, every function answers as transformers with that folder does."""
    folder = settled(**generation)
    model, tokenizer = minift.load_model(folder), minift.load_tokenizer(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.encode(tokenizer.apply_chat_template(said("Hello"), True), False)
    torch.manual_seed(0)
    (tokens,) = their_rows(theirs, [prompt], 30)
    stops: Any = {*model.config.eos_token_ids, tokenizer.eos_id}
    if tokens[-1] in stops:
        del tokens[-1]
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    assert generate(model, tokenizer, said("Hello"), 30) == expected
    assert generate_batch(model, tokenizer, [said("Hello")], 30) == [expected]
    assert "".join(stream(model, tokenizer, said("Hello"), 30)) == expected

    # A Sampling of the caller's replaces the file's, as a whole or in one field.
    (greedy,) = columns(generate_tokens(model, [prompt], 30, stops))
    assert generate(model, tokenizer, said("Hello"), 30, GREEDY) == tokenizer.decode(greedy, skip_special_tokens=True)
    reseeded = replace(Sampling.of(model.config), seed=8)
    answers = [generate(model, tokenizer, said("Hello"), 30, sampling) for sampling in (None, reseeded)]
    assert (answers[0] != answers[1]) == generation.get("do_sample", False)


def test_settings_that_are_not_supported_are_refused_unless_a_sampling_is_given():
    for answer in (generate, generate_batch, stream):
        asked: Any = said("?") if answer is not generate_batch else [said("?")]
        with pytest.raises(ValueError, match=r"generation_config.json sets num_beams to 4.*pass a Sampling"):
            list(answer(saying("yes", num_beams=4), Bytes(), asked))
        assert "".join(answer(saying("yes", num_beams=4), Bytes(), asked, 9, GREEDY)) == "yes"


# --- text -------------------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8; 256 ends a text and is special. A prompt is its last message."""

    eos_id: int | None = 256

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        assert add_generation_prompt
        return messages[-1]["content"]


def saying(text: str | bytes | list[int], **options: Any) -> CausalLM:
    """A model that answers `text` (bytes, or ids) to any prompt, and then stops. Its state is the number of steps."""
    script = [*(text.encode() if isinstance(text, str) else text), 256]
    steps = iter(script)

    def logits(last_b: Tensor) -> Tensor:
        following = torch.full((len(last_b),), next(steps))
        return torch.nn.functional.one_hot(following, 257).float()

    return cast(CausalLM, Scripted(logits, **options))


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


ANSWERS = [
    "plain",
    "",
    "Grüße, 你好 🦙!",
    "é",
    "🏳️\u200d🌈 flag",
    "a \N{REPLACEMENT CHARACTER} b",
    "line\n\nline\n",
    "  x",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_streamed_pieces_make_up_the_answer(answer: str):
    pieces = list(stream(saying(answer), Bytes(), said("?")))
    assert "".join(pieces) == answer == generate(saying(answer), Bytes(), said("?"))
    if "\N{REPLACEMENT CHARACTER}" not in answer:
        assert pieces == list(answer)  # each character as soon as its last byte is there, none before


@pytest.mark.parametrize(
    ("answer", "limit"),
    [("Grüße", 3), ("你好", 4), ("🦙🦙", 7), ("the end \N{REPLACEMENT CHARACTER}", 100), (b"a\xff", 100)],
)
def test_a_half_character_at_the_end_is_shown_as_generate_shows_it(answer: str | bytes, limit: int):
    """The token limit may cut a character in two, and a text may end with a replacement character of its own."""
    whole = generate(saying(answer), Bytes(), said("?"), limit)
    assert whole.endswith("\N{REPLACEMENT CHARACTER}")
    assert "".join(stream(saying(answer), Bytes(), said("?"), limit)) == whole


def test_streamed_pieces_of_a_real_tokenizer(tiny: Path):
    model, tokenizer = minift.load_model(tiny), minift.load_tokenizer(tiny)
    for seed in range(5):  # random text of a byte-level tokenizer: full of broken characters
        sampling = Sampling(1.5, 1.0, seed)
        whole = generate(model, tokenizer, said("Hello 12"), 60, sampling)
        pieces = list(stream(model, tokenizer, said("Hello 12"), 60, sampling))
        assert "".join(pieces) == whole
        assert len(pieces) > 10
        assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces[:-1])


class SentencePieces(Bytes):
    """A tokenizer as Llama's first ones: a space is part of the token behind it, a text's first space is dropped, and
    what has no token of its own is spelled in bytes."""

    PIECES = "<unk> <s> ▁ ▁the a ▁a b . <0xC3> <0xA9> <0xF0> <0x9F> <0xA6> <0x99>"

    def __init__(self) -> None:
        vocabulary = {piece: i for i, piece in enumerate(self.PIECES.split())}
        self.tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
        self.tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        self.tokenizer.add_special_tokens(["<s>"])
        self.longest = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        self.longest = max(self.longest, len(ids))
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


E_ACUTE, LLAMA = [8, 9], [10, 11, 12, 13]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([[1], [2], [3], [4], [5], [6], [7], E_ACUTE, LLAMA]), max_size=12))
@example([[2], [2], [3]])
@example([E_ACUTE, LLAMA, E_ACUTE, [2], [4], [1], [3]])
def test_streamed_pieces_of_a_tokenizer_that_drops_the_first_space(units: list[list[int]]):
    tokenizer, ids = SentencePieces(), [token for unit in units for token in unit]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    pieces = list(stream(saying(ids), tokenizer, said("?")))
    assert "".join(pieces) == whole
    assert len(pieces) >= len(whole.split())  # in pieces, not all at the end
    assert all(pieces) and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_streaming_decodes_a_few_tokens_a_step_however_long_the_text():
    tokenizer = SentencePieces()
    ids = ([3, *LLAMA, 4, 1, *E_ACUTE] * 40)[:350]
    assert "".join(stream(saying(ids), tokenizer, said("?"))) == tokenizer.tokenizer.decode(ids)
    assert tokenizer.longest <= 8  # a character of four tokens and the one before it


def test_batched_answers_are_cut_at_their_own_stop(tiny: Path):
    """Row by row equal to the answers generated alone, whatever their lengths and the lengths of their prompts."""
    model, tokenizer = minift.load_model(tiny), minift.load_tokenizer(tiny)
    conversations = [said("Hi"), said("What is the capital of France? " * 3), said("12")]
    alone = [generate(model, tokenizer, conversation, 30) for conversation in conversations]
    assert generate_batch(model, tokenizer, conversations, 30) == alone

    # A token in the middle of the first answer as stop token: that row stops there, the others at theirs or not at all.
    prompts = [tokenizer.encode(tokenizer.apply_chat_template(c, True), False) for c in conversations]
    rows = columns(generate_tokens(model, prompts, 30))
    stop = rows[0][7]
    object.__setattr__(model.config, "eos_token_ids", (stop,))
    expected = [row[: row.index(stop)] if stop in row else row for row in rows]
    assert len(expected[0]) <= 7 < len(max(expected, key=len))
    answers = [tokenizer.decode(row, skip_special_tokens=True) for row in expected]
    assert generate_batch(model, tokenizer, conversations, 30) == answers


def test_both_the_models_and_the_tokenizers_end_token_stop():
    model = saying(b"abcZdef", eos=(ord("Z"),))
    assert generate(model, Bytes(), said("?"), 100) == "abc"
    assert "".join(stream(saying(b"abcZdef", eos=(ord("Z"),)), Bytes(), said("?"))) == "abc"
    assert generate(saying(b"abc", eos=(ord("Z"),)), Bytes(), said("?"), 100) == "abc"  # by the tokenizer's 256


def test_no_room_for_an_answer():
    assert generate_batch(saying("x"), Bytes(), [said("?"), said("!")], 0) == ["", ""]
    with pytest.raises(ValueError, match="context"):
        generate(saying("x", context=10), Bytes(), said("a long question"), 4)
