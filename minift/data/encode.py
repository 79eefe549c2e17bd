"""From a row to token ids and labels: the one place where it is decided what the model is trained to say.

Labels are the ids, or -100 where nothing is to be learned. They are *not* shifted here; the loss does that.

    text     <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n | Hi!<|im_end|>\\n
    ids      [im_start] user \\n Hello [im_end] \\n [im_start] assistant \\n | Hi   ! [im_end] \\n
    labels      -100      ...                                       -100  | Hi   ! [im_end] \\n

The conversation is rendered once and encoded once. Where a turn begins and ends is a position in the text (spans.py),
and the tokenizer says which characters each token covers. A token is trained if it covers any of the answer's, and so
is the token that ends the turn, wherever the template puts it: a model that never saw it does not stop. Searching the
ids for a marker text instead fails whenever the tokenizer merges the marker with its neighbours (study/
response_template.py).

Only where prompt and answer are told apart by nothing but the prompt ("completion") is the prompt encoded as well: the
answer begins where the ids part, which is earlier than the text says if the last token of the prompt merges with it.

Text that spells a control token is a text like any other (controls.py), `special_in_text=True` reads it as the peers
do. A row that would train nothing, or the wrong thing, in silence is refused.

Equal to TRL's `SFTTrainer` on the same rows: "completion" is its `completion_only_loss`; "assistant" is its
`assistant_only_loss` if the template has {% generation %} marks. Without marks the turn goes on to where the template
ends it: one newline further for ChatML.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minift.data.drafts import LOSS_ON, Draft, LossOn, RowError, drafts
from minift.data.formats import Row
from minift.data.tokenizer import Tokenizer

__all__ = ["IGNORE", "LOSS_ON", "Example", "LossOn", "RowError", "cut", "encode", "encode_named", "encode_rows"]

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """One document. `labels[i]` is `input_ids[i]` or -100."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """Labels that count: the first token of a document is predicted from nothing, so it never does."""
        labels = self.labels[1:]
        return len(labels) - labels.count(IGNORE)


def encode(
    tokenizer: Tokenizer,
    row: Row,
    loss_on: LossOn = "completion",
    max_length: int | None = None,
    where: str = "row",
    special_in_text: bool = False,
) -> Example:
    """Encode one row.

    Args:
        tokenizer: of the model that is trained.
        row: see formats.py.
        loss_on: "all" tokens; the "completion" (last assistant turn, or the completion); every "assistant" turn;
            "assistant_with_header", the words before it that name the speaker included.
        max_length: cut after this many tokens.
        where: how errors name the row.
        special_in_text: read control tokens that the row's text spells as such, as the peers do.

    Raises:
        ValueError: a malformed row; one without a token to train on (after cutting); an answer that is empty, or that
            the template leaves out.
    """
    (draft,) = drafts(tokenizer, [(where, row)], loss_on, special_in_text)
    return cut(draft, loss_on, max_length)


def encode_rows(
    tokenizer: Tokenizer,
    rows: Iterable[Row],
    loss_on: LossOn = "completion",
    max_length: int | None = None,
    special_in_text: bool = False,
    drop: bool = False,
) -> list[Example]:
    """Encode many rows on all cores: the same examples as `encode` gives one by one.

    Args:
        drop: leave out rows that `encode` refuses. `examine` (report.py) says which and why.

    Raises:
        ValueError: the first row that is refused, by its number, counted from 1.
    """
    numbered = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    return [*encode_named(tokenizer, numbered, loss_on, max_length, special_in_text, drop)]


def encode_named(
    tokenizer: Tokenizer,
    rows: Iterable[tuple[str, Row]],
    loss_on: LossOn,
    max_length: int | None,
    special_in_text: bool,
    drop: bool,
) -> Iterator[Example]:
    """`encode_rows`, one example after the other, of (name, row); errors name the row so."""
    for draft in drafts(tokenizer, rows, loss_on, special_in_text):
        try:
            yield cut(draft, loss_on, max_length)
        except RowError:
            if not drop:
                raise


def cut(draft: Draft | RowError, loss_on: LossOn, max_length: int | None) -> Example:
    """The example, cut to length.

    Raises:
        RowError: the draft's own, or no token is left to train on.
    """
    if isinstance(draft, RowError):
        raise draft
    ids, labels = draft.ids, [IGNORE] * len(draft.ids)
    for start, stop in draft.ranges:
        labels[start:stop] = ids[start:stop]
    example = Example(ids[:max_length], labels[:max_length])
    if example.trained_tokens:
        return example
    if any(label != IGNORE for label in labels[1:]):
        raise RowError(
            draft.where,
            "answer cut away",
            f"its {len(ids)} tokens are cut to max_length {max_length}, which removes the whole answer; "
            "raise max_length or shorten the row",
        )
    raise RowError(draft.where, "nothing to train on", f"has no token to train on with loss_on={loss_on!r}")
