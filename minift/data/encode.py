"""From a row to token ids and labels: the one place where it is decided what the model is trained to say.

Labels are the ids, or -100 where nothing is to be learned. They are *not* shifted here; the loss does that.

    ids      <|im_start|> user \\n Hello <|im_end|> \\n <|im_start|> assistant \\n | Hi   ! <|im_end|> \\n
    labels      -100      ...                                              -100    | Hi   ! <|im_end|> \\n
                                                         prompt length ------------^

Where the answer begins is found by structure: the conversation up to it is rendered with the assistant's header and
encoded alone, and what the two encodings have in common is not trained. Searching the ids for a marker text instead
fails whenever the tokenizer merges the marker with its neighbours, and then masks everything without a word.

Equal to TRL's `SFTTrainer` on the same rows: `loss_on="completion"` is its `completion_only_loss`.
"""

from dataclasses import dataclass
from typing import Literal

from minift.data.chat import Message
from minift.data.formats import Row, check_row
from minift.data.tokenizer import Tokenizer

IGNORE = -100
Span = tuple[int, int]
LossOn = Literal["all", "completion", "assistant"]
LOSS_ON: tuple[LossOn, ...] = ("all", "completion", "assistant")


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
        return sum(label != IGNORE for label in self.labels[1:])


def encode(
    tokenizer: Tokenizer, row: Row, loss_on: LossOn = "completion", max_length: int | None = None, where: str = "row"
) -> Example:
    """Encode one row.

    Args:
        tokenizer: of the model that is trained.
        row: see formats.py.
        loss_on: "all" tokens; the "completion" (last assistant turn, or the completion); every "assistant" turn.
        max_length: cut after this many tokens.
        where: how errors name the row.

    Raises:
        ValueError: a malformed row, or one without a token to train on (after cutting).
    """
    if loss_on not in LOSS_ON:
        raise ValueError(f"unknown loss_on {loss_on!r}: choose one of {', '.join(LOSS_ON)}")
    check_row(row, where)
    try:
        ids, spans = (_encode_text if _is_text(row) else _encode_chat)(tokenizer, row, loss_on)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    example = Example(ids[:max_length], labels[:max_length])
    if not example.trained_tokens:
        if any(label != IGNORE for label in labels[1:]):
            raise ValueError(
                f"{where}: its {len(ids)} tokens are cut to max_length {max_length}, which removes the whole answer; "
                "raise max_length or shorten the row"
            )
        raise ValueError(f"{where}: has no token to train on with loss_on={loss_on!r}")
    return example


def _is_text(row: Row) -> bool:
    return "messages" not in row and not isinstance(row.get("prompt"), list)


def _encode_text(tokenizer: Tokenizer, row: Row, loss_on: LossOn) -> tuple[list[int], list[Span]]:
    """Plain text: the end-of-text token is appended, because no template does it."""
    if loss_on == "assistant":
        raise ValueError("loss_on='assistant' needs messages, this row is plain text")
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no end-of-text token, so plain text would never end")
    eos = tokenizer.special["eos_token"]
    prompt, text = row.get("prompt", ""), row["completion"] if "prompt" in row else row["text"]
    ids = tokenizer.encode(prompt + text + ("" if text.endswith(eos) else eos))
    if loss_on == "all" or "prompt" not in row:
        return ids, [(0, len(ids))]
    return ids, [(_common(tokenizer.encode(prompt), ids), len(ids))]


def _encode_chat(tokenizer: Tokenizer, row: Row, loss_on: LossOn) -> tuple[list[int], list[Span]]:
    messages: list[Message] = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    whole = tokenizer.apply_chat_template(messages)
    ids = tokenizer.encode(whole, add_special_tokens=False)

    def boundary(turns: int, add_generation_prompt: bool = False) -> int:
        """Where the first `turns` messages end in `ids`, the assistant's header included if asked for."""
        if not whole.startswith(tokenizer.apply_chat_template(messages[:turns])):
            raise ValueError(
                f"the chat template writes the first {turns} messages differently when more follow, "
                "so it cannot be told where the answer begins; use loss_on='all' or another template"
            )
        text = tokenizer.apply_chat_template(messages[:turns], add_generation_prompt)
        return _common(tokenizer.encode(text, add_special_tokens=False), ids)

    if loss_on == "all":
        return ids, [(0, len(ids))]
    if loss_on == "completion":
        if messages[-1]["role"] != "assistant":
            raise ValueError("the last message must be the assistant's for loss_on='completion'")
        first = len(messages) - 1 if "messages" in row else len(row["prompt"])
        return ids, [(boundary(first, True), len(ids))]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return ids, [(boundary(turn, True), boundary(turn + 1)) for turn in turns]


def _common(prefix: list[int], ids: list[int]) -> int:
    """Length of the common beginning. Shorter than `prefix` if the tokenizer merges its end with what follows."""
    return next((i for i, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), min(len(prefix), len(ids)))
