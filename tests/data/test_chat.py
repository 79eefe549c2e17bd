"""Chat templates: ours rendered against transformers' apply_chat_template, template by template; and the sandbox."""

import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import numpy as np
import peers
import pytest
import trl
from transformers.utils import chat_template_utils

from minift.data import chat
from minift.data.chat import compile_template, plain, render, render_marked

LLAMA3 = (  # header and end tokens, trimmed content, the begin token glued to the first turn
    "{% set loop_messages = messages %}"
    "{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ALTERNATING = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] + '\\n\\n' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system_message if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + eos_token }}
    {%- endif %}
{%- endfor %}
"""
LOOP_CONTROLS = """{%- for message in messages %}
{%- if message.role == 'system' %}{% continue %}{% endif %}
{{ loop.index }}: {{ message | tojson }}
{%- if loop.index == 3 %}{% break %}{% endif %}
{%- endfor %}
{{ messages | tojson(indent=2) }}
{%- if add_generation_prompt %}
assistant:{% endif %}
"""
JSON_OPTIONS = "{{ messages | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}"
# What newer templates use: namespaces, macros, methods of strings, a look back, filters, tests for what is not given.
MODERN = """{%- macro turn(role, content) -%}
{{ '<|im_start|>' ~ role ~ '\\n' ~ content ~ '<|im_end|>' }}
{% endmacro -%}
{%- set ns = namespace(last_user=-1, system=none) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}
    {%- if message.role == 'system' %}{% set ns.system = message.content %}{% endif %}
{%- endfor %}
{%- if tools %}{{ raise_exception('no tools here') }}{% endif %}
{%- if enable_thinking is defined and enable_thinking is false %}<no think>{% endif %}
{{- ns.system if ns.system is not none else 'default' }}
{% for message in messages if message.role != 'system' %}
    {%- if message.role == 'assistant' and loop.index0 < ns.last_user %}
        {{- turn(message.role, message.content.split('</think>')[-1].lstrip('\\n')) }}
    {%- else %}
        {{- turn(message.role, message.content) }}
    {%- endif %}
{% endfor %}
{{- messages | map(attribute='role') | join(',') | upper }}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""
WHITESPACE = """   {% for message in messages %}
    {{ message['role'] }}
      {%- if true %}  kept  {% endif +%}
  {% if loop.last %}
end
  {% endif %}
{% endfor %}

"""
DICTIONARIES = "{% set d = dict(role='x', n=1) %}{{ d.items() | list }}{{ dict(messages[0]) | tojson }}"
TEMPLATES = {
    "chatml": peers.CHATML,
    "generation": peers.CHATML_GENERATION,
    "generation-scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "llama3": LLAMA3,
    "alternating": ALTERNATING,
    "loopcontrols": LOOP_CONTROLS,
    "json-options": JSON_OPTIONS,
    "modern": MODERN,
    "whitespace": WHITESPACE,
    "dictionaries": DICTIONARIES,
    "year": "{{ strftime_now('%% %%') }}{{ bos_token }}",
    "nothing-defined": "{{ undefined_name }}{{ tools is none }}{{ documents is none }}{{ unk_token }}{{ pad_token }}",
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


CONVERSATIONS = {
    "one": [user("Hello")],
    "pair": [user(" Hello \n"), assistant("\n Hi <b>&amp;\"'{{ x }}</b> {% if %}")],
    "system": [system("Be brief."), user("a"), assistant("b")],
    "long": [user("1"), assistant("<think>\nx\n</think>\n\n2"), user("3"), assistant("<think>y</think>4"), user("5")],
    "unicode": [user("Grüße 世界 👩‍👩‍👧 \u2028"), assistant("e\u0301\u0000\t")],
    "empty": [user(""), assistant("")],
}


@pytest.fixture(scope="module")
def peer():
    return peers.tiny_tokenizer()


def special(peer: Any) -> dict[str, str]:
    return {key: getattr(peer, key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}


@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_text_equals_transformers(peer: Any, template: str, conversation: str, prompt: bool):
    source, messages = TEMPLATES[template], CONVERSATIONS[conversation]
    theirs = peer.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=prompt)
    ours = render(source, messages, prompt, **special(peer))
    assert ours == theirs


def test_rendering_leaves_the_messages_alone():
    messages = [user("a"), assistant("b")]
    before = [dict(message) for message in messages]
    render(MODERN, messages, True)
    assert messages == before


@pytest.mark.parametrize("messages", [[assistant("a")], [user("a"), user("b")], [system("s"), assistant("a")]])
def test_raise_exception_becomes_a_value_error_with_the_templates_words(peer: Any, messages: list[dict[str, Any]]):
    with pytest.raises(jinja2.TemplateError) as theirs:
        peer.apply_chat_template(messages, chat_template=ALTERNATING, tokenize=False)
    with pytest.raises(ValueError, match="refuses these messages: ") as ours:
        render(ALTERNATING, messages, False, **special(peer))
    assert str(theirs.value) in str(ours.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in messages %}",
        "{{ messages",
        "{% nonsense %}",
        "{{ messages | no_such_filter }}",
        "{% endif %}",
    ],
)
def test_a_broken_template_is_a_value_error(source: str):
    with pytest.raises(ValueError, match="not valid Jinja"):
        render(source, [user("a")], False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 // 0 }}",
        "{{ undefined_name.attribute }}",
        "{{ messages[99]['role'] }}",
        "{{ messages | tojson(nonsense=1) }}",
        "{{ range(100001) | list }}",  # the sandbox allows 100,000
        "{% include 'other' %}",
    ],
)
def test_a_template_that_fails_while_rendering_is_a_value_error(source: str):
    """`render` promises ValueError, so that a command line can print it as one line of bad input."""
    with pytest.raises(ValueError, match="template"):
        render(source, [user("a")], False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ messages.append(1) }}",
    ],
)
def test_python_attributes_are_refused_by_name(source: str):
    """All the ways out are in test_sandbox.py."""
    with pytest.raises(ValueError, match=r"unsafe|undefined"):
        render(source, [user("a")], False)


def test_content_is_never_run_as_a_template():
    text = "{{ raise_exception('no') }}{% for x in y %}"
    assert render("{{ messages[0].content }}", [user(text)], False) == text


# --- the templates that TRL ships: long programs of many authors -----------------------------------------------------

SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <two> numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number", "description": "one"}, "b": {"type": ["number", "null"]}},
            "required": ["a"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
CHATS = {
    **CONVERSATIONS,
    "reasoning": [user("a"), assistant("b") | {"reasoning": "because"}, user("c"), assistant("d") | {"thinking": "so"}],
    "tools": [
        user("1 + 1?"),
        assistant("") | {"tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "2"},
        assistant("2"),
    ],
    "parts": [
        user("") | {"content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]},
        assistant("") | {"content": [{"type": "text", "text": "A cat."}]},
    ],
}


def outcome(call: Callable[[], Any]) -> Any:
    """What a rendering gives; None if it refuses."""
    try:
        return call()
    except Exception:
        return None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_templates_equal_transformers(path: Path):
    """Text and marks, with and without tools and prompt; what transformers' rendering refuses, ours refuses."""
    source, rendered = path.read_text(encoding="utf-8"), 0
    special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    choices: list[Any] = [None, [TOOL]]
    for messages in CHATS.values():
        for tools in choices:
            for prompt in (False, True):

                def theirs() -> Any:
                    texts, spans = chat_template_utils.render_jinja_template(
                        [messages],  # noqa: B023 (called at once)
                        tools=tools,  # noqa: B023
                        chat_template=source,
                        return_assistant_tokens_mask=True,
                        add_generation_prompt=prompt,  # noqa: B023
                        **special,
                    )
                    return texts[0], [tuple(span) for span in spans[0]]

                expected = outcome(theirs)
                assert outcome(lambda: render_marked(source, messages, prompt, tools, **special)) == expected  # noqa: B023
                rendered += expected is not None
    assert rendered >= 4


# --- marks -----------------------------------------------------------------------------------------------------------


def test_marks_are_the_assistants_words():
    text, spans = render_marked(peers.CHATML_GENERATION, CONVERSATIONS["long"])
    answers = [message["content"] for message in CONVERSATIONS["long"] if message["role"] == "assistant"]
    assert [text[start:end] for start, end in spans] == [f"{answer}<|im_end|>" for answer in answers]


def test_a_template_without_blocks_has_no_marks():
    assert render_marked("{{ messages[0].content }}", [user("a")]) == ("a", [])


@pytest.mark.parametrize(
    "source",
    [
        "ab{% generation %}{% endgeneration %}c",
        "a{% generation %}b{% generation %}c{% endgeneration %}d{% endgeneration %}e",
        "a{% set x %}b{% generation %}c{% endgeneration %}{% endset %}d{{ x }}",
        "a{% macro m() %}b{% generation %}c{% endgeneration %}{% endmacro %}{{ m() }}d{{ m() }}",
        "{% for m in messages %}{{ m.role }}{% generation -%}  {{ m.content }}  {%- endgeneration %}\n{% endfor %}",
        "a{% block b scoped %}b{% generation %}c{% endgeneration %}{% endblock %}{{ self.b() }}",
    ],
)
def test_marks_in_odd_places_are_transformers(source: str):
    texts, spans = chat_template_utils.render_jinja_template(
        [CONVERSATIONS["pair"]], chat_template=source, return_assistant_tokens_mask=True
    )
    assert spans[0]
    assert render_marked(source, CONVERSATIONS["pair"]) == (texts[0], [tuple(span) for span in spans[0]])


def test_one_rendering_does_not_see_the_marks_of_another():
    """Renderings of one compiled template in several threads, each slow enough to meet the others."""
    source = "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    lengths = list(range(1, 9))
    chats = [[assistant("x" * length)] * 300 for length in lengths]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda chat: render_marked(source, chat), chats))
    for length, (text, spans) in zip(lengths, results, strict=True):
        assert text == ("assistant" + "x" * length) * 300
        assert spans == [(9 + i * (9 + length), (i + 1) * (9 + length)) for i in range(300)]


# --- what is passed in -----------------------------------------------------------------------------------------------


def test_the_clock_can_be_stopped(monkeypatch: pytest.MonkeyPatch):
    class Day(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2026, 2, 3, 4, 5)

    monkeypatch.setattr(chat, "datetime", Day)
    assert render("{{ strftime_now('%Y-%m-%d %H:%M') }}", [], False) == "2026-02-03 04:05"


def test_tools_and_documents_reach_the_template():
    source = "{{ tools | tojson }}{{ documents[0].title }}{{ tools is none }}"
    text = render(source, [], False, tools=[TOOL], documents=[{"title": "T"}])
    assert text == json.dumps([TOOL], ensure_ascii=False) + "TFalse"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": [len]}, "tools must be a list of dicts"),
        ({"tools": "add"}, "tools must be a list of dicts"),
        ({"documents": ["text"]}, "documents must be a list of dicts"),
    ],
)
def test_other_tools_and_documents_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        render("", [], False, **arguments)


@pytest.mark.parametrize("messages", [["text"], [None], [[user("a")]]])
def test_messages_that_are_no_dicts_are_refused(messages: Any):
    with pytest.raises(ValueError, match="messages must be dicts with a role and a content"):
        render("", messages, False)


class Color(StrEnum):
    RED = "red"


@dataclass
class Image:
    path: str
    size: tuple[int, int]


class Model:
    def model_dump(self) -> dict[str, Any]:
        return {"role": "user", "content": Image}


class Writer:
    def save(self, path: str) -> str:
        raise AssertionError(f"the template wrote {path}")


VALUES = [
    None, True, 1, 1.5, "a", [1, (2,)], {1: {"a": None}}, Color.RED, np.float32(0.5), np.int64(3), np.bool_(False),
    np.float64(0.5), np.str_("x"), Image("a.png", (1, 2)), Model(), Writer(), np.zeros(3), len, {"a"}, b"a",
    OrderedDict(b=1, a=2), MappingProxyType({"a": [Color.RED]}),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_values_equal_transformers(value: Any):
    ours, theirs = plain(value), chat_template_utils._plain_template_data(value)
    assert ours == theirs and type(ours) is type(theirs)


def test_methods_of_objects_are_out_of_reach():
    for place in ([user("a") | {"image": Writer()}], [user("a") | {"content": [{"image": [Writer()]}]}]):
        text = render("{{ messages | string }}{{ it }}{{ it.save is defined }}", place, False, it=Writer())
        assert "'<Writer>'" in text and text.endswith("<Writer>False")


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_found_under_each_of_its_names(field: str):
    message = assistant("b") | {field: "because"}
    source = "{{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
    assert render(source, [message], False) == "because because"
    assert message == assistant("b") | {field: "because"}


def test_a_template_is_compiled_once():
    source = "{{ messages[0].content }}"
    assert compile_template(source) is compile_template("".join(source))
