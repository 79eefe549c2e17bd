"""Encoded documents in flat arrays, in memory or mapped from a file.

A list of Python integers takes some 36 bytes a token, and as long to make as the tokens took to find. A store keeps the
tokens of all documents behind each other in one array that is mapped, not read: opening a million documents takes
milliseconds, and only the pages that a batch touches come into memory.

    file       header | tokens, int32                    | offsets, int64
    tokens     5  17 ~9 ~2   5  33 ~8 ~2   5 ...           0  4  8 ...
               document 0    document 1                    where each document begins, and the end

A label is the id or -100, so one bit a token says all: the sign. A trained token is stored as ~id, which is -id - 1 and
negative even for id 0.

The header is one line of JSON, filled up with spaces. It holds the numbers that the rest is checked by, and the key:
what the tokens follow from (cache.py). The file is written aside and renamed.

Left out: compression (tokens of 16 bits would take half), and stores that grow.
"""

import json
import zlib
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from minift.atomic import atomic_file
from minift.data.encode import IGNORE, Example

FORMAT, VERSION = "minift tokens", 1
HEADER = 4096  # bytes: a page, so that the tokens begin on one

Tokens = NDArray[np.int32]
Integers = NDArray[np.int64]
Chunk = tuple[Tokens, Integers]  # tokens of some documents, and how many each has


class TokenStore(Sequence[Example]):
    """Encoded documents: a sequence of Example in flat arrays. A slice is a store, too, of the same arrays.

    Attributes:
        path: the file that the tokens are mapped from; None if they are in memory.
        lengths: int64 [documents], tokens of each.
    """

    def __init__(self, tokens_n: Tokens, start_m: Integers, stop_m: Integers, path: Path | None = None):
        self._tokens_n, self._start_m, self._stop_m, self.path = tokens_n, start_m, stop_m, path
        self.lengths: Integers = stop_m - start_m

    @classmethod
    def from_examples(cls, examples: Iterable[Example]) -> "TokenStore":
        """The same documents, in memory.

        Raises:
            ValueError: a label that is neither the id nor -100.
        """
        return cls.from_chunks([flat([*examples])])

    @classmethod
    def from_chunks(cls, chunks: Iterable[Chunk]) -> "TokenStore":
        """The documents of some chunks, in memory."""
        tokens, sizes = [np.empty(0, np.int32)], []
        for tokens_n, sizes_m in chunks:
            tokens.append(tokens_n)
            sizes.append(sizes_m)
        offsets = _offsets(sizes)
        return cls(np.concatenate(tokens), offsets[:-1], offsets[1:])

    @classmethod
    def open(cls, path: str | Path, key: str | None = None) -> "TokenStore":
        """Map a store. The tokens are not read, so not checked either: see `verify`.

        Args:
            key: what the store must have been made for; None takes any.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a store, one of another version or for another key, or a damaged one.
        """
        path = Path(path)
        header = _read_header(path)
        if key not in (None, header["key"]):
            raise ValueError(f"{path} was made for another key ({header['key']}): it was renamed; delete it")
        ends = HEADER + 4 * header["tokens"]
        expected, found = ends + 8 * (header["documents"] + 1), path.stat().st_size
        if found != expected:
            raise ValueError(f"{path} is damaged: {found:,} bytes instead of {expected:,}; delete it to make it again")
        raw = np.memmap(path, mode="r")
        written = raw[ends:].tobytes()
        if zlib.crc32(written) != header["offsets_crc32"]:
            raise ValueError(f"{path} is damaged: its offsets have changed; delete it to make it again")
        offsets = np.frombuffer(written, "<i8").astype(np.int64, copy=False)
        tokens_n = np.asarray(raw[HEADER:ends]).view("<i4")  # asarray: slicing a memmap itself is slow
        return cls(tokens_n, offsets[:-1], offsets[1:], path)

    def __len__(self) -> int:
        return len(self._start_m)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenStore": ...
    def __getitem__(self, index: int | slice) -> "Example | TokenStore":
        if isinstance(index, slice):
            return TokenStore(self._tokens_n, self._start_m[index], self._stop_m[index], self.path)
        stored_n = self._tokens_n[self._start_m[index] : self._stop_m[index]]
        is_trained_n = stored_n < 0
        ids_n = np.where(is_trained_n, ~stored_n, stored_n)
        return Example(ids_n.tolist(), np.where(is_trained_n, ids_n, IGNORE).tolist())

    def verify(self) -> None:
        """Read all tokens of a store's file.

        Raises:
            ValueError: they have changed since they were written.
        """
        if self.path is None:
            return
        header, found = _read_header(self.path), 0
        with self.path.open("rb") as file:
            file.seek(HEADER)
            left = 4 * header["tokens"]
            while left and (block := file.read(min(left, 1 << 20))):
                found, left = zlib.crc32(block, found), left - len(block)
        if left or found != header["tokens_crc32"]:
            raise ValueError(f"{self.path} is damaged: its tokens have changed; delete it to make it again")


def flat(examples: Sequence[Example]) -> Chunk:
    """The chunk of some examples. Raises ValueError for a label that is neither the id nor -100, or an id below 0."""
    sizes_m = np.array([len(example) for example in examples], dtype=np.int64)
    total = int(sizes_m.sum())
    ids_n = np.fromiter(chain.from_iterable(example.input_ids for example in examples), np.int32, total)
    labels_n = np.fromiter(chain.from_iterable(example.labels for example in examples), np.int32, total)
    is_trained_n = labels_n != IGNORE
    if (labels_n[is_trained_n] != ids_n[is_trained_n]).any() or (ids_n < 0).any():
        raise ValueError(f"a store holds ids from 0 on and labels that are the id or {IGNORE}; these examples differ")
    return np.where(is_trained_n, ~ids_n, ids_n), sizes_m


def _offsets(sizes: Sequence[Integers]) -> Integers:
    return np.concatenate([np.zeros(1, np.int64), *sizes]).cumsum()


def write_store(path: str | Path, key: str, chunks: Iterable[Chunk]) -> None:
    """Write the documents of some chunks, one chunk in memory at a time. `path` is there as a whole or not at all.

    Args:
        key: what the store is made for; `TokenStore.open` asks for it.
    """
    sizes, crc = [], 0
    with atomic_file(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(bytes(HEADER))
        for tokens_n, sizes_m in chunks:
            data = tokens_n.astype("<i4", copy=False).tobytes()
            crc = zlib.crc32(data, crc)
            file.write(data)
            sizes.append(sizes_m)
        offsets = _offsets(sizes).astype("<i8", copy=False)
        file.write(offsets.tobytes())
        header = {
            "format": FORMAT,
            "version": VERSION,
            "key": key,
            "documents": len(offsets) - 1,
            "tokens": int(offsets[-1]),
            "tokens_crc32": crc,
            "offsets_crc32": zlib.crc32(offsets.tobytes()),
        }
        file.seek(0)
        file.write(json.dumps(header).encode().ljust(HEADER - 1) + b"\n")


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(HEADER)
    try:
        header = json.loads(text)
        if header["format"] != FORMAT:
            raise KeyError
        numbers = [header[name] for name in ("version", "documents", "tokens", "tokens_crc32", "offsets_crc32")]
        is_sound = isinstance(header["key"], str) and all(type(number) is int and number >= 0 for number in numbers)
        if len(text) < HEADER or not is_sound:
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a token store, or its header is damaged; delete it or move it away") from None
    if header["version"] != VERSION:
        raise ValueError(f"{path} is of version {header['version']}, and version {VERSION} is needed; delete it")
    return header
