"""Chat templates: how a list of messages becomes the one text that the model reads.

A template is a Jinja program that ships with the checkpoint. For ChatML it writes

    <|im_start|>user\\n{content}<|im_end|>\\n<|im_start|>assistant\\n{content}<|im_end|>\\n

and with `add_generation_prompt` it stops after the header of the assistant's turn, where the model goes on. A template
is a program from the internet, so it runs in Jinja's sandbox, without access to Python's attributes or files.

The environment offers what templates are written against (transformers `chat_template_utils.py`): blocks are trimmed,
`raise_exception`, `strftime_now`, `generation` blocks, and a `tojson` that does not escape for HTML.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]


def render(template: str, messages: Sequence[Message], add_generation_prompt: bool, **variables: Any) -> str:
    """Render messages ({"role": ..., "content": ...}) as text.

    Raises:
        ValueError: the template is broken, or refuses these messages.
    """
    try:
        return _compile(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **variables,
        )
    except Exception as error:  # a template is a program: it can fail in any way
        raise ValueError(f"the chat template refuses these messages: {error}") from None


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words in some templates; here it writes them."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        return caller()


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from None


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
