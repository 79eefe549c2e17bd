"""Files of rows: read as `datasets.load_dataset` and pandas read them where those are exact, and every fault named.

What has to be known about the peer (datasets 5): it reads CSV through pandas, which guesses the type of every column.
So it is compared on columns of words only; where it guesses wrong, ours is compared with what the csv module wrote.
"""

import codecs
import csv
import gzip
import io
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from minift.data.files import PARQUET_BATCH, parse_json, read_records

WORDS = [
    {"prompt": "Hi", "completion": "Hello"},
    {"prompt": 'He said: "no", twice', "completion": "Grüße, 世界 👩‍👩‍👧"},
    {"prompt": "two\nlines", "completion": " and\ta tab "},
    {"prompt": "a; b, c", "completion": "''"},
]
CHAT = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Grüße \u2028 😀"}], "id": 1},
    {"messages": [{"role": "user", "content": ""}], "id": 2},
]


def records(path: Path) -> list[Any]:
    return [record for _, record in read_records(path)]


def faults(path: Path) -> list[str]:
    """ "where: why" of the records that could not be read."""
    return [f"{where}: {record}" for where, record in read_records(path) if isinstance(record, ValueError)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return write(path, text.getvalue())


def json_lines(rows: list[Any], **options: Any) -> str:
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


# --- against the peer -------------------------------------------------------------------------------------------------


def test_equal_to_load_dataset(tmp_path: Path):
    parquet.write_table(pyarrow.Table.from_pylist(CHAT), tmp_path / "chat.parquet")
    files = {
        "csv": [write_csv(tmp_path / "words.csv", WORDS)],
        "parquet": [tmp_path / "chat.parquet"],
        "json": [
            write(tmp_path / "chat.jsonl", json_lines(CHAT)),
            write(tmp_path / "list.json", json.dumps(CHAT, indent=1)),
            write(tmp_path / "lines.json", json_lines(CHAT)),
        ],
    }
    for kind, paths in files.items():
        for path in paths:
            theirs = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
            assert records(path) == list(theirs) == (WORDS if kind == "csv" else CHAT), path


def test_csv_cells_stay_text_where_the_peer_guesses(tmp_path: Path):
    rows = [{"prompt": "agent", "completion": "007"}, {"prompt": "nothing", "completion": "12"}]
    path = write_csv(tmp_path / "numbers.csv", rows)
    theirs = datasets.load_dataset("csv", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert theirs["completion"][:] == [7, 12]
    assert records(path) == rows
    rows = [{"prompt": "Say NA.", "completion": "NA"}, {"prompt": "null?", "completion": "None"}]
    assert records(write_csv(tmp_path / "words.csv", rows)) == rows


def test_an_empty_csv_cell_is_missing(tmp_path: Path):
    path = write_csv(tmp_path / "a.csv", [{"instruction": "Sing.", "input": "", "output": " "}])
    assert records(path) == [{"instruction": "Sing.", "input": None, "output": " "}]


# --- where records are ------------------------------------------------------------------------------------------------


def test_records_are_named_by_their_first_line(tmp_path: Path):
    path = write(tmp_path / "a.csv", 'prompt,completion\r\na,"b\r\nb\r\nb"\r\n\r\nc,d\r\n')
    assert list(read_records(path)) == [
        (f"{path}, line 2", {"prompt": "a", "completion": "b\r\nb\r\nb"}),
        (f"{path}, line 6", {"prompt": "c", "completion": "d"}),
    ]
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n\n \t\r\n{"a": 2}')
    assert list(read_records(path)) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 4", {"a": 2})]
    path = write(tmp_path / "a.json", '[{"a": 1},\n\n\n{"a": 2}]')
    assert list(read_records(path)) == [(f"{path}, row 1", {"a": 1}), (f"{path}, row 2", {"a": 2})]


def test_parquet_rows_are_counted_over_batches_and_row_groups(tmp_path: Path):
    path, count = tmp_path / "a.parquet", PARQUET_BATCH * 2 + 7
    parquet.write_table(pyarrow.table({"text": [str(n) for n in range(count)]}), path, row_group_size=PARQUET_BATCH - 5)
    assert list(read_records(path)) == [(f"{path}, row {n + 1}", {"text": str(n)}) for n in range(count)]


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.Json", "a.CSV"])
def test_suffixes_in_any_case(tmp_path: Path, name: str):
    content = "text\nhi\n" if name.endswith("CSV") else '{"text": "hi"}\n{"text": "ho"}\n'
    assert records(write(tmp_path / name, content))[0] == {"text": "hi"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "ü"}\n'),
        ("a.json", '[{"text": "ü"}]'),
        ("b.json", '{"text": "ü"}\n{"text": "ü"}\n'),
        ("a.csv", "text\nü\n"),
    ],
)
def test_a_byte_order_mark_is_read_over(tmp_path: Path, name: str, content: str):
    """Windows editors write one."""
    assert records(write(tmp_path / name, codecs.BOM_UTF8 + content.encode()))[0] == {"text": "ü"}


@pytest.mark.parametrize("name", ["data", "rows", "train"])
def test_a_json_object_that_is_plainly_one_list(tmp_path: Path, name: str):
    assert records(write(tmp_path / "a.json", json.dumps({name: CHAT}))) == CHAT
    assert records(write(tmp_path / "b.json", json.dumps({name: CHAT}, indent=2))) == CHAT


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"train": CHAT, "test": CHAT}, "with 'train', 'test'"),
        ({"version": "1", "data": CHAT}, "with 'version', 'data'"),
        (CHAT[0], "with 'messages', 'id'"),
        ({}, "with nothing"),
        ("text", "a JSON str"),
        (3, "a JSON int"),
        (None, "a JSON NoneType"),
    ],
    ids=str,
)
def test_a_json_file_that_is_no_list(tmp_path: Path, value: Any, found: str):
    path = write(tmp_path / "a.json", json.dumps(value))
    with pytest.raises(ValueError, match=found) as caught:
        records(path)
    assert str(path) in str(caught.value) and "a list of rows is needed" in str(caught.value)


def test_a_json_list_under_the_name_of_lines(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", "\n" + json.dumps(CHAT, indent=1))
    with pytest.raises(ValueError, match=r"line 2: begins a JSON list.*name the file \.json"):
        records(path)


# --- faults -----------------------------------------------------------------------------------------------------------


def test_faults_of_lines_do_not_end_the_reading(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": \n{"b": "\xff"}\n{"a": 2}\n{"a": 3} {}\n')
    assert [record for record in records(path) if isinstance(record, dict)] == [{"a": 1}, {"a": 2}]
    assert faults(path) == [
        f"{path}, line 2: not valid JSON: Expecting value (column 6)",
        f"{path}, line 3: not UTF-8 text (invalid start byte at byte 7 of the line)",
        f"{path}, line 5: not valid JSON: Extra data (column 10)",
    ]


def test_faults_of_a_csv_file(tmp_path: Path):
    path = write(tmp_path / "a.csv", b"prompt,completion\nlonely\na,b,c\nd,e\n")
    assert faults(path) == [
        f"{path}, line 2: has 1 cells where the header has 2",
        f"{path}, line 3: has 3 cells where the header has 2",
    ]
    assert records(path)[2:] == [{"prompt": "d", "completion": "e"}]


@pytest.mark.parametrize(
    ("rest", "why"),
    [
        (b'a,"never closed\nb,c\nd,e\n', "unexpected end of data"),
        (b'a,"b"c\nd,e\n', "expected after"),
        (b"a,\xff\nd,e\n", "not UTF-8 text"),
        (b"a,%b\nd,e\n" % (b"x" * 200_000), "larger than field limit (131072): write such texts as JSON Lines"),
    ],
    ids=["open", "closed-early", "latin-1", "long"],
)
def test_a_fault_that_ends_a_csv_file_says_so(tmp_path: Path, rest: bytes, why: str):
    path = write(tmp_path / "a.csv", b"prompt,completion\n1,2\n" + rest)
    first, fault = records(path)
    assert first == {"prompt": "1", "completion": "2"}
    assert why in str(fault) and "nothing from here on was read" in str(fault)
    assert faults(path)[0].startswith(f"{path}, line 3: ")


def test_a_column_named_twice(tmp_path: Path):
    path = write(tmp_path / "a.csv", "text,text\na,b\n")
    with pytest.raises(ValueError, match="line 1: the header names a column twice: 'text', 'text'"):
        records(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": NaN}', "NaN is not a number of JSON"),
        ("[-Infinity]", "-Infinity is not a number of JSON"),
        ("1" * 5000, r"Exceeds the limit \(4300 digits\) for integer string conversion: value has 5000 digits$"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("", r"Expecting value \(column 1\)"),
        ('{"a": 1}}', r"Extra data \(column 9\)"),
        ('{\n"a": 1,\n}', r"\(line [23], column \d\)"),
        ("\ufeff{}", r"column 1"),
        ("{'a': 1}", r"in double quotes \(column 2\)"),
        ('"\x01"', r"Invalid control character"),
    ],
    ids=lambda text: text[:12],
)
def test_text_that_is_not_json(text: str, why: str):
    with pytest.raises(ValueError, match=f"^not valid JSON: .*{why}"):
        parse_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(deadline=None, derandomize=True)
@given(JSON, st.booleans())
def test_json_is_read_as_python_writes_it(value: Any, escaped: bool):
    assert parse_json(json.dumps(value, ensure_ascii=escaped)) == value


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("text\nhi".encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        ("text\nhi".encode("utf-16-be"), None),
        (codecs.BOM_UTF16_BE + "text\nhi".encode("utf-16-be"), "UTF-16 text: save it as UTF-8"),
        (gzip.compress(b'{"text": "hi"}'), "compressed"),
        (b"PK\x03\x04 and so on", "spreadsheet"),
        (b"PAR1 and so on", "a Parquet file: name it .parquet"),
        (bytes(range(128, 256)) * 5, None),
    ],
    ids=["utf-16", "utf-16-no-mark", "utf-16-be", "gzip", "zip", "parquet", "garbage"],
)
def test_another_kind_of_file_under_a_known_name(tmp_path: Path, name: str, content: bytes, what: str | None):
    """Known kinds are named; of others nothing but faults is read."""
    path = write(tmp_path / name, content)
    if what:
        with pytest.raises(ValueError, match=what) as caught:
            records(path)
        assert str(caught.value).startswith(f"{path} is ")
    elif name == "a.json":
        with pytest.raises(ValueError, match=f"{path}: not "):
            records(path)
    elif name == "a.jsonl":
        assert records(path) and all(isinstance(record, ValueError) for record in records(path))
    else:  # UTF-16 of ASCII without a mark is text with NULs: as good a CSV file as any
        assert not any(record.get("text") for record in records(path) if isinstance(record, dict))


def test_a_parquet_file_that_is_none(tmp_path: Path):
    path = tmp_path / "a.parquet"
    for content in (b"", b"PAR1", b'{"text": "hi"}\n'):
        with pytest.raises(ValueError, match="not a readable Parquet file") as caught:
            records(write(path, content))
        assert str(caught.value).startswith(f"{path}: ")
    parquet.write_table(pyarrow.table({"text": ["word" * n for n in range(5000)]}), path, compression="snappy")
    content = path.read_bytes()
    spoiled = content[:40] + b"\xff" * 400 + content[440:]
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        records(write(path, spoiled))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="needs pyarrow: pip install pyarrow"):
        records(path)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl.gz", "a.tsv", "a.xlsx"])
def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path, name: str):
    path = write(tmp_path / name, '{"text": "hi"}')
    with pytest.raises(ValueError, match=r"has the suffix '.*\.jsonl, \.ndjson, \.json, \.csv, \.parquet") as caught:
        read_records(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl does not exist"):
        read_records(tmp_path / "missing.jsonl")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_records(tmp_path)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_is_read_as_it_is_asked_for(tmp_path: Path, suffix: str):
    """Nothing is kept of a record once the next one is asked for, so a file of 8 MB passes through little memory.

    A line takes 2 kB and Python's file buffer at most 128 kB, 2 % of the file; 5 % are allowed. Of the Parquet file's
    rows, one batch in four is a list of objects at a time, 25 % (and dicts and string headers); 50 % are allowed.
    """
    rows, path = [{"text": f"{n:06d}" + "x" * 2042} for n in range(4 * PARQUET_BATCH)], tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        write(path, json_lines(rows))
    elif suffix == ".csv":
        write_csv(path, rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
    size = path.stat().st_size
    assert size > 8e6
    next(iter(read_records(path)))  # what is imported on the way is not counted
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_records(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == len(rows)
    assert peak < (size / 20 if suffix != ".parquet" else size / 2), f"{peak:,} bytes"
