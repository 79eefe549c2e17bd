"""read_dataset and check_row: the shapes they accept, and that each error names the file, the line and the fault.

There is no peer: TRL finds a malformed row when it tokenizes, without its line.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from minift.data.formats import check_row, read_dataset

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
GOOD: list[dict[str, Any]] = [
    {"messages": [USER, ASSISTANT]},
    {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT, {"role": "tool", "content": "4"}]},
    {"prompt": "Hi", "completion": " Hello"},
    {"prompt": "", "completion": ""},
    {"prompt": [USER], "completion": [ASSISTANT]},
    {"text": "Hello"},
    {"text": "", "extra": None},
    {"messages": [USER, ASSISTANT], "text": 1},  # messages go first, other columns are not looked at
]
BAD = [
    pytest.param([1, 2], "must be a JSON object, found list", id="list"),
    pytest.param("text", "must be a JSON object, found str", id="string"),
    pytest.param(None, "must be a JSON object, found NoneType", id="null"),
    pytest.param({}, "found nothing", id="empty"),
    pytest.param({"txt": "a"}, "needs 'messages', 'prompt' and 'completion', or 'text'; found 'txt'", id="key"),
    pytest.param({"prompt": "a"}, "found 'prompt'", id="prompt-alone"),
    pytest.param({"completion": "a"}, "found 'completion'", id="completion-alone"),
    pytest.param({"text": None}, "found 'text'", id="text-null"),
    pytest.param({"text": 3}, "found 'text'", id="text-number"),
    pytest.param({"prompt": "a", "completion": [ASSISTANT]}, "both be text or both be lists", id="mixed"),
    pytest.param({"prompt": [USER], "completion": "a"}, "both be text or both be lists", id="mixed-other-way"),
    pytest.param({"prompt": [USER], "completion": []}, "completion must be a non-empty list", id="no-completion"),
    pytest.param({"prompt": None, "completion": None}, "prompt must be a non-empty list", id="nulls"),
    pytest.param({"messages": []}, "messages must be a non-empty list", id="no-messages"),
    pytest.param({"messages": None}, "messages must be a non-empty list", id="messages-null"),
    pytest.param({"messages": "Hi"}, "messages must be a non-empty list", id="messages-text"),
    pytest.param({"messages": {"role": "user"}}, "messages must be a non-empty list", id="messages-object"),
    pytest.param({"messages": [USER, "Hello"]}, r"messages\[1\] must be an object", id="message-text"),
    pytest.param({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] must be", id="no-content"),
    pytest.param({"messages": [{"role": "user", "content": None}]}, r"messages\[0\] must be", id="content-null"),
    pytest.param({"messages": [{"role": "user", "content": ["a"]}]}, r"messages\[0\] must be", id="content-list"),
    pytest.param({"messages": [{"content": "a"}]}, r"messages\[0\] has role None", id="no-role"),
    pytest.param({"messages": [{"from": "gpt", "content": "a"}]}, r"messages\[0\] has role None", id="other-key"),
    pytest.param({"messages": [USER, {"role": "Assistant", "content": "a"}]}, "has role 'Assistant'", id="role-case"),
    pytest.param({"messages": [{"role": ["user"], "content": "a"}]}, "has role", id="role-list"),
    pytest.param({"prompt": [USER], "completion": [{"role": "bot", "content": ""}]}, "completion.0. has role 'bot'"),
]


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_rows_come_back_as_they_were_written(tmp_path: Path):
    path = write(tmp_path / "data.jsonl", *map(json.dumps, GOOD))
    assert read_dataset(path) == GOOD
    assert read_dataset(str(path)) == GOOD


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n \t\n"], ids=["unix", "windows", "blank"])
@pytest.mark.parametrize("last", ["", "\n", "\n   \n\n"], ids=["unterminated", "terminated", "trailing"])
def test_blank_lines_and_line_ends_do_not_matter(tmp_path: Path, newline: str, last: str):
    path = tmp_path / "data.jsonl"
    path.write_bytes((newline.join(map(json.dumps, GOOD)) + last).encode())
    assert read_dataset(path) == GOOD


def test_unicode_is_kept_and_its_line_separators_do_not_split_a_row(tmp_path: Path):
    # U+2028, U+0085 and the form feed end a line for str.splitlines, but not in a JSON Lines file.
    rows = [{"text": "Grüße, 世界 👩‍👩‍👧 \u2028 \u0085 \x1c \x0c e\u0301"}]
    path = write(tmp_path / "data.jsonl", json.dumps(rows[0], ensure_ascii=False))
    assert read_dataset(path) == rows


def test_a_byte_order_mark_is_read_over_at_the_beginning_only(tmp_path: Path):
    """Windows editors write one."""
    path, line = tmp_path / "data.jsonl", json.dumps(GOOD[0]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line)
    assert read_dataset(path) == [GOOD[0]] * 2
    path.write_bytes(line + b"\n\xef\xbb\xbf" + line)
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        read_dataset(path)


@pytest.mark.parametrize(("row", "fault"), BAD)
def test_a_bad_row_names_file_line_and_fault(tmp_path: Path, row: Any, fault: str):
    path = write(tmp_path / "data.jsonl", json.dumps(GOOD[0]), "", json.dumps(row), json.dumps(GOOD[1]))
    with pytest.raises(ValueError, match=fault) as caught:
        read_dataset(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize(("row", "fault"), BAD)
def test_check_row_names_the_row_and_the_fault(row: Any, fault: str):
    with pytest.raises(ValueError, match=fault) as caught:
        check_row(row, "row 17")
    assert str(caught.value).startswith("row 17: ")


@pytest.mark.parametrize("line", ['{"text": "a"', "{'text': 'a'}", '{"text": "a"} {"text": "b"}', "a", '{"text": a}'])
def test_a_line_that_is_not_json_is_named(tmp_path: Path, line: str):
    path = write(tmp_path / "data.jsonl", "", json.dumps(GOOD[0]), line)
    with pytest.raises(ValueError, match="not valid JSON") as caught:
        read_dataset(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize("rows_before", [0, 1, 3000])
def test_bytes_that_are_not_utf8_are_located(tmp_path: Path, rows_before: int):
    # 3000 rows are more than one read buffer: an offset counted from the buffer's beginning would be wrong.
    good = json.dumps({"text": "a" * 20}).encode() + b"\n"
    path = tmp_path / "data.jsonl"
    path.write_bytes(good * rows_before + '{"text": "Grüße"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8") as caught:
        read_dataset(path)
    message = str(caught.value)
    assert str(path) in message
    offset = len(good) * rows_before + len('{"text": "Gr')
    assert f"line {rows_before + 1}" in message or f"byte {offset}" in message, message


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\t\n\r\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no rows") as caught:
        read_dataset(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl does not exist"):
        read_dataset(tmp_path / "missing.jsonl")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_dataset(tmp_path)


def test_a_json_array_instead_of_lines_is_refused(tmp_path: Path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(GOOD, indent=1), encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        read_dataset(path)
