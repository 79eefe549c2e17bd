"""A token cache: a large data set is encoded once, and every later run starts at once.

    rows, tokenizer, template, options --SHA-256--> name --is it there?--> yes: open it (store.py), milliseconds
                                                                           no:  encode, write, open

The name of a store is the hash of everything that its tokens follow from: the rows, the tokenizer, the template, the
options, the code that encodes and the versions of the libraries that it calls. If any of these changes, so does the
name, and a store is never out of date. Rows are hashed as they stand, keys in their order: a template can see it (tools
are written in it). If the template asks for the date, the day is part of the name.

Two runs that need the same store at the same time both make it. Each writes aside and renames; the second one replaces
the first one's by its copy, and who has that open keeps it. Stores are never deleted, and what the cache holds is said
when one is added.

Rows are encoded in chunks. Half of the work is the template's, in Python, which one thread at a time can run; the other
half is the tokenizer's, which needs no Python. So two threads, each with a tokenizer, keep two cores busy: one renders
while the other encodes. More cores need more processes. Each is a Python of its own that imports this library, which
takes seconds and some 200 MB.

Left out: finding rows again that are the same in a changed data set.
"""

import hashlib
import marshal
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minift.data.chat import plain
from minift.data.drafts import BATCH
from minift.data.encode import LossOn, RowError, encode_named
from minift.data.formats import Row
from minift.data.store import VERSION, Chunk, TokenStore, flat, write_store
from minift.data.tokenizer import Tokenizer

SUFFIX = ".tokens"
CODE = sorted(Path(__file__).parent.glob("*.py"))  # read by students who change it
LIBRARIES = ("tokenizers", "jinja2")
PARALLELISM = "TOKENIZERS_PARALLELISM"  # the tokenizers library asks for it at each call


def encode_cached(
    tokenizer: Tokenizer,
    rows: Iterable[Row],
    loss_on: LossOn = "completion",
    max_length: int | None = None,
    special_in_text: bool = False,
    cache: str | Path | None = None,
    processes: int = 1,
    drop: bool = False,
) -> TokenStore:
    """The examples of `encode_rows`, in a store.

    Args:
        rows: without a cache they may come from a generator, and are in memory a chunk at a time.
        loss_on, max_length, special_in_text, drop: see `encode_rows`.
        cache: folder of stores, made if it is missing. A store for exactly this is opened; otherwise it is made, and
            its size said on stderr. None: the store is in memory.
        processes: 1 is this one, with two threads; more are started anew, each with one. That needs a script that can
            be imported: `if __name__ == "__main__":` around what it does.

    Raises:
        ValueError: as `encode_rows`; a damaged store, by its name; processes < 1; a cache that is a file.
        RuntimeError: a process ended abruptly.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if cache is not None:  # they are read twice: for the key, and to encode
        rows = rows if isinstance(rows, list | tuple) else list(rows)
    job = _Job(tokenizer, loss_on, max_length, special_in_text, drop)
    with closing(_encode(job, rows, processes)) as chunks:
        if cache is None:
            return TokenStore.from_chunks(chunks)
        key = cache_key(tokenizer, rows, loss_on, max_length, special_in_text, drop)
        store = find(cache, key)
        return keep(cache, key, chunks) if store is None else store


def find(cache: str | Path, key: str) -> TokenStore | None:
    """The store for this key, if there is one.

    Raises:
        ValueError: a damaged store, by its name; a cache that is a file.
    """
    if Path(cache).is_file():
        raise ValueError(f"the cache must be a folder, and {cache} is a file")
    path = Path(cache) / f"{key}{SUFFIX}"
    return TokenStore.open(path, key) if path.exists() else None


def keep(cache: str | Path, key: str, chunks: Iterable[Chunk]) -> TokenStore:
    """Write a store and open it; its size, and that of the cache, are said on stderr."""
    path = Path(cache) / f"{key}{SUFFIX}"
    try:
        write_store(path, key, chunks)
    except PermissionError:  # Windows: another run was first, and has it open
        if not path.exists():
            raise
    store, (count, size) = TokenStore.open(path, key), cache_size(cache)
    print(
        f"{path}: {len(store):,} rows in {path.stat().st_size / 1e6:,.1f} MB; the cache now holds {count:,} stores in "
        f"{size / 1e6:,.1f} MB",
        file=sys.stderr,
    )
    return store


def cache_key(
    tokenizer: Tokenizer,
    rows: Iterable[Row],
    loss_on: LossOn,
    max_length: int | None,
    special_in_text: bool,
    drop: bool,
) -> str:
    """SHA-256, in hex, of everything that the tokens follow from."""
    digest = hashlib.sha256()
    template = tokenizer.template
    today = date.today().isoformat() if "strftime_now" in (template or "") else None
    digest.update(_bytes([VERSION, today, *map(version, LIBRARIES), *(path.read_bytes() for path in CODE)]))
    digest.update(_bytes([loss_on, max_length, special_in_text, drop]))
    digest.update(_bytes([tokenizer.backend.to_str(), template, tokenizer.special]))
    for row in rows:
        digest.update(_bytes(row))
    return digest.hexdigest()


def cache_size(cache: str | Path) -> tuple[int, int]:
    """How many stores a folder holds, and their bytes; what a killed run left behind counts as bytes."""
    stores = [*Path(cache).glob(f"*{SUFFIX}")]
    left_behind = Path(cache).glob(f".*{SUFFIX}.*.part")
    return len(stores), sum(path.stat().st_size for path in chain(stores, left_behind))


def _bytes(value: Any) -> bytes:
    """Equal for equal values only, and different from how any other value begins, so that they can be written behind
    each other. Version 2 of Python's own format: types are kept apart, (1,) from [1] and 1 from True, and there are no
    references to what was written before. It is never read."""
    try:
        return marshal.dumps(value, 2)
    except ValueError:  # dates, arrays, ...: as a template sees them
        return marshal.dumps(plain(value), 2)


# --- chunks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Refused:
    """A RowError on its way from one process to another: it is made of three things and shows one of them."""

    message: str
    reason: str


@dataclass(frozen=True)
class _Job:
    """What is the same for all chunks. A process is sent it once."""

    tokenizer: Tokenizer
    loss_on: LossOn
    max_length: int | None
    special_in_text: bool
    drop: bool

    def encode(self, first: int, rows: Sequence[Row]) -> Chunk | _Refused:
        """The chunk that begins with row number `first`."""
        named = ((f"row {number}", row) for number, row in enumerate(rows, start=first))
        options = self.loss_on, self.max_length, self.special_in_text, self.drop
        try:
            return flat([*encode_named(self.tokenizer, named, *options)])
        except RowError as error:
            return _Refused(str(error), error.reason)


def _encode(job: _Job, rows: Iterable[Row], processes: int) -> Generator[Chunk, None, None]:
    """The chunks in order, with a progress bar on a terminal."""
    total = len(rows) if isinstance(rows, Sized) else None
    if total is not None:
        processes = min(processes, -(-total // BATCH))
    batches = _batches(rows)
    results = _in_threads(job, batches) if processes < 2 else _in_processes(job, batches, processes)
    with closing(results), tqdm(total=total, desc="Encoding", unit=" rows", disable=None, leave=False) as bar:
        for chunk in results:
            if isinstance(chunk, _Refused):
                where, _, message = chunk.message.partition(": ")
                raise RowError(where, chunk.reason, message)
            yield chunk
            bar.update(BATCH if total is None else min(BATCH, total - bar.n))


def _batches(rows: Iterable[Row]) -> Iterator[tuple[int, list[Row]]]:
    """(number of the first row, rows) of each chunk."""
    remaining, first = iter(rows), 1
    while batch := list(islice(remaining, BATCH)):
        yield first, batch
        first += len(batch)


def _in_threads(job: _Job, batches: Iterator[tuple[int, list[Row]]]) -> Generator[Chunk | _Refused, None, None]:
    free = [job, replace(job, tokenizer=deepcopy(job.tokenizer))]  # a tokenizer is not for two threads at once

    def work(first: int, rows: Sequence[Row]) -> Chunk | _Refused:
        mine = free.pop()
        try:
            return mine.encode(first, rows)
        finally:
            free.append(mine)

    with _one_core_for_the_tokenizer(), ThreadPoolExecutor(len(free)) as pool:
        yield from _in_order(pool, work, batches, len(free))


def _in_processes(
    job: _Job, batches: Iterator[tuple[int, list[Row]]], processes: int
) -> Generator[Chunk | _Refused, None, None]:
    # Never a fork of this process: its threads (the tokenizer's, PyTorch's) would be missing, their locks locked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(job,)) as pool:
        try:
            yield from _in_order(pool, _work, batches, processes)
        except BrokenProcessPool:
            raise RuntimeError(
                "a process that encodes ended abruptly: memory ran out, or the script does not say "
                'if __name__ == "__main__": around what it does; processes=1 needs neither'
            ) from None


def _in_order(
    pool: Executor, work: Callable[..., Any], batches: Iterator[tuple[int, list[Row]]], workers: int
) -> Generator[Any, None, None]:
    waiting = deque()  # a few a worker: all at once would be a second copy of the data
    try:
        for batch in batches:
            with _ctrl_c_later():  # a process may be started
                waiting.append(pool.submit(work, *batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal. Those that are started meanwhile do not hear it, this one afterwards,
    and it tells them: otherwise one that is still importing would end in a traceback of its own."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_core_for_the_tokenizer() -> Iterator[None]:
    """For a while, calls of the tokenizer do not start threads of their own."""
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        yield
    finally:
        del os.environ[PARALLELISM]
        if before is not None:
            os.environ[PARALLELISM] = before


_job: _Job | None = None  # of a process that encodes


def _begin(job: _Job) -> None:
    global _job
    _job = job
    os.environ[PARALLELISM] = "false"  # a process is one core's work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows; elsewhere it does not come
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process that was killed cannot tell the others, and they would wait for ever."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _work(first: int, rows: Sequence[Row]) -> Chunk | _Refused:
    assert _job is not None
    return _job.encode(first, rows)
