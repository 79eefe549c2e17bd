"""Chat templates: ours rendered against transformers' apply_chat_template, template by template; and the sandbox."""

from typing import Any

import jinja2
import peers
import pytest

from minift.data.chat import render

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


# The classic ways out of a template: through a value's class, a function's globals, a generator's frame, a string's
# format method.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ lipsum.__globals__['os'].popen('true').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "{{ (messages | map('upper')).gi_frame.f_globals['os'] }}",
    "{{ messages | map(attribute='__class__') | map(attribute='__mro__') | list }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ (''|attr('__class__'))|attr('__mro__') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages[0].clear() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_gives_nothing_away(source: str):
    """Either refused, or empty: Jinja prints a forbidden attribute that nobody uses as nothing."""
    messages = [user("a")]
    try:
        text = render(source, messages, False)
    except ValueError as error:
        assert "template refuses" in str(error)
    else:
        assert text in ("", "[]")
    assert messages == [user("a")]


@pytest.mark.parametrize("source", ESCAPES[:6] + ESCAPES[8:9])
def test_python_attributes_are_refused_by_name(source: str):
    with pytest.raises(ValueError, match=r"unsafe|undefined"):
        render(source, [user("a")], False)


def test_content_is_never_run_as_a_template():
    text = "{{ raise_exception('no') }}{% for x in y %}"
    assert render("{{ messages[0].content }}", [user(text)], False) == text
