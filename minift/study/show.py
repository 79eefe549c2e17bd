"""Data to look at: every token, whether it is trained, and where documents begin.

Most of what goes wrong with data is seen at once by whoever looks at the tokens: an answer that is not trained, a turn
whose end is not, a space too many before the first word, a begin token that is there twice.

    [trained]  not trained  «control token»    · space  ↵ line break  ⇥ tab

    row 0: 12 tokens, 3 trained, 2 padding
      document 0
           0  «<|im_start|>» user ↵
           3  Say ·sea «<|im_end|>» ↵
           7  «<|im_start|>» assistant ↵
          10  [Sea] [«<|im_end|>»]
      padding
              2 times «<|im_end|>»

The number in front is the position of a line's first token. Spaces between tokens are not in the text; those that are
become dots. A byte that is no whole character is written as SentencePiece does, <0xF0>, and what cannot be seen or
would move the cursor, <U+200D>. A control token stands in «»: the text <s> is something else than the token «<s>».
Nothing is told by colour alone: on a terminal with colours trained tokens are blue and underlined, without they stand
in brackets.

A label at a row's first place never counts, because nothing comes before it, so that token is shown as not trained.

Left out: who may see whom (mask.py); what each token costs (its loss); right-to-left scripts, which terminals reorder
as they like.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

from minift.data.collate import Batch
from minift.data.encode import IGNORE, Example
from minift.data.tokenizer import Tokenizer
from minift.study.mask import parts
from minift.study.picture import BLUE, ORANGE

WIDTH = 100  # columns; a line ends before, or at a line break of the text
VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}

State = Literal["trained", "untrained", "padding"]


@dataclass(frozen=True)
class Token:
    """One token as it is shown. `text` has no character that a terminal would act on."""

    text: str
    id: int
    position: int
    state: State
    is_control: bool
    ends_line: bool


@dataclass(frozen=True)
class Part:
    """Tokens that belong together: a document, padding, a shared prefix. `name` is empty if there is but one."""

    name: str
    tokens: list[Token]


@dataclass(frozen=True)
class ShownRow:
    """A row of a batch, or an example."""

    title: str
    parts: list[Part]


@dataclass(frozen=True, repr=False)
class Shown:
    """Tokens to look at: `print` it, or leave it at the end of a notebook's cell.

    Attributes:
        rows: what is shown.
        color: whether str() has ANSI colours in place of brackets.
    """

    rows: list[ShownRow]
    color: bool = False

    def __str__(self) -> str:
        return "\n".join(_lines(self.rows, _colored if self.color else _bracketed))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        text = "\n".join(_lines(self.rows, _tagged, escape))
        return f'<pre style="font-family:monospace;white-space:pre-wrap;line-height:1.6">{text}</pre>'


def show_example(tokenizer: Tokenizer, example: Example, color: bool = False) -> Shown:
    """The tokens of one document.

    Args:
        color: whether str() has ANSI colours.

    Raises:
        ValueError: a label that is neither its token's id nor -100.
    """
    pairs = zip(example.input_ids, example.labels, strict=True)
    states: list[State] = [_state(index, label, column) for column, (index, label) in enumerate(pairs)]
    tokens = _Speller(tokenizer).tokens(example.input_ids, states, range(len(example)))
    return Shown([ShownRow(_title("", tokens), [Part("", tokens)])], color)


def show_batch(tokenizer: Tokenizer, batch: Batch, color: bool = False) -> Shown:
    """The rows of a batch: padded, packed, or laid out with a shared prefix.

    Args:
        color: whether str() has ANSI colours.

    Raises:
        ValueError: a label that is neither its token's id nor -100.
    """
    speller, rows = _Speller(tokenizer), []
    for row in range(batch.input_ids_bs.shape[0]):
        ids, labels, positions, documents = (
            tensor_bs[row].tolist()
            for tensor_bs in (batch.input_ids_bs, batch.labels_bs, batch.positions_bs, batch.documents_bs)
        )
        states: list[State] = [
            "padding" if document < 0 else _state(index, label, column)
            for column, (index, label, document) in enumerate(zip(ids, labels, documents, strict=True))
        ]
        tokens = speller.tokens(ids, states, positions)
        name = f"row {row}" if batch.shared_prefix is None else f"{len(batch.shared_prefix[1])} rows in one sequence"
        found = [Part(part, tokens[start:stop]) for part, start, stop in parts(batch, row)]
        rows.append(ShownRow(_title(name, tokens), found))
    return Shown(rows, color)


def _state(index: int, label: int, column: int) -> State:
    if label not in (index, IGNORE):
        raise ValueError(f"token {column} has id {index} but label {label}: a label is its token's id, or {IGNORE}")
    return "trained" if column and label != IGNORE else "untrained"


def _title(name: str, tokens: Sequence[Token]) -> str:
    counts = {state: sum(token.state == state for token in tokens) for state in ("trained", "padding")}
    said = [f"{len(tokens) - counts['padding']} tokens", f"{counts['trained']} trained"]
    said += [f"{counts['padding']} padding"] * bool(counts["padding"])
    return (f"{name}: " if name else "") + ", ".join(said)


# --- from ids to what is on the screen


class _Speller:
    """How the tokens of a tokenizer look, one by one: decoding them alone would lose spaces and half characters."""

    def __init__(self, tokenizer: Tokenizer):
        self._backend = tokenizer.backend  # its vocabulary, which has more to say than decode()
        self._controls = set(tokenizer.controls.ids.values())
        self._added = {index: token.content for index, token in self._backend.get_added_tokens_decoder().items()}
        decoder = self._backend.decoder
        self._is_byte_level = decoder is not None and decoder.decode(["Ġ"]) == " "

    def tokens(self, ids: Sequence[int], states: Sequence[State], positions: Iterable[int]) -> list[Token]:
        spelled = {index: self._text(index) for index in set(ids)}
        return [
            Token(_visible(spelled[index]), index, position, state, index in self._controls, "\n" in spelled[index])
            for index, state, position in zip(ids, states, positions, strict=True)
        ]

    def _text(self, index: int) -> str:
        """The text of a token; a byte that is part of a character is U+DC00 and that byte."""
        if index in self._added:
            return self._added[index]
        piece = self._backend.id_to_token(index)
        if piece is None:
            return f"<#{index}>"
        if self._is_byte_level and all(letter in BYTES for letter in piece):
            return bytes(BYTES[letter] for letter in piece).decode("utf-8", "surrogateescape")
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes([int(byte[1], 16)]).decode("utf-8", "surrogateescape")
        return piece.replace("\u2581", " ")


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: a letter for each byte. Those that are no visible letter have one from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(own))
    return {chr(byte): byte for byte in own} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTES = _byte_letters()


def _visible(text: str) -> str:
    # An accent without a letter would land on the mark or token in front of it.
    lone_accent = "◌" if text and unicodedata.category(text[0]).startswith("M") else ""
    return lone_accent + "".join(map(_visible_letter, text))


def harmless(text: str) -> str:
    """The text without letters that a terminal would act on; spaces stay."""
    return "".join(letter if letter.isprintable() else _visible_letter(letter) for letter in text)


def _visible_letter(letter: str) -> str:
    if letter in VISIBLE:
        return VISIBLE[letter]
    if "\udc80" <= letter <= "\udcff":
        return f"<0x{ord(letter) - 0xDC00:02X}>"
    return letter if letter.isprintable() else f"<U+{ord(letter):04X}>"


# --- lines

Paint = Callable[[Token], str]
TAGS = {
    "trained": ("u", f' style="background:{BLUE}33;text-decoration:underline 2px {BLUE}"'),
    "untrained": ("span", ""),
    "padding": ("span", f' style="background:{ORANGE}33"'),
}


def _bracketed(token: Token) -> str:
    text = _guillemets(token)
    return f"[{text}]" if token.state == "trained" else text


def _colored(token: Token) -> str:
    """Colours 32 and 214 of the terminal's 256 are next to the blue and the orange of the pictures."""
    codes = {"trained": ["4", "38;5;32"], "untrained": [], "padding": ["38;5;214"]}[token.state]
    codes = [*codes, "1"] if token.is_control else codes
    return f"\x1b[{';'.join(codes)}m{_guillemets(token)}\x1b[0m" if codes else token.text


def _tagged(token: Token) -> str:
    """The colours are behind the text and transparent, so that it is readable on light and dark pages."""
    (tag, style), text = TAGS[token.state], escape(_guillemets(token))
    where = "" if token.state == "padding" else f", position {token.position}"
    hint = "" if token.id < 0 else f' title="id {token.id}{where}"'
    return f"<{tag}{hint}{style}>{f'<b>{text}</b>' if token.is_control else text}</{tag}>"


def _guillemets(token: Token) -> str:
    return f"«{token.text}»" if token.is_control else token.text


LEGEND = [
    Token("trained", -1, 0, "trained", False, False),
    Token("not trained", -1, 0, "untrained", False, False),
    Token("control token", -1, 0, "untrained", True, False),
]
MARKS = f"{VISIBLE[' ']} space  {VISIBLE[chr(10)]} line break  {VISIBLE[chr(9)]} tab"


def _lines(rows: Sequence[ShownRow], paint: Paint, write: Callable[[str], str] = str) -> Iterator[str]:
    """`paint` writes tokens, `write` everything else."""
    yield "  ".join(map(paint, LEGEND)) + f"    {MARKS}"
    for row in rows:
        yield from ("", write(harmless(row.title)))
        for part in row.parts:
            if part.name:
                yield f"  {part.name}"
            for line in _broken(part.tokens):
                if line[0].state == "padding":
                    yield f"{'':>8}  {len(line)} times {paint(line[0])}"
                else:
                    yield f"{line[0].position:>8}  " + " ".join(map(paint, line))


def _broken(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """Lines end at the width, at a line break of the text, and where positions do not go on by one.

    Padding is a line for each token that it is made of.
    """
    if tokens and tokens[0].state == "padding":
        yield from ([*alike] for _, alike in groupby(tokens, key=lambda token: token.id))
        return
    line: list[Token] = []
    used = 0
    for token in tokens:
        size = len(_bracketed(token)) + 1
        goes_on = line and token.position == line[-1].position + 1 and not line[-1].ends_line
        if line and not (goes_on and used + size <= WIDTH):
            yield line
            line, used = [], 0
        line.append(token)
        used += size
    if line:
        yield line
