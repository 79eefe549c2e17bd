"""Rows of a data set: what they may look like, and reading them from JSON Lines.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}          or both as lists of messages
    {"text": "..."}

Every row is checked when it is read, and a bad one is reported with its line.
"""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")


def read_dataset(path: str | Path) -> list[Row]:
    """Read a .jsonl file: one JSON object a line, blank lines ignored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed line or row, with its number and what is wrong, or a file without rows.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    rows = []
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the line)"
                ) from None
            if line.strip():
                rows.append(_parse(line, where))
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def _parse(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    check_row(row, where)
    return row


def check_row(row: Any, where: str = "row") -> None:
    """Raise ValueError, beginning with `where`, unless `row` has one of the shapes above."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object, found {type(row).__name__}")
    if "messages" in row:
        _check_messages(row["messages"], "messages", where)
    elif "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError(f"{where}: prompt and completion must both be text or both be lists of messages")
        if not isinstance(prompt, str):
            _check_messages(prompt, "prompt", where)
            _check_messages(completion, "completion", where)
    elif not isinstance(row.get("text"), str):
        found = ", ".join(map(repr, row)) or "nothing"
        raise ValueError(f"{where}: needs 'messages', 'prompt' and 'completion', or 'text'; found {found}")


def _check_messages(messages: Any, key: str, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: {key} must be a non-empty list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: {key}[{index}] must be an object with 'role' and a text 'content'")
        if message.get("role") not in ROLES:
            raise ValueError(
                f"{where}: {key}[{index}] has role {message.get('role')!r}; choose from {', '.join(ROLES)}"
            )
