"""What is shown of tokens: against texts written by hand, and against a reader that turns it back into bytes."""

import random
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import dialects
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minift
from minift.data.collate import Batch, share_prefix
from minift.data.encode import IGNORE, Example
from minift.study.show import Shown, ShownRow, Token, show_batch, show_example

LEGEND = "[trained]  not trained  «control token»    · space  ↵ line break  ⇥ tab"
ANSI = re.compile(r"\x1b\[([0-9;]*)m")
BLUE, ORANGE = "38;5;32", "38;5;214"


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> minift.Tokenizer:
    return minift.load_tokenizer(tiny)


@pytest.fixture(scope="module")
def sentencepiece(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> minift.Tokenizer:
    folder = tmp_path_factory.mktemp("show") / "zephyr"
    return minift.load_tokenizer(dialects.write(tiny, folder, dialects.DIALECTS["zephyr"]))


def example(tokenizer: minift.Tokenizer, prompt: str, answer: str) -> Example:
    """Only the answer is trained."""
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer))
    return Example(first + second, [IGNORE] * len(first) + second)


def body(shown: Shown) -> str:
    """Without the legend."""
    legend, _, text = str(shown).partition("\n\n")
    assert legend == LEGEND
    return text


def tokens(shown: Shown) -> list[Token]:
    return [token for row in shown.rows for part in row.parts for token in part.tokens]


# --- exact text -------------------------------------------------------------------------------------------------------


def test_an_example(tokenizer: minift.Tokenizer):
    """By hand: the vocabulary knows ☃ (3 bytes) and 😀 (4) by their bytes only, and no `the` without a space."""
    shown = show_example(tokenizer, example(tokenizer, "<|im_start|>user\nthe sea\t☃\n", "😀 is\r[x]<|im_end|>"))
    assert body(shown) == (
        "21 tokens, 10 trained\n"
        "       0  «<|im_start|>» user ↵\n"
        "       3  t he ·sea ⇥ <0xE2> <0x98> <0x83> ↵\n"
        "      11  [<0xF0>] [<0x9F>] [<0x98>] [<0x80>] [·is] [␍] [[] [x] []] [«<|im_end|>»]"
    )
    assert repr(shown) == str(shown)


def two(tokenizer: minift.Tokenizer) -> list[Example]:
    return [example(tokenizer, "You are", " is wide<|im_end|>"), example(tokenizer, "You", " sea<|im_end|>")]


LONG = "       0  You ·are [·is] [·w] [id] [e] [«<|im_end|>»]"
SHORT = "       0  You [·sea] [«<|im_end|>»]"
TRAINED = ["·is", "·w", "id", "e", "«<|im_end|>»", "·sea", "«<|im_end|>»"]
PADS = "  padding\n          4 times «<|im_end|>»"


def test_padding_on_the_right(tokenizer: minift.Tokenizer):
    assert body(show_batch(tokenizer, minift.collate(two(tokenizer), pad_id=2))) == (
        f"row 0: 7 tokens, 5 trained\n  document 0\n{LONG}\n\n"
        f"row 1: 3 tokens, 2 trained, 4 padding\n  document 0\n{SHORT}\n{PADS}"
    )


def test_padding_on_the_left(tokenizer: minift.Tokenizer):
    assert body(show_batch(tokenizer, minift.collate(two(tokenizer), pad_id=2, padding_side="left"))) == (
        f"row 0: 7 tokens, 5 trained\n  document 0\n{LONG}\n\n"
        f"row 1: 3 tokens, 2 trained, 4 padding\n{PADS}\n  document 0\n{SHORT}"
    )


def test_documents_in_one_row_each_count_from_0(tokenizer: minift.Tokenizer):
    assert body(show_batch(tokenizer, minift.flatten(two(tokenizer)))) == (
        f"row 0: 10 tokens, 7 trained\n  document 0\n{LONG}\n  document 1\n{SHORT}"
    )


def test_documents_that_are_cut_into_several_rows(tokenizer: minift.Tokenizer):
    """Each piece counts from 0, and its first token is not trained."""
    shown = [body(show_batch(tokenizer, row)) for row in minift.pack(two(tokenizer), length=4, strategy="wrapped")]
    assert shown == [
        "row 0: 4 tokens, 2 trained\n  document 0\n       0  You ·are [·is] [·w]",
        "row 0: 4 tokens, 2 trained\n  document 0\n       0  id [e] [«<|im_end|>»]\n  document 1\n       0  You",
        "row 0: 2 tokens, 1 trained\n  document 0\n       0  ·sea [«<|im_end|>»]",
    ]


def test_a_shared_prefix(tokenizer: minift.Tokenizer):
    """Rows go on where the prefix ends. All have `You ·are`, but behind `·are` comes a token that is trained."""
    rows = [example(tokenizer, "You are", " is<|im_end|>"), example(tokenizer, "You are", " sky<|im_end|>")]
    batch = share_prefix(minift.collate(rows, pad_id=2), least=1)
    assert batch.shared_prefix == (1, (3, 4))
    assert body(show_batch(tokenizer, batch)) == (
        "2 rows in one sequence: 8 tokens, 5 trained\n"
        "  shared prefix\n       0  You\n"
        "  row 0\n       1  ·are [·is] [«<|im_end|>»]\n"
        "  row 1\n       1  ·are [·s] [ky] [«<|im_end|>»]"
    )


def test_positions_that_do_not_go_on_begin_a_line(tokenizer: minift.Tokenizer):
    """Somebody else's batch, with one document number for two documents."""
    batch = minift.flatten(two(tokenizer))
    batch = Batch(batch.input_ids_bs, batch.labels_bs, batch.positions_bs, batch.documents_bs * 0)
    assert body(show_batch(tokenizer, batch)) == f"row 0: 10 tokens, 7 trained\n  document 0\n{LONG}\n{SHORT}"


def test_padding_of_several_tokens_is_counted_one_by_one(tokenizer: minift.Tokenizer):
    batch = minift.collate(two(tokenizer), pad_id=2)
    batch.input_ids_bs[1, -1] = 0
    assert body(show_batch(tokenizer, batch)).endswith(
        "  padding\n          3 times «<|im_end|>»\n          1 times «<|endoftext|>»"
    )


# --- what counts ------------------------------------------------------------------------------------------------------


def test_a_rows_first_token_is_never_trained(tokenizer: minift.Tokenizer):
    ids = tokenizer.encode("You are")
    assert body(show_example(tokenizer, Example(ids, ids))) == "2 tokens, 1 trained\n       0  You [·are]"
    batch = minift.collate([Example(ids, ids)], pad_id=2)
    assert [token.state for token in tokens(show_batch(tokenizer, batch))] == ["untrained", "trained"]


@pytest.mark.parametrize("layout", ["right", "left", "packed", "shared"])
def test_as_many_tokens_are_trained_as_the_loss_counts(tokenizer: minift.Tokenizer, layout: str):
    """For labels drawn at random."""
    generator = random.Random(0)
    examples = []
    for size in (1, 7, 12, 3):
        ids = [5, 6, 7, *(generator.randrange(3, 300) for _ in range(size))]
        labels = [IGNORE] * 3 + [index if generator.random() < 0.5 else IGNORE for index in ids[3:]]
        examples.append(Example(ids, labels))
    if layout == "packed":
        batches = minift.pack(examples, length=9, strategy="bfd_split")
    else:
        batch = minift.collate(examples, pad_id=2, padding_side="left" if layout == "left" else "right")
        batches = [share_prefix(batch, least=1) if layout == "shared" else batch]
    assert (batches[0].shared_prefix is not None) == (layout == "shared")
    assert sum(batch.trained_tokens for batch in batches) > 5
    for batch in batches:
        shown = tokens(show_batch(tokenizer, batch))
        states = [token.state for token in shown]
        assert states.count("trained") == batch.trained_tokens
        assert states.count("padding") == int((batch.documents_bs < 0).sum())
        assert [token.id for token in shown] == batch.input_ids_bs.flatten().tolist()
        assert [token.position for token in shown] == batch.positions_bs.flatten().tolist()


def test_a_label_that_is_not_its_token_is_refused(tokenizer: minift.Tokenizer):
    """Labels that were shifted, say."""
    with pytest.raises(ValueError, match="token 1 has id 6 but label 7"):
        show_example(tokenizer, Example([5, 6, 7], [IGNORE, 7, IGNORE]))
    batch = minift.collate([Example([5, 6], [IGNORE, 6])], pad_id=2)
    batch.labels_bs[0, 0] = 6
    with pytest.raises(ValueError, match="token 0 has id 5 but label 6"):
        show_batch(tokenizer, batch)


def test_an_id_beyond_the_vocabulary(tokenizer: minift.Tokenizer):
    shown = show_example(tokenizer, Example([5, 10**6], [IGNORE, 10**6]))
    assert tokens(shown)[1].text == "<#1000000>"


def test_control_tokens_are_told_from_text_that_spells_them(tokenizer: minift.Tokenizer):
    read = tokenizer.encode("<|im_end|>", special_in_text=False)
    shown = tokens(show_example(tokenizer, Example([2, *read], [IGNORE] * (1 + len(read)))))
    assert shown[0].is_control and shown[0].text == "<|im_end|>"
    assert not any(token.is_control for token in shown[1:]) and "".join(t.text for t in shown[1:]) == "<|im_end|>"


def test_added_tokens_are_written_as_they_are(tiny: Path):
    """Not read as letters of the byte alphabet: é would be the byte 0xE9."""
    tokenizer = minift.load_tokenizer(tiny)
    ids = [*tokenizer.add_tokens(["<think é>"], special=False), *tokenizer.add_tokens(["<|é|>"])]
    shown = tokens(show_example(tokenizer, Example(ids, [IGNORE] * 2)))
    assert [(token.text, token.is_control) for token in shown] == [("<think·é>", False), ("<|é|>", True)]


# --- what is shown says which bytes there are -------------------------------------------------------------------------

# Without the marks themselves, which stand for something else once they are shown.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="·↵⇥␍◌<>«»\u2581"), max_size=30)


def as_bytes(shown: str) -> bytes:
    """Read what is shown of one token."""
    shown = shown.removeprefix("◌")
    for mark, letter in (("·", " "), ("↵", "\n"), ("⇥", "\t"), ("␍", "\r")):
        shown = shown.replace(mark, letter)
    pieces = re.split(r"(<0x..>|<U\+[0-9A-F]+>)", shown)
    return b"".join(
        bytes([int(piece[3:5], 16)])
        if piece.startswith("<0x")
        else chr(int(piece[3:-1], 16)).encode()
        if piece.startswith("<U+")
        else piece.encode()
        for piece in pieces
    )


@given(text=TEXT)
@settings(deadline=None, derandomize=True)
def test_bytes_of_a_byte_level_tokenizer(tokenizer: minift.Tokenizer, text: str):
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = tokens(show_example(tokenizer, Example(ids, [IGNORE] * len(ids))))
    assert b"".join(as_bytes(token.text) for token in shown) == text.encode()
    assert [token.ends_line for token in shown] == [b"\n" in as_bytes(token.text) for token in shown]
    check_is_harmless(shown)


@given(text=TEXT)
@settings(deadline=None, derandomize=True)
def test_bytes_of_a_tokenizer_with_space_marks(sentencepiece: minift.Tokenizer, text: str):
    """It puts a space in front of every text that is not empty; bytes are pieces of their own."""
    ids = sentencepiece.encode(text, add_special_tokens=False)
    shown = tokens(show_example(sentencepiece, Example(ids, [IGNORE] * len(ids))))
    assert b"".join(as_bytes(token.text) for token in shown) == (b" " if text else b"") + text.encode()
    check_is_harmless(shown)


def check_is_harmless(shown: list[Token]) -> None:
    for token in shown:
        assert token.text.isprintable() and " " not in token.text
        assert not unicodedata.category(token.text[0]).startswith("M")


def test_every_token_comes_once_in_lines_that_fit(tokenizer: minift.Tokenizer):
    """No line is broken early: the first token of the next would not have fitted."""
    ids = [3 + index % 300 for index in range(1000)]
    ids = [index for index in ids if "\n" not in tokenizer.decode([index])]
    lines = body(show_example(tokenizer, Example(ids, [IGNORE] * len(ids)))).splitlines()[1:]
    cells = [line[10:].split(" ") for line in lines]
    assert sum(map(len, cells)) == len(ids)
    assert [int(line[:8]) for line in lines] == [sum(map(len, cells[:index])) for index in range(len(cells))]
    for line, following in zip(lines, [*cells[1:], None], strict=True):
        assert len(line) <= 110
        assert following is None or len(f"{line} {following[0]}") >= 110


# --- colours ----------------------------------------------------------------------------------------------------------


def test_colours_say_what_brackets_say(tokenizer: minift.Tokenizer):
    batch = minift.collate(two(tokenizer), pad_id=2)
    plain, colored = show_batch(tokenizer, batch), show_batch(tokenizer, batch, color=True)
    assert "\x1b" not in str(plain)
    painted = re.findall(r"\x1b\[([0-9;]*)m(.*?)\x1b\[0m", str(colored))
    trained = [text for codes, text in painted if codes.startswith(f"4;{BLUE}")]
    assert trained == ["trained", *TRAINED]
    assert [text for codes, text in painted if codes.startswith(ORANGE)] == ["«<|im_end|>»"]
    # Control tokens are bold besides.
    assert all(codes.endswith(";1") or codes == "1" for codes, text in painted if text.startswith("«"))
    without = re.sub(r"\[(\S+?|trained)\](?=\s|$)", r"\1", str(plain))
    assert ANSI.sub("", str(colored)) == without


def test_data_cannot_speak_to_the_terminal(tokenizer: minift.Tokenizer):
    evil = "\x1b[2J\x07\x9b31m\u202e\u2028\x00"
    shown = show_example(tokenizer, example(tokenizer, evil, evil))
    assert set(re.sub(r"[^\x00-\x1f\x7f-\x9f\u2028\u202e]", "", str(shown))) == {"\n"}
    shown = Shown([ShownRow(f"row 1: {evil} <x>", [])])
    assert str(shown).partition("\n\n")[2] == "row 1: <U+001B>[2J<U+0007><U+009B>31m<U+202E><U+2028><U+0000> <x>"


# --- HTML -------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser makes of it: text, and who is inside of what."""

    def __init__(self, source: str):
        super().__init__()
        self.text, self.tags, self.open = "", set(), []
        self.inside: dict[str, list[str]] = {}
        self.hints: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"title", "style"}
        self.hints += [value or "" for name, value in attrs if name == "title"]
        self.open.append(tag)

    def handle_endtag(self, tag: str):
        assert self.open.pop() == tag

    def handle_data(self, data: str):
        self.text += data
        for tag in self.open:
            self.inside.setdefault(tag, []).append(data)


def test_html_says_what_the_terminal_says(tokenizer: minift.Tokenizer):
    batch = minift.collate(two(tokenizer), pad_id=2)
    page = Page(show_batch(tokenizer, batch)._repr_html_())
    assert page.text == ANSI.sub("", str(show_batch(tokenizer, batch, color=True)))
    assert page.tags == {"pre", "span", "u", "b"}
    assert page.inside["u"] == ["trained", *TRAINED]
    assert page.inside["b"] == ["«control token»", *["«<|im_end|>»"] * 3]
    ids = batch.input_ids_bs[0].tolist()
    assert page.hints[:7] == [f"id {index}, position {place}" for place, index in enumerate(ids)]
    assert page.hints[-1] == "id 2"  # padding has no position


def test_data_cannot_write_html(tiny: Path):
    tokenizer = minift.load_tokenizer(tiny)
    tokenizer.add_tokens(["<script>"], special=False)
    tokenizer.add_tokens(['<img src=x onerror="alert(1)">'])
    evil = '<script>alert("1")</script>\'&lt;<img src=x onerror="alert(1)">'
    found = example(tokenizer, f"x{evil}", evil)
    shown = show_example(tokenizer, found)
    assert sum(token.text == "<script>" for token in tokens(shown)) == 2
    assert sum(token.is_control for token in tokens(shown)) == 2
    for what in (shown, Shown([ShownRow(evil, [])])):
        page = Page(what._repr_html_())
        assert page.tags <= {"pre", "span", "u", "b"} and "&lt;" in page.text.replace(" ", "")
        assert "onerror" in page.text.replace(" ", "") and "<script>" in page.text


def test_html_takes_the_pictures_colours(tokenizer: minift.Tokenizer):
    from minift.study.picture import BLUE, ORANGE

    source = show_batch(tokenizer, minift.collate(two(tokenizer), pad_id=2))._repr_html_()
    trained, padded = (re.findall(pattern, source) for pattern in (r"<u[^>]*>", rf"<span[^>]*{ORANGE}[^>]*>"))
    assert (len(trained), len(padded)) == (1 + 7, 1)  # the legend names what is trained
    assert all(BLUE in tag and "underline" in tag for tag in trained)
