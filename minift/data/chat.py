"""Chat templates: how a list of messages becomes the one text that the model reads.

A template is a Jinja program that ships with the checkpoint. For ChatML it writes

    <|im_start|>user\\n{content}<|im_end|>\\n<|im_start|>assistant\\n{content}<|im_end|>\\n

and with `add_generation_prompt` it stops after the header of the assistant's turn, where the model goes on. Templates
that know about training put what the assistant says between {% generation %} and {% endgeneration %}, which writes
nothing; `render_marked` says where in the text those blocks lie, and so what is to be learned:

    <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n|Hi!<|im_end|>|\\n
                                                              ^ start       ^ end

A template is a program from the internet, so it runs in a sandbox (sandbox.py): no attributes, no files, no end of
time. The environment offers what templates are written against (transformers 5.23, `chat_template_utils.py`): blocks
are trimmed, `raise_exception`, `strftime_now`, `break` and `continue`, a `tojson` that does not escape for HTML, and
reasoning under all three names that it goes by. The template sees plain copies: text, numbers, lists and dicts.

Left out: functions as tools, whose JSON schema transformers reads out of their docstring; pass the schema itself.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import numpy as np
from jinja2 import pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser

from minift.data.metering import TemplateStopped
from minift.data.sandbox import MeteredContext, MeteredEnvironment

Message = dict[str, Any]
Span = tuple[int, int]
REASONING = ("reasoning_content", "thinking", "reasoning")  # the first is the one that newer templates read


def render(
    template: str,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Any = None,
    documents: Any = None,
    **variables: Any,
) -> str:
    """Render messages as text.

    Args:
        template: Jinja source.
        messages: {"role": ..., "content": ...}; the content is a text, or the list of parts that a template expects.
        add_generation_prompt: end with the header of the assistant's turn.
        tools: JSON schemas (a list of dicts) of functions that the model may call; a template may ignore them.
        documents: list of {"title": ..., "text": ...}, for templates that quote from documents.
        variables: what else the template reads, such as bos_token or enable_thinking.

    Raises:
        ValueError: the template is broken, refuses these messages, or does more than a template may (sandbox.py).
    """
    return render_marked(template, messages, add_generation_prompt, tools, documents, **variables)[0]


def render_marked(
    template: str,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Any = None,
    documents: Any = None,
    **variables: Any,
) -> tuple[str, list[Span]]:
    """Render messages, and say what lies in {% generation %} blocks: characters `start` to `end`, the end excluded.

    As in transformers, a block starts after what has been written when it ends: inside a macro, whose text is written
    as a whole afterwards, its place is where the macro began.

    Raises:
        ValueError: as `render`.
    """
    given: dict[str, Any] = {name: plain(value) for name, value in variables.items()}
    given["messages"] = [_with_reasoning(plain(message)) for message in messages]
    given["tools"] = _dicts(tools, "tools")
    given["documents"] = _dicts(documents, "documents")
    given["add_generation_prompt"] = add_generation_prompt
    compiled = compile_template(template)
    context: Any = compiled.new_context(given)
    pieces: list[str] = []
    try:
        for piece in compiled.root_render_func(context):
            context.meter.write(piece)
            pieces.append(piece)
    except TemplateStopped as error:
        raise ValueError(f"the chat template was stopped: {error}") from None
    except RecursionError:
        raise ValueError("the chat template was stopped: it calls itself without end") from None
    except Exception as error:  # a template is a program: it can fail in any way
        raise ValueError(f"the chat template refuses these messages: {error}") from None
    return "".join(pieces), context.meter.marks


def plain(value: Any) -> Any:
    """A copy out of None, bool, int, float, str, list, tuple and dict; anything else becomes its type's name.

    Objects have methods that a sandbox does not know: an image can write a file. Templates only ask whether there is
    an image.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):  # subclasses, such as those of Enum, back to what they are
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(plain(item) for item in value)
    if isinstance(value, np.generic):
        return plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic
        return plain(dump())
    return f"<{type(value).__name__}>"


def _with_reasoning(message: Any) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"messages must be dicts with a role and a content, got {message!r}")
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _dicts(values: Any, name: str) -> Any:
    if values is not None and not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{name} must be a list of dicts (JSON), got {values!r}")
    return plain(values)


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` writes its body, and notes where."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    @pass_context
    def _write(self, context: MeteredContext, caller: Callable[[], str]) -> str:
        text, start = caller(), context.meter.written
        context.meter.marks.append((start, start + len(text)))
        return text


@lru_cache(maxsize=32)
def compile_template(template: str) -> jinja2.Template:
    """The program of a template; kept for the next rendering.

    Raises:
        ValueError: not valid Jinja, or longer than a template may be.
    """
    environment = MeteredEnvironment(
        {"tojson": _tojson}, trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(template)
    except Exception as error:  # nesting without end fails in Python's own compiler
        raise ValueError(f"the chat template is not valid Jinja: {error}") from None


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
