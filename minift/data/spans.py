"""Where in a rendered conversation the assistant speaks, in characters.

A template is a program, so the only way to know what it writes for a turn is to let it write. The conversation is
rendered as far as the turn, and the result must be how the whole begins:

    whole     <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n<|im_start|>user\\n ...
    1 message, with the prompt for generation:             ------------->|
    2 messages:                                            ----------------------------------->|
                                             trained:                    Hello<|im_end|>\\n

Three kinds of templates need care. Some write a last word at the end of the whole (Phi-3's <|endoftext|>): it may
differ from what follows in the middle of a longer conversation. Some open the answer for generation with more than a
finished conversation has there (<think></think>): the answer then begins where the two part. And some rewrite earlier
turns when more follow (what the model thought is dropped): then no prefix says where a turn is, and it is refused,
unless the template marks the assistant's words itself, with {% generation %}.
"""

from collections.abc import Sequence
from itertools import count

from minift.data.chat import Message, Span, render_marked
from minift.data.formats import Row
from minift.data.tokenizer import Tokenizer

RESERVED = {"template", "messages", "add_generation_prompt"}


class Script:
    """A row's conversation, rendered as far as asked for.

    Attributes:
        controls: control tokens that the row's text spells.
        private: what keeps them apart from the template's (controls.py), None if there is nothing to keep apart.
        spelled: finds the control tokens in what is written.
    """

    def __init__(self, tokenizer: Tokenizer, row: Row, messages: Sequence[Message], special_in_text: bool):
        self._template = tokenizer.template or ""
        self._messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        self._special = tokenizer.special
        self._given = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
        if wrong := RESERVED & self._given.keys():
            raise ValueError(f"chat_template_kwargs may not set {', '.join(sorted(wrong))}")
        told = [[{**message, "role": ""} for message in self._messages], self._given]  # roles come from a fixed list
        self.controls = tokenizer.controls.spelled_in(told)
        self.private = tokenizer.controls.private(told) if self.controls and not special_in_text else None
        self.spelled = tokenizer.controls.spelled if self.private is None else self.private.spelled
        self._written: dict[tuple[int, bool], tuple[str, list[Span]]] = {}

    def write(self, turns: int, for_generation: bool) -> str:
        """The first messages as text, in which the template's control tokens are told from the row's."""
        return self._write(turns, for_generation)[0]

    def marks(self) -> list[Span]:
        """What the template itself marks as the assistant's, in the whole conversation."""
        return self._write(len(self._messages), False)[1]

    def render(self, messages: Sequence[Message], for_generation: bool = False) -> tuple[str, list[Span]]:
        return render_marked(self._template, messages, for_generation, **{**self._special, **self._given})

    def _write(self, turns: int, for_generation: bool) -> tuple[str, list[Span]]:
        asked = (turns, for_generation)
        if asked not in self._written:
            write = self.render if self.private is None else self._write_apart
            self._written[asked] = write(self._messages[:turns], for_generation)
        return self._written[asked]

    def _write_apart(self, messages: Sequence[Message], for_generation: bool) -> tuple[str, list[Span]]:
        assert self.private is not None
        hide = self.private.hide
        hidden = [{**hide(message), "role": message["role"]} for message in messages]
        variables = {**self._special, **hide(self._given)}
        text, marks = render_marked(self._template, hidden, for_generation, **variables)
        text = self.private.claim(text)
        if self.private.publish(text) != self.render(messages, for_generation)[0]:
            raise ValueError(
                f"the chat template changes control tokens that stand in a message ({', '.join(set(self.controls))}), "
                "so they cannot be kept apart from its own; pass special_in_text=True"
            )
        return text, marks


def answer_start(script: Script, turn: int, text: str) -> int:
    """Where message number `turn` begins in `text`, behind the header that the prompt for generation writes.

    Args:
        text: the whole conversation, as `script` writes it.

    Raises:
        ValueError: the template writes the messages before it differently when more follow.
    """
    prompt = script.write(turn, True)
    if text.startswith(prompt):
        return len(prompt)
    turn_end(script, turn, text)
    return common(prompt, text)


def turn_end(script: Script, turns: int, text: str) -> int:
    """Where the first `turns` messages end in `text`. Raises ValueError as `answer_start`."""
    part = script.write(turns, False) if turns else ""
    if text.startswith(part):
        return len(part)
    shared = common(part, text)
    for found in script.spelled.finditer(part):  # the last word and what stands in its place may begin alike: <|e, <|u
        if found.start() < shared < found.end():
            shared = found.start()
    if not text.endswith(part[shared:]):
        raise ValueError(
            f"the chat template writes the first {turns} messages differently when more follow, "
            "so it cannot be told where the answer begins; use loss_on='all' or another template"
        )
    return shared


def assistant_spans(script: Script, messages: Sequence[Message], text: str, header: bool) -> list[Span]:
    """(start, end) of every assistant turn in `text`, with or without the header that names the speaker."""
    start = turn_end if header else answer_start
    return [
        (start(script, turn, text), turn_end(script, turn + 1, text))
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def common(first: Sequence[object], second: Sequence[object]) -> int:
    """Length of the common beginning of two texts or lists."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def is_empty(message: Message) -> bool:
    """Whether it says nothing: no text, no call of a tool, no reasoning."""
    values = (value for key, value in message.items() if key not in ("role", "name"))
    return not any(value.strip() if isinstance(value, str) else value for value in values)


def check_is_written(script: Script, messages: Sequence[Message], turn: int, text: str) -> None:
    """Raise ValueError if the template leaves out what message number `turn` says.

    Its words may be changed on the way (trimmed, escaped). So if they are not in the text, digits that are nowhere in
    it are sent in their place.
    """
    words = messages[turn]["content"].strip()
    if not words or words in text:
        return
    probe = next(word for number in count(10**6) if (word := str(number)) not in text)
    sent = [message | {"content": probe} if index == turn else message for index, message in enumerate(messages)]
    if probe not in script.render(sent)[0]:
        raise ValueError(
            f"the chat template leaves out what the {messages[turn]['role']} says in message {turn + 1}, so there is "
            "nothing to learn; use the template that belongs to this checkpoint"
        )
