"""Stores of encoded documents: what comes back is what was put in, and nothing else is taken for a store.

The oracle is the list of examples itself, and for the file Python's `array` and `json`.
"""

import json
import re
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.data.encode import IGNORE, Example
from minift.data.store import HEADER, TokenStore, flat, write_store

KEY = "0123abc"


def masked(ids: list[int], trained: list[bool]) -> Example:
    return Example(ids, [index if is_trained else IGNORE for index, is_trained in zip(ids, trained, strict=True)])


EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=5).map(
        lambda pairs: masked([index for index, _ in pairs], [trained for _, trained in pairs])
    ),
    max_size=6,
)
# 0 trained and untrained, the largest id, a document without a token, one that is trained whole.
SOME = [masked([0, 5, 0], [False, True, True]), masked([], []), masked([2**31 - 1, 7], [True, True])]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of SOME, in two chunks."""
    write_store(tmp_path / "some.tokens", KEY, [flat(SOME[:1]), flat(SOME[1:])])
    return tmp_path / "some.tokens"


@settings(deadline=None, derandomize=True)
@given(examples=EXAMPLES, index=st.slices(6))
def test_a_store_is_the_list_that_it_was_made_of(examples: list[Example], index: slice):
    store = TokenStore.from_examples(examples)
    assert list(store) == examples and len(store) == len(examples)
    assert store.lengths.tolist() == [len(example) for example in examples]
    part = store[index]
    assert isinstance(part, TokenStore)
    assert list(part) == examples[index] and part.lengths.tolist() == [len(example) for example in examples[index]]
    assert list(part[::-1]) == examples[index][::-1]


def test_through_a_file(path: Path):
    store = TokenStore.open(path, KEY)
    assert list(store) == SOME and store.path == path
    assert list(TokenStore.open(path)) == SOME
    assert store[-1] == SOME[-1]
    assert {type(value) for value in store[0].input_ids + store[0].labels} == {int}
    for index in (3, -4):
        with pytest.raises(IndexError):
            store[index]
    store.verify()
    TokenStore.from_examples(SOME).verify()


def test_the_file_is_as_the_docstring_draws_it(path: Path):
    content = path.read_bytes()
    header = json.loads(content[:HEADER])
    assert (header["key"], header["documents"], header["tokens"]) == (KEY, 3, 5)
    tokens, offsets = array("i"), array("q")
    tokens.frombytes(content[HEADER : HEADER + 20])
    offsets.frombytes(content[HEADER + 20 :])
    assert tokens.tolist() == [0, -5 - 1, -0 - 1, -(2**31 - 1) - 1, -7 - 1]
    assert offsets.tolist() == [0, 3, 3, 5]


@pytest.mark.parametrize("chunks", [[], [flat([])], [flat([]), flat([])]])
def test_a_store_may_be_empty(tmp_path: Path, chunks: list):
    write_store(tmp_path / "none", KEY, chunks)
    assert list(TokenStore.open(tmp_path / "none", KEY)) == list(TokenStore.from_chunks(chunks)) == []


def test_a_store_is_mapped_not_read(tmp_path: Path):
    """16 GB of tokens, all of them a hole in the file: read, they would not fit."""
    tokens = 4 * 10**9
    offsets = np.array([0, 5, tokens], "<i8").tobytes()
    sums = {"tokens_crc32": 0, "offsets_crc32": zlib.crc32(offsets)}
    header = {"format": "minift tokens", "version": 1, "key": KEY, "documents": 2, "tokens": tokens} | sums
    with (tmp_path / "large").open("wb") as file:
        file.write(json.dumps(header).encode().ljust(HEADER))
        file.seek(HEADER + 4 * tokens)
        file.write(offsets)
    store = TokenStore.open(tmp_path / "large", KEY)
    assert store.lengths.tolist() == [5, tokens - 5] and store[0].input_ids == [0] * 5


# --- what is refused


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def of_version_2(content: bytes) -> bytes:
    return content.replace(b'"version": 1', b'"version": 2', 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], r"is damaged: 4,\d\d\d bytes instead of 4,\d\d\d; delete it"),
        (lambda content: content + b"\0", "is damaged: "),
        (lambda content: flipped(content, len(content) - 8), "is damaged: its offsets have changed; delete it"),
        (lambda content: flipped(content, 2), "is not a token store"),
        (lambda content: b"", "is not a token store"),
        (lambda content: content[: HEADER - 1], "is not a token store"),
        (lambda content: b"[1]", "is not a token store"),
        (lambda content: b'{"format": "safetensors"}'.ljust(HEADER), "is not a token store"),
        (lambda content: b"\x80\x04" * HEADER, "is not a token store"),
        (lambda content: content.replace(b'"documents": 3', b'"documents":-3', 1), "is not a token store"),
        (lambda content: content.replace(b'"key"', b'"kex"', 1), "is not a token store"),
        (lambda content: content.replace(b'"tokens": 5', b'"tokens":"5', 1), "is not a token store"),
        (lambda content: content.replace(b'"tokens": 5', b'"tokens": 6', 1), "is damaged: "),
        (of_version_2, "is of version 2, and version 1 is needed; delete it"),
    ],
)
def test_no_other_file_is_taken_for_a_store(path: Path, change: Callable[[bytes], bytes], message: str):
    content = path.read_bytes()
    assert change(content) != content
    path.write_bytes(change(content))
    with pytest.raises(ValueError, match=re.escape(str(path)) + " " + message):
        TokenStore.open(path, KEY)


def test_a_store_for_another_key_is_refused(path: Path):
    with pytest.raises(ValueError, match=re.escape(str(path)) + rf" was made for another key \({KEY}\)"):
        TokenStore.open(path, KEY + "0")


def test_changed_tokens_are_found_when_asked_for(path: Path):
    path.write_bytes(flipped(path.read_bytes(), HEADER + 17))
    store = TokenStore.open(path, KEY)
    with pytest.raises(ValueError, match=re.escape(str(path)) + " is damaged: its tokens have changed"):
        store.verify()


@pytest.mark.parametrize("example", [Example([4, 5], [IGNORE, label]) for label in (6, -1, -101, 0)])
def test_other_labels_are_refused(example: Example):
    with pytest.raises(ValueError, match="labels that are the id or -100; these examples differ"):
        TokenStore.from_examples([example])


def test_an_id_below_0_is_refused():
    """It would come back as another id, and trained."""
    with pytest.raises(ValueError, match="ids from 0 on"):
        TokenStore.from_examples([Example([4, -5], [IGNORE, IGNORE])])


def test_what_fails_half_way_leaves_nothing(tmp_path: Path):
    def chunks():
        yield flat(SOME)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_store(tmp_path / "half", KEY, chunks())
    assert [*tmp_path.iterdir()] == []
