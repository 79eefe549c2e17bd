"""Chat templates: how a list of messages becomes the one text that the model reads.

A template is a Jinja program that ships with the checkpoint. For ChatML it writes

    <|im_start|>user\\n{content}<|im_end|>\\n<|im_start|>assistant\\n{content}<|im_end|>\\n

and with `add_generation_prompt` it stops after the header of the assistant's turn, where the model goes on. A template
is a program from the internet, so it runs in Jinja's sandbox, without access to Python's attributes or files.

The environment offers what templates are written against (transformers `chat_template_utils.py`): blocks are trimmed,
`raise_exception`, `strftime_now`, and a `tojson` that does not escape for HTML.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
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
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from None


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
