"""Ids and labels of chats in six dialects against TRL's SFTTrainer: 200 random conversations for each.

TRL takes the assistant's turns from {% generation %} marks. Ours does, too; without marks it renders prefixes, and then
the same tokens must be trained, up to the white space that the template writes behind the end of a turn.
"""

import random
from pathlib import Path
from typing import Any

import dialects
import peers
import pytest
from dialects import DIALECTS

from minift.data.encode import IGNORE, encode, encode_rows
from minift.data.tokenizer import Tokenizer

WORDS = [
    "the", "sea", " is", " wide", "\n", "\n\n", " ", "  ", "\t", "Paris.", "What is", "?", "12", "don't", "\r\n", "###",
    "Grüße", "世界", "🙂", "👩‍👩‍👧", "e\u0301", "\u2028", "assistant\n", "user", "```\nx\n```", "{{ x }}", "<|im", "|>",
    "[/INST", "<<SYS>>", "The capital of France.",
]  # fmt: skip
COUNT = 200


def text(draw: random.Random, most: int) -> str:
    return "".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))


def conversation(draw: random.Random) -> list[dict[str, str]]:
    """One to four pairs of turns; system messages, some of them empty; now and then a very long turn."""
    messages = [{"role": "system", "content": text(draw, 5) if draw.random() < 0.7 else ""}]
    messages = messages if draw.random() < 0.5 else []
    for _ in range(draw.choice([1, 1, 2, 3, 4])):
        user, answer = (text(draw, 400 if draw.random() < 0.02 else 8) for _ in "12")
        # A token that swallows the space behind it would reach into an answer that begins with one.
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": "Yes" + answer}]
    return messages


DRAW = random.Random(51)
CHATS = [conversation(DRAW) for _ in range(COUNT)]
MESSAGES = [{"messages": messages} for messages in CHATS]
SPLIT = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in CHATS]


@pytest.fixture(scope="module", params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(dialect: str, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dialects.write(tiny, tmp_path_factory.mktemp("marked") / dialect, DIALECTS[dialect])


@pytest.fixture(scope="module")
def unmarked(dialect: str, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dialects.write(tiny, tmp_path_factory.mktemp("unmarked") / dialect, DIALECTS[dialect], marked=False)


def pairs(folder: Path, rows: list[Any], loss_on: Any, max_length: int | None) -> list[tuple[list[int], list[int]]]:
    examples = encode_rows(Tokenizer(folder), rows, loss_on, max_length, drop=max_length is not None)
    return [(example.input_ids, example.labels) for example in examples]


@pytest.mark.parametrize("max_length", [None, 30, 90])
def test_completions_equal_trl(folder: Path, max_length: int | None):
    theirs = peers.peer_tokens(folder, SPLIT, True, max_length)
    assert pairs(folder, SPLIT, "completion", max_length) == theirs
    assert pairs(folder, MESSAGES, "completion", max_length) == theirs
    assert (len(theirs) == COUNT) == (max_length is None)


@pytest.mark.parametrize("max_length", [None, 60])
def test_assistant_turns_equal_trl(folder: Path, max_length: int | None):
    theirs = peers.peer_tokens(folder, MESSAGES, False, max_length, assistant_only=True)
    assert pairs(folder, MESSAGES, "assistant", max_length) == theirs
    assert (len(theirs) == COUNT) == (max_length is None)


def test_all_tokens_equal_trl(folder: Path):
    assert pairs(folder, MESSAGES, "all", 50) == peers.peer_tokens(folder, MESSAGES, False, 50)
    assert pairs(folder, SPLIT, "all", 50) == peers.peer_tokens(folder, SPLIT, False, 50)


def test_without_marks_the_same_tokens_are_trained_but_for_white_space(folder: Path, unmarked: Path):
    tokenizer, more = Tokenizer(folder), 0
    marked, plain = pairs(folder, MESSAGES, "assistant", None), pairs(unmarked, MESSAGES, "assistant", None)
    for (ids, theirs), (same, ours) in zip(marked, plain, strict=True):
        assert ids == same
        for mine, other, index in zip(ours, theirs, ids, strict=True):
            assert mine in (index, IGNORE) and (mine == other or other == IGNORE)
            more += mine != other
            assert mine == other or not tokenizer.decode([index]).strip()
    # ChatML and Zephyr end a turn with a line break behind the marks, Llama 2 writes a space in front of each answer.
    assert bool(more) == (tokenizer.template is not None and folder.name in ("chatml", "zephyr", "llama2"))


def test_every_answer_is_trained_with_its_end_and_nothing_else(dialect: str, folder: Path, unmarked: Path):
    """What is trained, decoded, is what the assistant said, in order, each with the end of the turn."""
    for place in (folder, unmarked):
        tokenizer = Tokenizer(place)
        for row in MESSAGES:
            example = encode(tokenizer, row, loss_on="assistant")
            trained = tokenizer.decode([label for label in example.labels if label != IGNORE])
            said = [m["content"] + DIALECTS[dialect].end for m in row["messages"] if m["role"] == "assistant"]
            last = "<|endoftext|>" if dialect == "phi3" else ""
            assert squeezed(trained) == squeezed("".join(said) + last)


def test_answers_that_begin_with_space_equal_trl(folder: Path):
    """Phi-3's header token swallows that space, so it covers part of the answer; TRL trains it, and so does ours."""
    starts = [" Hi", "\n\nHi", "  \n Hi", "\tHi", "\u2028Hi", "🙂", " 🙂 Hi ", "###"]
    rows = [{"prompt": SPLIT[0]["prompt"], "completion": [{"role": "assistant", "content": x}]} for x in starts]
    assert pairs(folder, rows, "completion", None) == peers.peer_tokens(folder, rows, True, None)
    messages = peers.as_messages(rows)
    assert pairs(folder, messages, "assistant", None) == peers.peer_tokens(
        folder, messages, False, None, assistant_only=True
    )


def squeezed(words: str) -> str:
    """Without white space, which SentencePiece-like tokenizers put in and control tokens swallow."""
    return "".join(words.split())


def test_with_the_header_each_turn_begins_where_the_one_before_ends(dialect: str, unmarked: Path):
    tokenizer = Tokenizer(unmarked)
    header = {
        "chatml": "<|im_start|>assistant",
        "llama3": "<|start_header_id|>assistant<|end_header_id|>",
        "zephyr": "<|assistant|>",
        "phi3": "<|assistant|>",
        "llama2": "",
        "gemma": "<start_of_turn>model",
    }[dialect]
    for row in MESSAGES[:50]:
        example = encode(tokenizer, row, loss_on="assistant_with_header")
        trained = tokenizer.decode([label for label in example.labels if label != IGNORE])
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        last = "<|endoftext|>" if dialect == "phi3" else ""
        expected = "".join(header + words + DIALECTS[dialect].end for words in said) + last
        assert squeezed(trained) == squeezed(expected)
