"""A file is there as a whole or as it was before: half a table looks like the table of a smaller class.

The course stands apart from the library, so this is its own few lines: write beside the target, then rename.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes its place at the end, and vanishes on an error or Ctrl-C."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text, in UTF-8."""
    with whole_file(path) as place:
        place.write_text(text, encoding="utf-8")
