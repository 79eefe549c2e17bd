"""Rows of a data set: three shapes that the rest of the library knows, and how other rows become one of them.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}          or both as lists of messages
    {"text": "..."}

Data sets come in more shapes than that. `read_dataset` converts what is published most:

    ShareGPT   {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    Alpaca     {"instruction": "...", "input": "...", "output": "..."}
               -> the user says the instruction, a blank line and the input (if there is one); the answer is the output

The first shape of a row counts, in the order messages, prompt + completion, conversations, instruction + output, text.
(Stanford's Alpaca file also has the `text` of its own prompt: "Below is an instruction that describes a task...". Such
wording is the job of a chat template. To train on it, say so: `read_dataset(path, lambda row: row["text"])`.)

Any other shape is the work of a function of yours:

    read_dataset("dolly.jsonl", lambda row: {"prompt": row["question"], "completion": row["answer"]})

It is called with one row. With `batched=True` it is called with many rows as columns, {"question": [...], "answer":
[...]}, and returns as many results as there are rows. Taking one for the other is the classic mistake: a function for
one row returns one text for a batch, which is then taken for a list of characters (the book's "ArrowInvalid: ...
expected length 2 but got length 44"). Here both directions are noticed and named.

What is kept: every other column (`tools`, `chat_template_kwargs`, ids). What is treated as missing: null, which Parquet
and Arrow put in every column and every message where another row has a value.

A malformed row found in hour three of a run is expensive, so every row is checked when it is read, and all faults are
reported together. Left out: images and other content than text, and weights of single messages.

Sources: Vicuna's ShareGPT files; Stanford Alpaca; TRL's `maybe_convert_to_chatml`.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

from minift.data.files import Record, parse_json, read_records

Row = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {"human": "user", "gpt": "assistant", "model": "assistant", "function": "tool"}
# Columns that are never plain text: as text, in a CSV cell say, they are JSON.
JSON_COLUMNS = ("messages", "conversations", "tools", "chat_template_kwargs")
BATCH = 1000  # rows handed to a batched function; the number that `datasets.map` takes
SHOWN = 20  # faults in a report


# --- reading ----------------------------------------------------------------------------------------------------------


def read_dataset(
    source: str | Path | Iterable[Any],
    formatting: Callable[[Any], Any] | None = None,
    batched: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
) -> list[Row]:
    """Read rows from a file or from anything that yields dicts, convert and check them.

    Args:
        source: a .jsonl, .ndjson, .json, .csv or .parquet file; or a list, a `datasets.Dataset`, a generator, ...
        formatting: your function, called before anything is checked: row -> row, text, or None to leave the row out.
        batched: `formatting` takes columns of up to 1000 rows, name -> list, and returns a list with one entry a row.
        on_error: "raise", or "skip" to leave malformed rows out, with one warning that counts and shows them.

    Raises:
        FileNotFoundError: no such file, or a folder.
        ValueError: malformed rows, all in one report (the first 20 are shown), each with file and line or row number;
            no rows; a file or source that cannot be read; a function that does not fit `batched`.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"unknown on_error {on_error!r}: choose raise or skip")
    if batched and formatting is None:
        raise ValueError("batched=True says how `formatting` is called, so it needs a formatting function")
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "the data set"
    records = read_records(source) if isinstance(source, str | os.PathLike) else _number(source)
    if formatting is not None:
        records = (_format_batches if batched else _format_rows)(records, formatting)
    rows: list[Row] = []
    faults: list[ValueError] = []
    malformed = 0
    for where, record in records:
        try:
            rows.append(to_row(record, where))
        except ValueError as fault:
            malformed += 1
            if malformed <= SHOWN:
                faults.append(fault)
    if malformed and (on_error == "raise" or not rows):
        raise ValueError(_report(faults, malformed, "malformed rows")) from faults[0].__cause__
    if malformed:
        warnings.warn(_report(faults, malformed, f"malformed rows left out, {len(rows)} kept"), stacklevel=2)
    if not rows:
        dropped = ", or the formatting function returned None for each (is a `return` missing?)" if formatting else ""
        raise ValueError(f"{name} holds no rows{dropped}")
    return rows


def _report(faults: list[ValueError], malformed: int, what: str) -> str:
    if malformed == 1 and what == "malformed rows":
        return str(faults[0])
    more = [f"and {malformed - len(faults)} more"] if malformed > len(faults) else []
    return "\n  ".join([f"{malformed} {what}:", *map(str, faults), *more])


def _number(source: Any) -> Iterator[Record]:
    """Records of anything that yields dicts. A dict yields its keys, so it is refused."""
    if isinstance(source, Mapping):
        names = ", ".join(map(repr, source))
        raise ValueError(f"a dict (with {names}) is not a list of rows: hand over one of its values, or [row]")
    if not isinstance(source, Iterable):
        raise ValueError(f"rows come from a file or something that yields dicts, not from {type(source).__name__}")
    return ((f"row {number}", record) for number, record in enumerate(source, start=1))


# --- the user's own function ------------------------------------------------------------------------------------------


def _format_rows(records: Iterable[Record], function: Callable[[Row], Any]) -> Iterator[Record]:
    for where, record in records:
        if not isinstance(record, Mapping):  # a fault of the file
            yield where, record
            continue
        try:
            result = function(dict(record))
        except Exception as error:
            yield where, _failed(error)
            continue
        if isinstance(result, list | tuple):
            raise ValueError(
                f"{where}: the formatting function returned {len(result)} results for one row. It seems to be written "
                "for batches: where it expects a list it gets one text, and takes its characters for entries. Pass "
                "batched=True, or return one row or text"
            )
        if result is not None:
            yield where, _as_record(result)


def _format_batches(records: Iterator[Record], function: Callable[[dict[str, list[Any]]], Any]) -> Iterator[Record]:
    while batch := list(islice(records, BATCH)):
        good = [(where, record) for where, record in batch if isinstance(record, Mapping)]
        yield from ((where, record) for where, record in batch if not isinstance(record, Mapping))
        names = dict.fromkeys(name for _, record in good for name in record)
        results = _call_batched(function, {name: [record.get(name) for _, record in good] for name in names}, good)
        for (where, _), result in zip(good, results, strict=True):
            if result is not None:
                yield where, _as_record(result)


def _call_batched(function: Callable[[Any], Any], columns: dict[str, list[Any]], batch: list[Record]) -> Any:
    if not batch:
        return []
    needed = (
        f"With batched=True it gets columns, {{{next(iter(columns), '...')!r}: [...], ...}}, and must return a list of "
        f"{len(batch)} rows or texts; a function written for one row is called without batched=True"
    )
    where = f"the batch that begins with {batch[0][0]}"
    try:
        results = function(columns)
    except Exception as error:
        raise ValueError(f"{where}: {_failed(error)}. {needed}") from error
    if isinstance(results, list | tuple) and len(results) == len(batch):
        return results
    returned = f"one {type(results).__name__}"
    if isinstance(results, list | tuple):
        returned = f"{len(results)} results"
    elif isinstance(results, str):
        returned = f"one text of {len(results)} characters (which is no list of {len(results)} texts)"
    raise ValueError(f"{where}: the formatting function returned {returned} for a batch of {len(batch)}. {needed}")


def _failed(error: Exception) -> ValueError:
    fault = ValueError(f"the formatting function failed with {type(error).__name__}: {error}")
    fault.__cause__ = error
    return fault


def _as_record(result: Any) -> Any:
    return {"text": result} if isinstance(result, str) else result


# --- converting -------------------------------------------------------------------------------------------------------


def to_row(record: Any, where: str = "row") -> Row:
    """A row of one of the three shapes, made of a record of any known shape; the record stays as it is.

    A ValueError instead of a record is what files.py yields for a record that could not be read.

    Raises:
        ValueError: beginning with `where`; the record has no known shape, or one that is malformed.
    """
    if isinstance(record, ValueError):
        raise ValueError(f"{where}: {record}") from record.__cause__
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a row must be a JSON object, found {type(record).__name__}")
    row = {name: value for name, value in record.items() if value is not None}
    try:
        for name in JSON_COLUMNS:
            if isinstance(row.get(name), str):
                row[name] = _parse_column(name, row[name])
        row = _convert(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    check_row(row, where)
    return row


def _parse_column(name: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a list, or the JSON text of one: {error}") from None


def _convert(row: Row) -> Row:
    if "messages" in row:
        return row | {"messages": _to_messages(row["messages"], "messages")}
    if "prompt" in row and "completion" in row:
        return row | {key: _to_messages(row[key], key) for key in ("prompt", "completion")}
    if "conversations" in row:
        _refuse_loss(row)
        messages = _to_messages(row.pop("conversations"), "conversations")
        _check_messages(messages, "conversations")  # here, because the user knows it by this name
        return row | {"messages": messages}
    if "instruction" in row and "output" in row:
        _refuse_loss(row)
        return _from_alpaca(row)
    if "text" not in row:
        found = ", ".join(map(repr, row)) or "nothing"
        raise ValueError(
            f"found {found}, but rows have messages, prompt and completion, conversations, instruction and output, or "
            "text; a function handed over as `formatting` can make one of these"
        )
    return row


def _refuse_loss(row: Row) -> None:
    """Some tools put a system message or earlier turns beside these shapes; to overlook them would lose text."""
    for name in ("system", "history"):
        if row.get(name):
            raise ValueError(f"has a column {name!r} beside its turns, which would be lost; make messages of them all")


def _from_alpaca(row: Row) -> Row:
    parts = {name: row.pop(name, "") for name in ("instruction", "input", "output")}
    for name, part in parts.items():
        _check_text(part, name)
    question = "\n\n".join(filter(None, (parts["instruction"], parts["input"])))
    return row | {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": parts["output"]}]
    }


def _to_messages(messages: Any, key: str) -> Any:
    """Messages with role and content, of messages with from and value. What is no list of messages stays as it is."""
    if not isinstance(messages, list):
        return messages
    return [
        _to_message(message, f"{key}[{index}]") if isinstance(message, Mapping) else message
        for index, message in enumerate(messages)
    ]


def _to_message(message: Mapping[str, Any], where: str) -> Row:
    rest = {name: value for name, value in message.items() if value is not None}
    role, content = rest.pop("role", None), rest.pop("content", None)
    role, content = rest.pop("from", role), rest.pop("value", content)
    if content is None and "tool_calls" in rest:  # OpenAI's format has null there
        content = ""
    if isinstance(role, str):
        role = ALIASES.get(role, role)
    return {"role": role, "content": _join(content, where)} | rest


def _join(content: Any, where: str) -> Any:
    """[{"type": "text", "text": "a"}, ...] -> "a..."; anything else stays as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where} holds a part of type {kind!r}; only parts with a text can be trained on")
        texts.append(part["text"])
    return "".join(texts)


# --- checking ---------------------------------------------------------------------------------------------------------


def check_row(row: Any, where: str = "row") -> None:
    """Raise ValueError, beginning with `where`, unless `row` has one of the three shapes."""
    try:
        _check_row(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_row(row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, found {type(row).__name__}")
    if "messages" in row:
        _check_messages(row["messages"], "messages")
    elif "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError("prompt and completion must both be text or both be lists of messages")
        for key in ("prompt", "completion"):
            (_check_text if isinstance(prompt, str) else _check_messages)(row[key], key)
    elif "text" in row:
        _check_text(row["text"], "text")
    else:
        _refuse_shape(row)
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        if not isinstance(row.get(name), kind | None):
            raise ValueError(f"{name} must be a {kind.__name__}, found {type(row[name]).__name__}")


def _refuse_shape(row: Row) -> NoReturn:
    found = ", ".join(map(repr, row)) or "nothing"
    raise ValueError(
        f"needs 'messages', 'prompt' and 'completion', or 'text'; found {found} (read_dataset converts other formats)"
    )


def _check_messages(messages: Any, key: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key} must be a non-empty list of messages")
    for index, message in enumerate(messages):
        where = f"{key}[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where} must be an object with 'role' and a text 'content'")
        if message.get("role") not in ROLES:
            raise ValueError(f"{where} has role {message.get('role')!r}; choose from {', '.join(ROLES)}")
        _check_text(message["content"], where)


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{what} must be text, found {type(text).__name__}")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half a character ({text[error.start]!a} at position {error.start}), which is no text; "
            "the data set was cut or escaped wrongly there"
        ) from None
