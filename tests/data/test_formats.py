"""Rows: the shapes that are accepted, how others are converted, the user's own function, and the report of all faults.

The peer is TRL's `maybe_convert_to_chatml`, which renames keys and leaves the rest as it is: on rows of its roles the
results are equal. For faults there is no peer: TRL finds a malformed row when it tokenizes, without its line.
"""

import copy
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.data_utils import maybe_convert_to_chatml

import minift
from minift.data.formats import BATCH, ROLES, SHOWN, check_row, read_dataset, to_row

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": None}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CHAT = {"messages": [USER, ASSISTANT]}
GOOD: list[dict[str, Any]] = [
    CHAT,
    {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT, {"role": "tool", "content": "4"}]},
    {"messages": [{"role": "developer", "content": "Be brief."}, USER, ASSISTANT]},
    {"messages": [USER, ASSISTANT | {"thinking": "A greeting.", "tool_calls": [CALL]}], "tools": TOOLS},
    {"prompt": "Hi", "completion": " Hello"},
    {"prompt": "", "completion": ""},
    {"prompt": [USER], "completion": [ASSISTANT]},
    {"text": "Hello", "id": 7, "chat_template_kwargs": {"enable_thinking": False}},
    {"text": ""},
    {"messages": [USER, ASSISTANT], "text": 1},  # messages go first, other columns are not looked at
    {"prompt": "a", "completion": "b", "instruction": "c", "output": "d"},
]
# Neither a row nor anything that can be converted to one.
BAD = [
    pytest.param([1, 2], "must be a JSON object, found list", id="list"),
    pytest.param("text", "must be a JSON object, found str", id="string"),
    pytest.param(None, "must be a JSON object, found NoneType", id="null"),
    pytest.param({}, "found nothing", id="empty"),
    pytest.param({"txt": "a", "b": 1}, "found 'txt', 'b'", id="key"),
    pytest.param({"prompt": "a"}, "found 'prompt'", id="prompt-alone"),
    pytest.param({"completion": "a"}, "found 'completion'", id="completion-alone"),
    pytest.param({"text": 3}, "text must be text, found int", id="text-number"),
    pytest.param({"text": ["a"]}, "text must be text, found list", id="text-list"),
    pytest.param({"prompt": "a", "completion": [ASSISTANT]}, "both be text or both be lists", id="mixed"),
    pytest.param({"prompt": [USER], "completion": "a"}, "both be text or both be lists", id="mixed-other-way"),
    pytest.param({"prompt": [USER], "completion": []}, "completion must be a non-empty list", id="no-completion"),
    pytest.param({"messages": []}, "messages must be a non-empty list", id="no-messages"),
    pytest.param({"messages": {"role": "user"}}, "messages must be a non-empty list", id="messages-object"),
    pytest.param({"messages": [USER, "Hello"]}, r"messages\[1\] must be an object", id="message-text"),
    pytest.param({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] must be", id="no-content"),
    pytest.param({"messages": [{"role": "user", "content": None}]}, r"messages\[0\] must be", id="content-null"),
    pytest.param({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\] must be", id="content-number"),
    pytest.param({"messages": [{"content": "a"}]}, r"messages\[0\] has role None", id="no-role"),
    pytest.param({"messages": [USER, {"role": "Assistant", "content": "a"}]}, "has role 'Assistant'", id="role-case"),
    pytest.param({"messages": [{"role": ["user"], "content": "a"}]}, "has role", id="role-list"),
    pytest.param({"prompt": [USER], "completion": [{"role": "bot", "content": ""}]}, "completion.0. has role 'bot'"),
    pytest.param({"text": "a", "tools": {"a": 1}}, "tools must be a list, found dict", id="tools"),
    pytest.param({"text": "a", "chat_template_kwargs": [1]}, "kwargs must be a dict, found list", id="kwargs"),
    pytest.param({"text": "ü\ud83d"}, r"text holds half a character \('\\ud83d' at position 1\)", id="surrogate"),
    pytest.param({"messages": [{"role": "user", "content": "\udc00"}]}, r"messages\[0\] holds half", id="surrogate-2"),
    pytest.param({"prompt": "a", "completion": "\udc00"}, "completion holds half", id="surrogate-3"),
]
# Not a row, but read_dataset makes one of it.
CONVERTIBLE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"messages": None, "text": "a"}, {"text": "a"}),
    ({"text": "a", "extra": None}, {"text": "a"}),
    ({"prompt": None, "completion": "a", "text": "b"}, {"completion": "a", "text": "b"}),
    ({"messages": [USER | {"tool_calls": None}, ASSISTANT | {"name": None}]}, CHAT),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
     {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}),
    ({"messages": json.dumps([USER, ASSISTANT])}, CHAT),
    ({"conversations": json.dumps([USER, ASSISTANT])}, CHAT),
    ({"text": "a", "tools": json.dumps(TOOLS)}, {"text": "a", "tools": TOOLS}),
    ({"text": "a", "chat_template_kwargs": '{"b": 1}'}, {"text": "a", "chat_template_kwargs": {"b": 1}}),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                   {"role": "assistant", "content": [{"type": "text", "text": "Hello", "image_url": None}]}]}, CHAT),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "id": "x1"},
     CHAT | {"id": "x1"}),
    ({"conversations": [{"from": "system", "value": "S"}, {"from": "user", "value": "U"},
                        {"from": "model", "value": "M"}, {"from": "function", "value": "F"},
                        {"from": "tool", "value": "T"}, {"from": "assistant", "value": "A", "weight": 1}]},
     {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"},
                   {"role": "assistant", "content": "M"}, {"role": "tool", "content": "F"},
                   {"role": "tool", "content": "T"}, {"role": "assistant", "content": "A", "weight": 1}]}),
    ({"prompt": [{"from": "human", "value": "Hi"}], "completion": [{"from": "gpt", "value": "Hello"}]},
     {"prompt": [USER], "completion": [ASSISTANT]}),
    ({"instruction": "Hi", "output": "Hello"}, CHAT),
    ({"instruction": "Hi", "input": "", "output": "Hello", "text": "Below is ..."}, CHAT | {"text": "Below is ..."}),
    ({"instruction": "Hi", "input": None, "output": "Hello", "history": [], "system": ""},
     CHAT | {"history": [], "system": ""}),
    ({"instruction": "Add.", "input": "1 2", "output": "3"},
     {"messages": [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]}),
]  # fmt: skip
# What could be a known shape, but cannot be converted.
INCONVERTIBLE = [
    pytest.param({"text": None}, "found nothing, but rows have messages", id="all-null"),
    pytest.param({"prompt": None, "completion": None}, "found nothing", id="nulls"),
    pytest.param({"messages": "Hi"}, "messages must be a list, or the JSON text of one: not valid JSON", id="text"),
    pytest.param({"messages": '"Hi"'}, "messages must be a non-empty list", id="json-text"),
    pytest.param({"text": "a", "tools": "[NaN]"}, "tools must be a list.*NaN is not", id="tools-text"),
    pytest.param({"conversations": []}, "conversations must be a non-empty list", id="no-turns"),
    pytest.param({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\] must be", id="turn-number"),
    pytest.param({"conversations": [{"from": "bot", "value": "a"}]}, r"conversations\[0\] has role 'bot'", id="turn"),
    pytest.param({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
                 r"messages\[0\] holds a part of type 'image_url'", id="image"),
    pytest.param({"prompt": [USER], "completion": [{"role": "assistant", "content": [{"type": "text"}]}]},
                 r"completion\[0\] holds a part of type 'text'", id="text-without-text"),
    pytest.param({"messages": [{"role": "user", "content": ["a"]}]}, "a part of type 'str'", id="content-strings"),
    pytest.param({"instruction": 3, "output": "a"}, "instruction must be text, found int", id="instruction"),
    pytest.param({"instruction": "a", "input": ["b"], "output": "c"}, "input must be text, found list", id="input"),
    pytest.param({"instruction": "a", "output": None}, "found 'instruction'", id="no-output"),
    pytest.param({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history'.* would be lost", id="past"),
    pytest.param({"conversations": [USER], "system": "Be kind."}, "'system'.* would be lost", id="system"),
]  # fmt: skip


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOOD, ids=str)
def test_a_row_stays_what_it_is(row: dict[str, Any]):
    check_row(row)
    assert to_row(row) == row


@pytest.mark.parametrize(("row", "fault"), BAD)
@pytest.mark.parametrize("check", [check_row, to_row])
def test_a_bad_row_is_named_with_its_fault(check: Callable[[Any, str], Any], row: Any, fault: str):
    with pytest.raises(ValueError, match=fault) as caught:
        check(row, "row 17")
    assert str(caught.value).startswith("row 17: ")


@pytest.mark.parametrize(("record", "row"), CONVERTIBLE, ids=str)
def test_converting(record: dict[str, Any], row: dict[str, Any]):
    before = copy.deepcopy(record)
    assert to_row(record) == row
    assert record == before  # TRL's changes its argument
    assert to_row(row) == row


@pytest.mark.parametrize(("record", "fault"), INCONVERTIBLE)
def test_what_cannot_be_converted(record: dict[str, Any], fault: str):
    with pytest.raises(ValueError, match=fault) as caught:
        to_row(record, "row 17")
    assert str(caught.value).startswith("row 17: ")


def test_a_row_of_another_format_is_sent_to_read_dataset():
    """check_row is what training calls: it checks, and converts nothing."""
    with pytest.raises(ValueError, match=r"found 'conversations'.*read_dataset converts"):
        check_row({"conversations": [{"from": "human", "value": "Hi"}]})


TEXT = st.text(max_size=20)


def messages(
    role_key: str, content_key: str, roles: list[str], **optional: st.SearchStrategy[Any]
) -> st.SearchStrategy[list[dict[str, Any]]]:
    required: dict[str, st.SearchStrategy[Any]] = {role_key: st.sampled_from(roles), content_key: TEXT}
    return st.lists(st.fixed_dictionaries(required, optional=optional | {"name": TEXT}), min_size=1, max_size=4)


# Where a message has both keys, `from` and `value` count.
FROM_VALUE = messages("from", "value", list(ROLES), role=st.just("bot"), content=st.integers())
ROLE_CONTENT = messages("role", "content", list(ROLES))


@settings(deadline=None, derandomize=True)
@given(
    st.one_of(
        st.fixed_dictionaries({"conversations": FROM_VALUE | ROLE_CONTENT}, optional={"id": st.integers()}),
        st.fixed_dictionaries({"messages": FROM_VALUE | ROLE_CONTENT}),
        st.fixed_dictionaries({"prompt": FROM_VALUE, "completion": FROM_VALUE | ROLE_CONTENT}),
        st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
        st.fixed_dictionaries({"text": TEXT}),
    )
)
def test_equal_to_trl(record: dict[str, Any]):
    assert to_row(record) == maybe_convert_to_chatml(copy.deepcopy(record))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_source_gives_the_same_rows(tmp_path: Path):
    rows = [CHAT | {"id": 1}, {"messages": [USER, ASSISTANT, USER, ASSISTANT], "id": 2}]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    path = write(tmp_path / "a.jsonl", *rows)
    sources = [path, str(path), tmp_path / "a.json", tmp_path / "a.parquet"]
    for source in [*sources, rows, tuple(rows), iter(rows), dataset, dataset.to_iterable_dataset()]:
        assert read_dataset(source) == rows, source
    assert minift.read_dataset is read_dataset


def test_columns_of_a_mixed_data_set_are_null_where_they_are_missing():
    """Arrow gives every row every column, and every message every key."""
    rows = [{"messages": [USER | {"name": "Ann"}, ASSISTANT]}, {"text": "plain"}, {"prompt": "a", "completion": "b"}]
    names = ("messages", "text", "prompt", "completion")
    dataset = datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    assert dataset[1] == {"messages": None, "text": "plain", "prompt": None, "completion": None}
    assert dataset[0]["messages"][1] == ASSISTANT | {"name": None}
    assert read_dataset(dataset) == rows


def test_a_csv_file_of_conversations(tmp_path: Path):
    text = json.dumps([USER, ASSISTANT]).replace('"', '""')
    path = tmp_path / "a.csv"
    path.write_text(f'messages,id\n"{text}",7\n')
    assert read_dataset(path) == [CHAT | {"id": "7"}]
    path.write_text("instruction,input,output\nHi,,Hello\n")
    assert read_dataset(path) == [CHAT]


@settings(deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.fixed_dictionaries({"messages": ROLE_CONTENT}, optional={"id": st.integers() | TEXT | st.booleans()}),
            st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
            st.fixed_dictionaries({"prompt": ROLE_CONTENT, "completion": ROLE_CONTENT}),
            st.fixed_dictionaries({"text": TEXT}),
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n \t\n"]),
    st.booleans(),
)
def test_json_lines_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], escaped: bool, newline: str, ended: bool
):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    lines = (json.dumps(row, ensure_ascii=escaped) for row in rows)
    path.write_bytes((newline.join(lines) + newline * ended).encode())
    assert read_dataset(path) == rows


def test_line_separators_of_unicode_do_not_split_a_row(tmp_path: Path):
    # U+2028, U+0085 and the form feed end a line for str.splitlines, but not in a JSON Lines file.
    rows = [{"text": "Grüße, 世界 👩‍👩‍👧 \u2028 \u0085 \x1c \x0c e\u0301"}]
    assert read_dataset(write(tmp_path / "a.jsonl", json.dumps(rows[0], ensure_ascii=False))) == rows


def test_a_file_is_in_memory_once(tmp_path: Path):
    """Above the rows that stay: a line of 2 kB and Python's file buffer, at most 128 kB; the list's spare room is 1/8.

    10 % of a file of 4 MB are allowed; the file's text held beside the rows would be 100 %.
    """
    path = write(tmp_path / "a.jsonl", *({"text": f"{n:06d}" + "x" * 2042} for n in range(2000)))
    read_dataset(path)
    tracemalloc.start()
    try:
        rows = read_dataset(path)
        current, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 2000 and current > 4e6
    assert peak - current < 0.1 * path.stat().st_size, f"{peak - current:,} bytes"


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", ""), ("a.jsonl", " \n\t\n\r\n"), ("a.json", ""), ("a.json", " \n[ ]"), ("a.json", '{"data": []}'),
    ("a.csv", ""), ("a.csv", "text\n\n"),
])  # fmt: skip
def test_a_file_without_rows(tmp_path: Path, name: str, content: str):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} holds no rows$"):
        read_dataset(path)


def test_a_source_without_rows():
    with pytest.raises(ValueError, match="the data set holds no rows"):
        read_dataset([])
    with pytest.raises(ValueError, match="the data set holds no rows"):
        read_dataset(datasets.Dataset.from_dict({"text": []}))


def test_sources_that_are_no_rows():
    with pytest.raises(ValueError, match=r"a dict \(with 'train', 'test'\) is not a list of rows"):
        read_dataset(datasets.DatasetDict({name: datasets.Dataset.from_list([CHAT]) for name in ("train", "test")}))
    with pytest.raises(ValueError, match=r"a dict \(with 'messages'\).*\[row\]"):
        read_dataset(CHAT)
    with pytest.raises(ValueError, match="not from int"):
        read_dataset(3)  # pyright: ignore[reportArgumentType]


# --- the report -------------------------------------------------------------------------------------------------------


def test_one_malformed_row_is_one_line(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", CHAT, "", {"txt": "a"}, CHAT)
    with pytest.raises(ValueError, match="found 'txt'") as caught:
        read_dataset(path)
    assert str(caught.value).startswith(f"{path}, line 3: ") and "\n" not in str(caught.value)


def test_all_malformed_rows_are_in_one_report(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", "{", CHAT, [1], {"messages": []}, '{"text": "\\ud83d"}')
    with pytest.raises(ValueError) as caught:
        read_dataset(path)
    head, *lines = str(caught.value).splitlines()
    assert head == "4 malformed rows:"
    reasons = ["not valid JSON", "a row must be a JSON object", "messages must be", "text holds half a character"]
    assert len(lines) == 4
    for line, number, reason in zip(lines, (1, 3, 4, 5), reasons, strict=True):
        assert line.startswith(f"  {path}, line {number}: {reason}")


@pytest.mark.parametrize(
    ("count", "last"), [(SHOWN, f"  row {SHOWN}: "), (SHOWN + 1, "  and 1 more"), (5000, "  and 4980 more")]
)
def test_a_long_report_is_cut(count: int, last: str):
    with pytest.raises(ValueError) as caught:
        read_dataset([{"txt": "a"}] * count)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{count} malformed rows:"
    assert lines[SHOWN].startswith(f"  row {SHOWN}: ") and lines[-1].startswith(last)
    assert len(lines) == 1 + min(count, SHOWN + 1)


def test_malformed_rows_can_be_left_out_with_a_warning(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", "{", CHAT, {"txt": 1}, CHAT)
    with pytest.warns(UserWarning) as caught:
        assert read_dataset(path, on_error="skip") == [CHAT, CHAT]
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(f"2 malformed rows left out, 2 kept:\n  {path}, line 1: not valid JSON")
    assert warning.filename == __file__
    with pytest.warns(UserWarning, match="1 malformed rows left out, 1 kept:\n  row 1: "):
        assert read_dataset([{}, CHAT], on_error="skip") == [CHAT]


def test_a_data_set_of_malformed_rows_is_refused_however_it_is_read():
    with pytest.raises(ValueError, match="2 malformed rows:\n  row 1: "):
        read_dataset([{}, {}], on_error="skip")


def test_nothing_is_warned_of_in_good_rows(recwarn: pytest.WarningsRecorder):
    read_dataset([CHAT], on_error="skip")
    assert len(recwarn) == 0


def test_unknown_options():
    with pytest.raises(ValueError, match="unknown on_error 'ignore': choose raise or skip"):
        read_dataset([CHAT], on_error="ignore")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="needs a formatting function"):
        read_dataset([CHAT], batched=True)


# --- the user's own function ------------------------------------------------------------------------------------------

QUESTIONS = [{"q": "1+1?", "a": "2"}, {"q": "2+2?", "a": "4"}, {"q": "spam", "a": None}]
FORMATTED = [{"prompt": "1+1?", "completion": "2"}, {"text": "2+2? 4"}]


def by_row(row: dict[str, Any]) -> dict[str, Any] | str | None:
    if row["a"] is None:
        return None
    return {"prompt": row["q"], "completion": row["a"]} if row["a"] == "2" else f"{row['q']} {row['a']}"


def by_batch(columns: dict[str, list[Any]]) -> list[Any]:
    return [by_row({"q": q, "a": a}) for q, a in zip(columns["q"], columns["a"], strict=True)]


@pytest.mark.parametrize(("function", "batched"), [(by_row, False), (by_batch, True)])
def test_rows_texts_and_none(function: Callable, batched: bool):
    assert read_dataset(QUESTIONS, function, batched) == FORMATTED
    with pytest.raises(ValueError, match=r"row 2: messages must be a non-empty list"):
        read_dataset(QUESTIONS, lambda row: {"messages": []} if row["a"] == "4" else by_row(row))


def test_what_a_function_returns_is_converted():
    assert read_dataset([{"a": 1}], lambda _: {"instruction": "Hi", "output": "Hello"}) == [CHAT]


def test_a_batched_function_gets_columns():
    """At most 1000 rows, every column of the batch, None where a row lacks one; results keep their rows' order."""
    seen: list[dict[str, list[Any]]] = []

    def function(columns: dict[str, list[Any]]) -> list[str]:
        seen.append(columns)
        return [f"{n}" for n in columns["n"]]

    rows = [{"n": n} for n in range(2 * BATCH + 1)]
    rows[1]["extra"] = 7
    assert read_dataset(rows, function, batched=True) == [{"text": f"{n}"} for n in range(2 * BATCH + 1)]
    assert [len(columns["n"]) for columns in seen] == [BATCH, BATCH, 1]
    assert seen[0]["extra"] == [None, 7] + [None] * (BATCH - 2)
    assert "extra" not in seen[1]


def test_a_function_may_change_the_row_it_gets():
    rows = [{"q": "Hi"}]
    assert read_dataset(rows, lambda row: {"text": row.pop("q")}) == [{"text": "Hi"}]
    assert rows == [{"q": "Hi"}]


def one_text(row: Any) -> str:
    return f"{row['q']!s:.20}".ljust(44, ".")


def test_the_batched_mistake_of_the_book():
    """The peer takes the text of 44 characters for 44 results of two rows. Ours says what to write instead."""
    rows = QUESTIONS[:2]
    with pytest.raises(pyarrow.ArrowInvalid, match="expected length 2 but got length 44"):
        datasets.Dataset.from_list(rows).map(lambda batch: {"text": [*one_text(batch)]}, batched=True)
    with pytest.raises(ValueError, match=r"one text of 44 characters .* for a batch of 2") as caught:
        read_dataset(rows, one_text, batched=True)
    message = str(caught.value)
    assert message.startswith("the batch that begins with row 1: ")
    assert "a list of 2 rows or texts" in message and "without batched=True" in message
    assert read_dataset(rows, one_text)[0]["text"].startswith("1+1?...")


@pytest.mark.parametrize(
    ("function", "what"),
    [
        pytest.param(lambda row: {"prompt": row["q"], "completion": row["a"]}, "returned one dict for", id="row"),
        pytest.param(lambda row: [row["q"]], "returned 1 results for a batch of 3", id="fewer"),
        pytest.param(lambda row: [*row["q"], *row["a"]], "returned 6 results for a batch of 3", id="more"),
        pytest.param(lambda row: row["q"].strip(), "failed with AttributeError: 'list' object has", id="strip"),
        pytest.param(lambda row: "Q: " + row["q"], "failed with TypeError: can only concatenate", id="plus"),
        pytest.param(lambda row: None, "returned one NoneType for", id="none"),
    ],
)
def test_a_function_for_rows_called_with_a_batch(function: Callable, what: str):
    with pytest.raises(ValueError, match=f"^the batch that begins with row 1: .*{what}.*without batched=True"):
        read_dataset(QUESTIONS, function, batched=True)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        pytest.param(by_batch, None, id="zip"),
        pytest.param(lambda columns: [f"Q: {q}" for q in columns["q"]], 4, id="list"),
        pytest.param(lambda columns: tuple({"text": q} for q in columns["q"]), 4, id="tuple"),
    ],
)
def test_a_function_for_batches_called_with_a_row(function: Callable, count: int | None):
    """Characters of "1+1?" are taken for four rows; where texts of two lengths meet, `zip` notices first."""
    if count is None:
        with pytest.raises(ValueError, match="row 1: the formatting function failed with ValueError: zip"):
            read_dataset(QUESTIONS[:1], function)
    else:
        with pytest.raises(ValueError, match=rf"^row 1: .* returned {count} results for one row.*batched=True"):
            read_dataset(QUESTIONS, function)


def test_rows_at_which_a_function_fails_are_reported_together():
    with pytest.raises(ValueError) as caught:
        read_dataset([{"a": 1}, {"q": "b"}, {"a": 2}], lambda row: row["q"])
    assert str(caught.value).splitlines() == [
        "2 malformed rows:",
        "  row 1: the formatting function failed with KeyError: 'q'",
        "  row 3: the formatting function failed with KeyError: 'q'",
    ]
    assert isinstance(caught.value.__cause__, KeyError)  # so that the traceback shows the line in the function
    with pytest.raises(ValueError, match="row 1: a row must be a JSON object, found int"):
        read_dataset([{"a": 1}], lambda row: row["a"])


@pytest.mark.parametrize(("function", "batched"), [(by_row, False), (by_batch, True)])
def test_faults_of_the_file_do_not_reach_the_function(tmp_path: Path, function: Callable, batched: bool):
    path = write(tmp_path / "a.jsonl", "{", QUESTIONS[0], "[1]", QUESTIONS[1])
    with pytest.warns(UserWarning, match="2 malformed rows left out, 2 kept"):
        assert read_dataset(path, function, batched, on_error="skip") == FORMATTED
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, line 1: not valid JSON"):
        read_dataset(write(path, "{"), function, batched)


def test_a_function_without_return():
    def forgetful(row: dict[str, Any]) -> None:
        row["text"] = row["q"]

    with pytest.raises(ValueError, match="returned None for each"):
        read_dataset(QUESTIONS, forgetful)
