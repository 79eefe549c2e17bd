"""Templates that try to get out, or never to come back. What they are stopped by is measured on the clock."""

import threading
import time
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minift.data import metering
from minift.data.chat import render
from minift.data.metering import INTEGER_BITS, ITEM, OUTPUT_LIMIT, TemplateStopped, size

MESSAGES = [{"role": "user", "content": "a"}]
# A stopped template may overrun by the one step that it is in, which is bounded by WORK_LIMIT: some 4 million items to
# walk, or 200 million characters to copy. Here it is a tenth; the time is this process's own, whatever else runs.
TIME_LIMIT, WORK_LIMIT, OVERRUN = 0.3, 20_000_000, 3.0


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "TIME_LIMIT", TIME_LIMIT)
    monkeypatch.setattr(metering, "WORK_LIMIT", WORK_LIMIT)


def stopped(source: str, reason: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=f"the chat template .*{reason}"):
        render(source, MESSAGES, False)
    assert time.process_time() - start < TIME_LIMIT + OVERRUN


ROUNDS = "{% for i in range(100000) %}"
NESTED = f"{ROUNDS}{ROUNDS}{{% endfor %}}{{% endfor %}}"
SECONDS = "runs for more than 0.3 seconds"
WORK = "handles more than 20,000,000 characters and items"
EITHER = f"({WORK}|{SECONDS})"
RECURSION = "calls itself without end"


# --- loops and recursion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        (NESTED, SECONDS),
        ("{% set r = range(30000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}", SECONDS),  # no calls
        (f"{{% macro m() %}}{NESTED}{{% endmacro %}}{{{{ m() }}}}", SECONDS),
        (f"{{% set x %}}{NESTED}{{% endset %}}", SECONDS),
        (f"{{% generation %}}{NESTED}{{% endgeneration %}}", SECONDS),
        (f"{ROUNDS}{{% for j in range(100000) if false %}}{{% endfor %}}{{% endfor %}}", SECONDS),
        (f"{ROUNDS}{{% set x = range(100000) | map('upper') | select('eq', 'a') | list %}}{{% endfor %}}", SECONDS),
        ("{{ [-10 ** 15] | map('a step') | list }}" + NESTED, WORK),  # nothing can be paid back
        ("{{ [1] | tojson(indent=-10 ** 9) }}" + NESTED, WORK),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", RECURSION),
        ("{% block a %}{{ self.a() }}{% endblock %}", RECURSION),
        ("{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}", RECURSION),
        ("{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}", SECONDS),
        ("{% block a scoped %}" + NESTED + "{% endblock %}", SECONDS),
    ],
)  # fmt: skip
def test_loops_end(source: str, reason: str):
    stopped(source, reason)


def test_the_limit_holds_in_threads():
    """No signals: those reach the main thread only."""
    errors: list[str] = []

    def work() -> None:
        try:
            render(NESTED, MESSAGES, False)
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(errors) == 3 and all(SECONDS in error for error in errors)


def test_waiting_for_the_machine_does_not_count():
    """The limit is on the thread's own time: a rendering that is kept waiting is not stopped."""
    meter = metering.Meter()
    time.sleep(2 * TIME_LIMIT)
    for _ in range(100):
        meter.charge(1)


# --- text and memory -------------------------------------------------------------------------------------------------

BIG = "('a' * 10 ** 6)"
GROW = "{{% set ns = namespace(t={0}) %}}{{% for i in range(100) %}}{{% set ns.t = {1} %}}{{% endfor %}}{{{{ {2} }}}}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (f"{ROUNDS}{'x' * 1000}{{% endfor %}}", "writes more than 10,000,000 characters"),
        (f"{ROUNDS}{{{{ 'x' * 1000 }}}}{{% endfor %}}", EITHER),
        (f"{{% macro m() %}}{ROUNDS}{'x' * 10000}{{% endfor %}}{{% endmacro %}}{{% set y = m() %}}", WORK),
        (f"{{% set y %}}{ROUNDS}{'x' * 10000}{{% endfor %}}{{% endset %}}", WORK),
        (f"{{% filter upper %}}{ROUNDS}{'x' * 10000}{{% endfor %}}{{% endfilter %}}", WORK),
        ("{{ 'a' * 10 ** 10 }}", WORK),
        ("{{ 10 ** 10 * [1] }}", WORK),
        (GROW.format("'a'", "ns.t ~ ns.t", "1"), WORK),
        (GROW.format("'a'", "ns.t + ns.t", "1"), WORK),
        (GROW.format("'a'", "[ns.t, ns.t] | join", "1"), WORK),
        (GROW.format("[1]", "ns.t + ns.t", "1"), EITHER),
        (GROW.format("[1]", "[ns.t, ns.t]", "ns.t"), WORK),
        (GROW.format("[1]", "{'a': ns.t, 'b': ns.t}", "ns.t | tojson"), WORK),
        (GROW.format("(1,)", "(ns.t, ns.t)", "{ns.t: 1}"), WORK),  # hashing walks the whole tree
        (GROW.format("[1]", "[ns.t]", "ns.t") * 2, "nests values more than 100 deep"),
        (GROW.format("[]", f"ns.t + [{BIG}[1:]]", "1"), WORK),  # slices that are kept
        ("{{ '%9999999999d' % 1 }}", WORK),
        ("{{ '%.9999999999f' | format(1) }}", WORK),
        ("{{ '%*d' % (10 ** 10, 1) }}", "width of a format from an argument"),
        ("{{ '{:>9999999999}'.format(1) }}", WORK),
        ("{{ '{a:>9999999999}'.format_map({'a': 1}) }}", WORK),
        ("{{ '{:{}}'.format(1, 10 ** 10) }}", "width of a format from an argument"),
        ("{{ 'a' | center(10 ** 10) }}", WORK),
        ("{{ 'a'.ljust(10 ** 10) }}", WORK),
        ("{{ 'a'.zfill(10 ** 10) }}", WORK),
        ("{{ '\n' | indent(10 ** 10) }}", WORK),
        ("{{ [1, [2]] | tojson(indent=10 ** 10) }}", WORK),
        ("{{ [1] | batch(10 ** 10, 0) | list }}", WORK),
        ("{{ [1] | slice(10 ** 10) | list }}", WORK),
        ("{{ [1] | batch(linecount=10 ** 10, fill_with=0) | list }}", WORK),
        ("{{ [1] | slice(slices=10 ** 10) | list }}", WORK),
        ("{{ 'a' | center(width=10 ** 10) }}", WORK),
        ("{{ '\n' | indent(width=10 ** 10) }}", WORK),
        ("{{ '\n' | indent(width='x' * 10 ** 5) }}" * 200, WORK),
        ("{{ 1.5 | round(method='ceil', precision=10 ** 9) }}", WORK),
        ("{{ ('a' * 10 ** 6) | replace(new='b' * 10 ** 6, old='a') }}", WORK),
        ("{{ (['a' * 10 ** 6] * 10 ** 5) | join(d='x') }}", WORK),
        (f"{{{{ {BIG} | trim(chars='b' * 10 ** 6) }}}}", WORK),
        ("{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}", WORK),
        ("{{ ('a' * 10 ** 6) | replace('', 'b' * 10 ** 6) }}", WORK),
        ("{{ ''.join(['a' * 10 ** 6] * 10 ** 5) }}", WORK),
        ("{{ range(100000) | map('replace', '1', 'b' * 10 ** 5) | join }}", WORK),
        ("{{ dict.fromkeys(range(100000), 'a' * 10 ** 6) }}", WORK),
        (f"{{{{ ([{BIG}] * 10 ** 5) | sort }}}}", WORK),
        ("{% set n = namespace(b='a' * 10 ** 6) %}{{ [n, n] | map(attribute='b') | map('upper') | join }}" * 9, WORK),
        ("{{ 1.5 | round(10 ** 9, 'ceil') }}", WORK),
        (f"{{{{ {BIG}.strip('b' * 10 ** 6) }}}}", WORK),
        (f"{{{{ {BIG} | trim('b' * 10 ** 6) }}}}", WORK),
        ("{{ ([[1] * 10] * 10) | sum(start=[]) }}", "sums what are not numbers"),
        ("{{ 9 ** (9 ** 9) }}", "number of thousands of digits"),
        (GROW.format("9", "ns.t * ns.t", "1"), "number of thousands of digits"),
        ("{{ 0x" + "f" * 900_000 + " // 3 }}", "4300 digits"),
        ("{{ '\t'.expandtabs(10 ** 10) }}", "unsafe"),
        ("{{ 'a'.translate({97: 'b' * 10}) }}", "unsafe"),
        ("{{ 'a'.encode() }}", "unsafe"),
        ("{{ (1).to_bytes(10 ** 10, 'big') }}", "unsafe"),
        ("{{ lipsum(10 ** 9) }}", "undefined"),
        ("{{ ('<' * 10 ** 6) | striptags }}", "No filter named"),
        (" " * 1_000_001, "more than 1,000,000 characters itself"),
        ("{{ " + "(" * 100_000 + ")" * 100_000 + " }}", "recursion"),
        ("{{ " + "not " * 100_000 + "1 }}", "recursion"),
    ],
)  # fmt: skip
def test_memory_is_bounded(source: str, reason: str):
    stopped(source, reason)


def test_a_namespace_that_holds_itself_is_written_in_one_word():
    source = "{% set ns = namespace(a=1) %}{% set ns.b = ns %}{% set ns.c = [ns, ns] %}{{ ns }}{{ ns.c | length }}"
    assert render(source, MESSAGES, False) == "<namespace>2"


def test_output_up_to_the_limit_is_written():
    source = "{% for i in range(100000) %}{{ x }}{% endfor %}"
    text = render(source, MESSAGES, False, x="x" * (OUTPUT_LIMIT // 100_000))
    assert len(text) == OUTPUT_LIMIT


def test_a_long_conversation_is_no_attack(monkeypatch: pytest.MonkeyPatch):
    """5000 turns of 1000 characters, handled as real templates do: slices, trims, gluing, looks back."""
    monkeypatch.undo()
    source = (
        "{% set ns = namespace(last=0) %}{% for m in messages[::-1] %}{% set ns.last = loop.index0 %}{% endfor %}"
        "{% set turns = messages[1:] %}{{ turns | selectattr('role', 'eq', 'user') | list | length }}"
        "{% for m in turns %}{{ '<' + m.role + '>' + m.content | trim + '</' ~ m.role ~ '>\n' }}{% endfor %}"
    )
    messages = [{"role": "user", "content": f" {'x' * 1000} "}] * 5001
    assert render(source, messages, False) == "5000" + f"<user>{'x' * 1000}</user>\n" * 5000


# --- getting out -----------------------------------------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ lipsum.__globals__['os'].popen('true').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "{{ (messages | map('upper')).gi_frame.f_globals['os'] }}",
    "{{ messages | map(attribute='__class__') | map(attribute='__mro__') | list }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ (''|attr('__class__'))|attr('__mro__') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages[0].clear() }}",
    "{{ messages.__class__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(a=1).__class__.__mro__ }}",
    "{{ dict.__class__ }}",
    "{{ dict.mro() }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ range.__self__ }}",
    "{{ ''.join.__self__.__class__.__base__ }}",
    "{{ ''.format.__wrapped__.__self__.__class__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "{{ ('{0.__class__}' | attr('format'))(messages) }}",
    "{{ ['{0.__class__}'.format] | map('a step') | list }}",
    "{{ [messages] | map(attribute='__class__') | list }}",
    "{{ [messages] | map('attr', '__class__') | map('string') | join }}",
    "{{ [messages] | sort(attribute='__class__.__mro__') }}",
    "{{ messages | groupby('__class__') | list }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{{ loop.__class__ }}{% for x in messages %}{{ loop._iterable.__class__ }}{% endfor %}",
    "{{ (x for x in messages) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ context.environment }}{{ environment }}",
    "{{ messages | attr('append') }}",
    "{{ messages.pop() }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{% set messages[0].role = 'system' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_of_python_is_reached(source: str):
    messages = [dict(MESSAGES[0])]
    try:
        text = render(source, messages, False)
    except ValueError as error:
        assert "the chat template" in str(error)
    else:  # Jinja writes a forbidden attribute that nobody uses as nothing, or as Undefined in a list
        assert not any(sign in text for sign in ("<class", "<function", "<module", "<built-in", " at 0x", "root:"))
    assert messages == MESSAGES


@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace({'_a': 1}) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ],
)
def test_namespaces_refuse_names_of_python(source: str):
    with pytest.raises(ValueError, match="underscore"):
        render(source, MESSAGES, False)


def test_a_namespace_may_have_an_attribute_called_self():
    assert render("{{ namespace(self=1, args=2).self }}{{ dict(self=3).self }}", MESSAGES, False) == "13"


# --- what honest templates write is what Jinja writes ----------------------------------------------------------------

HONEST = [
    "{{ 'a' ~ 1 ~ none ~ 1.5 ~ [1, 'x'] ~ {'a': (1, 2)} ~ undefined_name }}",
    "{{ 'abc'[1:] }}{{ [1, 2, 3][::-1] }}{{ (1, 2, 3)[:2] }}{{ x[1:2] }}{{ x[0] }}{{ x[-1:] }}",
    "{{ [1, 2] + [3] }}{{ 2 * 'ab' }}{{ 'ab' * 0 }}{{ 'a' * -1 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}",
    "{{ 2 ** -1 }}{{ 7 / 2 }}",
    "{{ '%s-%05.1f|%%' % ('a', 2.5) }}{{ '%s' | format('a') }}{{ '{}:{:>5}{{}}'.format(1, 'a') }}",
    "{{ '{a}'.format_map({'a': 1}) }}",
    "{{ ['b', 'a'] | join(', ') }}{{ range(3) | join }}{{ [{'a': 1}, {'a': 2}] | join('-', attribute='a') }}",
    "{{ ','.join(['a', 'b']) }}{{ ','.join(['b', 'a'] | map('upper')) }}{{ 'a,b'.split(',') }}",
    "{{ 'x' | center(5) }}{{ 'x'.ljust(3) }}{{ 'x'.zfill(3) }}{{ 'a\nb' | indent(2, true) }}",
    "{{ 'a\nb' | indent('> ') }}",
    "{{ 'aXbX'.replace('X', 'yy') }}{{ 'aXbX' | replace('X', 'yy', 1) }}{{ 'ab' | replace('', '-') }}",
    "{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}{{ 2.567 | round(1) }}",
    "{{ [1, 2] | sum(start=3) }}{{ [{'a': 1}, {'a': 2}] | sum(attribute='a') }}{{ [{'a': 1}] | sum('a', 0.5) }}",
    "{{ '  a ' | trim }}{{ 'xax' | trim('x') }}{{ 'xax'.strip('x') }}{{ ' a'.lstrip() }}{{ ' A '.strip().lower() }}",
    "{{ x | sort(reverse=true) }}{{ x | unique | list }}{{ x | first }}{{ x | last }}{{ x | max }}{{ x | length }}",
    "{{ [{'a': 1, 'b': 2}] | groupby('a') | list | length }}{{ {'b': 1, 'a': 2} | dictsort }}",
    "{{ {'a': 1} | items | list }}",
    "{{ [{'a': 1}, {}] | selectattr('a', 'defined') | map(attribute='a') | list }}{{ x | reject('odd') | list }}",
    "{{ none is none }}{{ x is iterable }}{{ 'a' in 'abc' }}{{ 3 is divisibleby 3 }}{{ x is sameas x }}",
    "{{ 1 if x else 2 }}",
    "{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}{% for a in [] %}{% else %}none{% endfor %}",
    "{% for a in x %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}"
    "{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% for a in x if a is odd %}{{ loop.revindex }}{{ a }}{% else %}none{% endfor %}",
    "{% for a in x | map('string') %}{{ a }}{% endfor %}",
    "{% for a in [[1, [2]], 3] recursive %}{{ loop(a) if a is iterable else a }}{{ loop.depth }}{% endfor %}",
    "{% for a in x %}{% if a == 2 %}{% continue %}{% endif %}{{ a }}{% if a == 3 %}{% break %}{% endif %}{% endfor %}",
    "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller(5) }}{% endmacro %}"
    "{% call(y) m(1, 3, 4, z=6) %}[{{ y }}]{% endcall %}",
    "{% set a, b = 1, 2 %}{% set c %}x{{ a }}{% endset %}{{ c | upper }}"
    "{{ b }}{% filter upper %}abc{{ c }}{% endfilter %}",
    "{% with a = 1 %}{{ a }}{% endwith %}",
    "{% block q scoped %}{{ x }}{% endblock %}{{ self.q() }}{% raw %}{{ x }}{% endraw %}",
    "{{ '<b>' | escape }}{{ '<b>' | safe }}{{ ('<b>' | e) ~ '<' }}{{ 'a b' | title | wordcount }}",
    "{{ 'abc' | truncate(5) }}",
    "{{ x | tojson }}{{ 'a' | default('b') }}{{ y | default('b') }}{{ 'A' | lower | capitalize }}{{ '12' | int + 1 }}",
    "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys([1, 2], 0) }}{{ {'a': 1}.get('b', 3) }}{{ {'a': 1}.items() | list }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner('|') %}{{ j() }}"
    "{{ j() }}{{ true }}{{ -3 | abs }}",
]  # fmt: skip


@pytest.mark.parametrize("source", HONEST)
def test_the_meter_changes_no_text(source: str):
    plain = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True)
    if "tojson" in source:
        plain.policies["json.dumps_kwargs"] = {"sort_keys": False}
    expected = plain.from_string(source).render(x=[1, 2, 3, 2])
    assert expected and render(source, [], False, x=[1, 2, 3, 2]) == expected


# --- prices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", 0),
        ("abc", 3),
        ("世界", 2),
        (None, 1),
        (10**9, 1),
        (1.5, 1),
        ([], 1),
        (["ab", "c"], 1 + 2 * ITEM + 3),
        ((("a",),), 1 + ITEM + (1 + ITEM + 1)),
        ({"ab": "c"}, 1 + 2 * ITEM + 3),
        ({"ab": "c"}.items(), 1 + ITEM + (1 + 2 * ITEM + 3)),
        (object(), 1),
    ],
)
def test_size_counts_the_tree(value: Any, expected: int):
    assert size(value) == expected


def test_size_stops_where_nobody_could_pay():
    """2 ** 90 items: only stopping early can answer."""
    value: list[Any] = ["a"]
    for _ in range(90):
        value = [value, value]
    assert size(value) > WORK_LIMIT


def test_size_refuses_numbers_that_computing_with_takes_long():
    assert size(2 ** (INTEGER_BITS - 1)) == 1
    with pytest.raises(TemplateStopped, match="thousands of digits"):
        size([2**INTEGER_BITS])


def test_jinja_is_new_enough():
    """Before 3.1.6 the sandbox had known ways out."""
    assert tuple(map(int, jinja2.__version__.split(".")[:3])) >= (3, 1, 6)
