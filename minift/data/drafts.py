"""Between a row and its labels: what is encoded, and which of the tokens are trained.

    row --_plan--> text, and where in it the answers are --_Encoder--> ids, ranges of trained tokens --cut--> Example
                                      many at once

A draft knows more than an example does (what ended each answer, what was found in the text), because the report that
is made before training (report.py) wants to know it, too. See encode.py for the rules, spans.py for the positions.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from tokenizers import Encoding

from minift.data.chat import Message, Span
from minift.data.controls import Private, encode_batch
from minift.data.formats import Row, check_row
from minift.data.spans import Script, answer_start, assistant_spans, check_is_written, common, is_empty
from minift.data.tokenizer import Tokenizer

LossOn = Literal["all", "completion", "assistant", "assistant_with_header"]
LOSS_ON: tuple[LossOn, ...] = ("all", "completion", "assistant", "assistant_with_header")
BATCH = 512  # rows encoded at once
REMEMBERED = 200  # characters: headers are short and come in every row, prompts are long and come once


class RowError(ValueError):
    """A row that cannot be trained on. The message names the row and what to do, `reason` the kind of fault."""

    def __init__(self, where: str, reason: str, message: object):
        super().__init__(f"{where}: {message}")
        self.reason = reason


@dataclass
class Draft:
    """A row before it is cut to length.

    Attributes:
        ranges: (start, stop) of the trained tokens, one for each answer.
        ends: the place in `ids` of the control token that ends each range, None where there is none.
        controls: control tokens that the row's own text spells.
        parted: last token of the prompt when encoded alone, and what it is in the whole, as text; None if the same.
        two_begins: the text began with the begin token that the tokenizer puts there as well; one was dropped.
    """

    where: str
    ids: list[int]
    ranges: list[Span]
    ends: list[int | None]
    controls: list[str]
    parted: tuple[str, str] | None
    two_begins: bool


@dataclass
class _Plan:
    """What has to be encoded for a row. `prompt` and `spans` say what is trained; all of it if neither is given."""

    where: str
    text: str
    is_chat: bool
    prompt: str | None = None
    spans: list[Span] | None = None
    controls: list[str] = field(default_factory=list)
    private: Private | None = None


def drafts(
    tokenizer: Tokenizer, rows: Iterable[tuple[str, Row]], loss_on: LossOn, special_in_text: bool
) -> Iterator[Draft | RowError]:
    """A draft of each (name, row), in order, or why there is none."""
    if loss_on not in LOSS_ON:
        raise ValueError(f"unknown loss_on {loss_on!r}: choose one of {', '.join(LOSS_ON)}")
    remaining, encoder = iter(rows), _Encoder(tokenizer)
    while batch := list(islice(remaining, BATCH)):
        plans = [_plan(tokenizer, row, loss_on, special_in_text, where) for where, row in batch]
        encodings = encoder.encode([plan for plan in plans if isinstance(plan, _Plan)])
        for plan in plans:
            yield plan if isinstance(plan, RowError) else encoder.draft(plan, next(encodings))


# --- what to encode


def _plan(tokenizer: Tokenizer, row: Row, loss_on: LossOn, special_in_text: bool, where: str) -> _Plan | RowError:
    try:
        check_row(row, where)
    except ValueError as error:
        return RowError(where, "malformed row", str(error).removeprefix(f"{where}: "))
    is_text = "messages" not in row and not isinstance(row.get("prompt"), list)
    try:
        return (_plan_text if is_text else _plan_chat)(tokenizer, row, loss_on, special_in_text, where)
    except RowError as refusal:
        return refusal
    except ValueError as error:
        return RowError(where, "template or tokenizer", error)


def _plan_text(tokenizer: Tokenizer, row: Row, loss_on: LossOn, special_in_text: bool, where: str) -> _Plan:
    """Plain text: the end-of-text token is appended, because no template does it."""
    if loss_on.startswith("assistant"):
        raise ValueError(f"loss_on={loss_on!r} needs messages, this row is plain text")
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no end-of-text token, so plain text would never end")
    has_prompt = "prompt" in row
    prompt, text = row.get("prompt", ""), row["completion"] if has_prompt else row["text"]
    plan = _Plan(where, prompt + text, is_chat=False, controls=tokenizer.controls.spelled_in(prompt + text))
    if has_prompt and loss_on == "completion":
        if not text:
            raise RowError(where, "empty answer", "the completion is empty, so the model would learn to say nothing")
        plan.prompt = prompt
    if plan.controls and not special_in_text:
        plan.private = tokenizer.controls.private(plan.text)
        plan.text += plan.private.spelling[tokenizer.eos_token]
    elif not text.endswith(tokenizer.eos_token):
        plan.text += tokenizer.eos_token
    return plan


def _plan_chat(tokenizer: Tokenizer, row: Row, loss_on: LossOn, special_in_text: bool, where: str) -> _Plan:
    messages: list[Message] = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    if tokenizer.template is None:
        tokenizer.apply_chat_template(messages)  # says so
    first = 0
    if loss_on == "completion":
        if messages[-1]["role"] != "assistant":
            raise RowError(
                where, "no answer at the end", "the last message must be the assistant's for loss_on='completion'"
            )
        first = len(messages) - 1 if "messages" in row else len(row["prompt"])
    script = Script(tokenizer, row, messages, special_in_text)
    text = script.write(len(messages), False)
    plan = _Plan(where, text, is_chat=True, controls=script.controls, private=script.private)
    if loss_on == "all":
        return plan
    for turn in range(first, len(messages)):
        if messages[turn]["role"] == "assistant":
            if is_empty(messages[turn]):
                raise RowError(
                    where,
                    "empty answer",
                    f"the assistant says nothing in message {turn + 1}, so the model would learn to say nothing",
                )
            check_is_written(script, messages, turn, text)
    if loss_on == "completion":
        answer_start(script, first, text)
        plan.prompt = script.write(first, True)
    elif loss_on == "assistant" and (marks := script.marks()):
        plan.spans = marks
    else:
        plan.spans = assistant_spans(script, messages, text, header=loss_on == "assistant_with_header")
    return plan


# --- what of it is trained


class _Encoder:
    """Encodes plans, many at once, and turns spans of characters into ranges of tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._prompts: dict[tuple[bool, str], list[int]] = {}
        # The unknown token also stands for letters that the vocabulary lacks, so it ends a turn only where it is EOS.
        self._ending = {index for index in tokenizer.controls.ids.values() if index != tokenizer.unk_id}
        self._ending |= {tokenizer.eos_id} - {None}

    def encode(self, plans: list[_Plan]) -> Iterator[Encoding | ValueError]:
        """In the order of the plans; those that cannot be encoded give the error."""
        groups: dict[tuple[int, bool], list[int]] = {}
        for index, plan in enumerate(plans):
            groups.setdefault((id(plan.private), plan.is_chat), []).append(index)
        results: dict[int, Encoding | ValueError] = {}
        for group in groups.values():
            results |= zip(group, self._try([plans[index] for index in group]), strict=True)
        return (results[index] for index in range(len(plans)))

    def _try(self, plans: list[_Plan]) -> list[Encoding | ValueError]:
        try:
            return [*self._batch(plans[0], [plan.text for plan in plans])]
        except ValueError as error:
            return [error] if len(plans) == 1 else [result for plan in plans for result in self._try([plan])]

    def _batch(self, like: _Plan, texts: list[str]) -> list[Encoding]:
        if like.private is None:
            return self._tokenizer.encode_with_offsets(texts, add_special_tokens=not like.is_chat)
        return encode_batch(like.private.tokenizer, texts, add_special_tokens=not like.is_chat)

    def draft(self, plan: _Plan, encoding: Encoding | ValueError) -> Draft | RowError:
        if isinstance(encoding, ValueError):
            return RowError(plan.where, "template or tokenizer", encoding)
        ids, two_begins = self._one_begin(encoding.ids)
        if two_begins and plan.is_chat:
            return RowError(
                plan.where,
                "begin token twice",
                f"the chat begins with {self._tokenizer.bos_token!r} twice; take one of them out of the chat template",
            )
        parted, ranges = None, [(0, len(ids))]
        if plan.prompt is not None:
            start, parted = self._completion_start(plan, encoding, ids)
            ranges = [(start, len(ids))]
        elif plan.spans is not None:
            ranges = _token_ranges(plan.spans, encoding.offsets)
        ends = [self._end(plan, encoding, ids, *found) for found in ranges]
        for index, (start, stop) in enumerate(ranges):
            # The template may leave the end of the turn to whoever speaks next.
            if ends[index] is None and stop < len(ids) and ids[stop] in self._ending:
                ranges[index], ends[index] = (start, stop + 1), stop
        return Draft(plan.where, ids, ranges, ends, plan.controls, parted, two_begins)

    def _one_begin(self, ids: list[int]) -> tuple[list[int], bool]:
        """Without the second of two begin tokens: a text that begins with it, and a tokenizer that adds it."""
        begin = self._tokenizer.bos_id
        twice = begin is not None and ids[:2] == [begin, begin]
        return (ids[1:] if twice else ids), twice

    def _completion_start(self, plan: _Plan, encoding: Encoding, ids: list[int]) -> tuple[int, tuple[str, str] | None]:
        """How many ids the prompt alone and the whole have in common, and where they part before the prompt's end.

        Control tokens are hard borders for the tokenizer: only what follows the last one in the prompt, mostly the
        same few words in every row, has to be encoded again.
        """
        prompt = plan.prompt or ""
        border, char = self._border(plan, encoding, ids)
        alone = self._prompt_ids(plan, prompt[char:])
        if border and alone[:1] != ids[border : border + 1]:  # the border is inside the last word of the prompt
            border, alone = 0, self._prompt_ids(plan, prompt)
        together = ids[border : border + len(alone)]
        shared = common(alone, together)
        if shared == len(alone):
            return border + shared, None
        decode = self._tokenizer.decode
        return border + shared, (decode(alone[shared : shared + 1]), decode(together[shared : shared + 1]))

    def _border(self, plan: _Plan, encoding: Encoding, ids: list[int]) -> tuple[int, int]:
        """The last control token within the prompt: its place in `ids`, and in the text. (0, 0) if there is none."""
        if not (plan.is_chat and plan.prompt and plan.text.startswith(plan.prompt)):
            return 0, 0
        last = encoding.char_to_token(len(plan.prompt) - 1)
        splits = self._tokenizer.controls.splits
        border = next((index for index in range(last or 0, 0, -1) if ids[index] in splits), 0)
        chars = encoding.token_to_chars(border) if border else None
        return (border, chars[0]) if chars else (0, 0)

    def _prompt_ids(self, plan: _Plan, text: str) -> list[int]:
        key = (plan.private is None, text)
        if key not in self._prompts:
            ids, _ = self._one_begin(self._batch(plan, [text])[0].ids)
            if len(text) > REMEMBERED or not plan.is_chat or plan.private is not None:
                return ids
            self._prompts[key] = ids
        return self._prompts[key]

    def _end(self, plan: _Plan, encoding: Encoding, ids: list[int], start: int, stop: int) -> int | None:
        """The place of the control token that ends a range, spaces behind it left aside."""
        for index in range(stop - 1, start - 1, -1):
            if ids[index] in self._ending:
                return index
            chars = encoding.token_to_chars(index) if plan.is_chat else None
            if chars is None or plan.text[slice(*chars)].strip():
                return None
        return None


def _token_ranges(spans: list[Span], offsets: list[Span]) -> list[Span]:
    """The tokens that cover any character of each span; spans without one are left out."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    ranges = [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in spans]
    return [(start, stop) for start, stop in ranges if start < stop]
