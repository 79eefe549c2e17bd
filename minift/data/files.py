"""Files of rows: JSON Lines, JSON, CSV and Parquet, read one record after the other.

    suffix            a record is                                             errors name
    .jsonl .ndjson    a line                                                  its line
    .json             an entry of the one list that the file holds            its row number
    .csv              a line below the header, or more if a cell is quoted    its first line
    .parquet          a row                                                   its row number

A record is what stands there; what a row must look like is decided in formats.py. A record that cannot be read does not
end the reading: the fault comes in its place, so that the reader learns of all of them at once. Only a file that makes
no sense as a whole (another encoding, another format) ends it.

Lines and Parquet rows are read as they are asked for, so a large file is in memory once, as rows. A `.json` list has to
be parsed as a whole; `.jsonl` is the better format for much data.

Two things are read more exactly than `datasets.load_dataset` does, which guesses the types of a CSV file: there the
answers "007" become the number 7 and "None" or "NA" are missing. Here a cell is text, and only an empty one is missing.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

Record = tuple[str, Any]  # where it stands, what stands there (a ValueError if it cannot be read)

LISTS = ("data", "rows", "train")
MAGIC = {
    b"\x1f\x8b": "compressed (gzip): unpack it first",
    b"PK\x03\x04": "an archive or a spreadsheet: unpack it, or save the sheet as CSV (UTF-8)",
    b"PAR1": "a Parquet file: name it .parquet",
    codecs.BOM_UTF16_LE: "UTF-16 text: save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 text: save it as UTF-8",
}
PARQUET_BATCH = 1024


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield (where, record) for each record of a file; `where` is "path, line 3" or "path, row 3".

    A record that cannot be read is yielded as a ValueError that says why.

    Raises:
        FileNotFoundError: no such file, or a folder.
        ValueError: a suffix or a file that cannot be read at all.
        ImportError: a Parquet file, and pyarrow is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} has the suffix {path.suffix!r}: files of rows are {', '.join(READERS)}")
    if reader is not _parquet:
        _check_is_text(path)
    return reader(path)


def parse_json(text: str) -> Any:
    """The value that a JSON text holds.

    Raises:
        ValueError: not JSON; also for NaN and Infinity, which Python would read, for integers of more than 4300 digits
            and for thousands of nested lists, which it cannot.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ValueError(f"not valid JSON: {error.msg} ({line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("not valid JSON: lists or objects nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {str(error).partition(';')[0]}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON; write null")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _check_is_text(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(4)
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {what}")


def _lines(path: Path) -> Iterator[tuple[int, str | ValueError]]:
    """(number, line with its end) of a text file. Split at \\n only: a row may hold U+2028 and its like."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                # Windows editors write a byte order mark; further down it is a fault.
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, ValueError(f"not UTF-8 text ({error.reason} at byte {error.start} of the line)")


def _json_lines(path: Path) -> Iterator[Record]:
    first = True
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        if isinstance(line, ValueError):
            yield where, line
        elif line := line.strip():
            if first and line.startswith("["):
                raise ValueError(f"{where}: begins a JSON list, but each line must be an object; name the file .json")
            yield where, _try(parse_json, line)
            first = False


def _json(path: Path) -> Iterator[Record]:
    if _is_json_lines(path):
        yield from _json_lines(path)
        return
    for number, record in enumerate(_parse_list(path), start=1):
        yield f"{path}, row {number}", record


def _is_json_lines(path: Path) -> bool:
    """Whether a .json file is JSON Lines under another name: its first line is an object, and something follows."""
    with path.open("rb") as file:
        filled = filter(None, (line.removeprefix(codecs.BOM_UTF8).strip() for line in file))
        first = next(filled, b"")
        return first.startswith(b"{") and first.endswith(b"}") and next(filled, None) is not None


def _parse_list(path: Path) -> list[Any]:
    """A function of its own, so that the text is freed before the rows are made."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        return []
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if isinstance(value, dict) and len(value) == 1 and (name := next(iter(value))) in LISTS:
        value = value[name]
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        names = ", ".join(map(repr, value)) or "nothing"
        raise ValueError(
            f"{path} holds one JSON object (with {names}) where a list of rows is needed; "
            "read the file with json.load and hand the list that you mean to read_dataset"
        )
    raise ValueError(f"{path} holds a JSON {type(value).__name__} where a list of rows is needed")


def _csv(path: Path) -> Iterator[Record]:
    # Without `strict`, a quotation mark that is never closed would swallow the rest of the file in silence.
    reader = csv.reader(_raise_faults(path), strict=True)
    header = None
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except (csv.Error, ValueError) as error:
            advice = ": write such texts as JSON Lines" if "field limit" in str(error) else ""
            yield where, ValueError(f"not valid CSV: {error}{advice} (nothing from here on was read)")
            return
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if header is None:
            header = cells
            if len(set(header)) != len(header):
                raise ValueError(f"{where}: the header names a column twice: {', '.join(map(repr, header))}")
        elif len(cells) != len(header):
            yield where, ValueError(f"has {len(cells)} cells where the header has {len(header)}")
        else:
            yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _raise_faults(path: Path) -> Iterator[str]:
    for _, line in _lines(path):
        if isinstance(line, ValueError):
            raise line
        yield line


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ImportError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file after row {number}: {error}") from None


def _try(function: Callable[[str], Any], text: str) -> Any:
    try:
        return function(text)
    except ValueError as error:
        return error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
