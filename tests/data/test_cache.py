"""The token cache: equal to `encode`, row by row; a second call opens what the first one wrote, and only that.

What must change the key is checked one by one. Processes are real ones, so that what is sent to them is, too.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minift.data import cache as cache_module
from minift.data.cache import cache_key, cache_size, encode_cached
from minift.data.drafts import BATCH
from minift.data.encode import RowError, encode, encode_rows
from minift.data.store import TokenStore, write_store
from minift.data.tokenizer import Tokenizer

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
EMPTY = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}
ANSWERS = ["Paris.", "\n\nTwo lines.", "Grüße 世界 🙂", "ends <|im_end|> here", "don't", " "]


def conversation(number: int) -> dict[str, Any]:
    """No two alike; every sixth spells a control token, every sixth answer says nothing."""
    turns = [("user", f"Question {number}?"), ("assistant", ANSWERS[number % 6])] * (1 + number % 2)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


ROWS = [conversation(number) for number in range(BATCH + 300)]
GOOD = [row for row in ROWS if row["messages"][-1]["content"].strip()]  # two chunks


@pytest.fixture
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer(tiny)


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, nothing can be encoded."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("encoded again")

    return lambda: monkeypatch.setattr(cache_module, "encode_named", refuse)


# --- what comes back


@pytest.mark.parametrize("special_in_text", [False, True])
def test_equal_to_encode_row_by_row(tokenizer: Tokenizer, tmp_path: Path, special_in_text: bool):
    theirs = [encode(tokenizer, row, "assistant", 60, special_in_text=special_in_text) for row in GOOD]
    ours = encode_cached(tokenizer, GOOD, "assistant", 60, special_in_text, tmp_path)
    assert list(ours) == theirs
    assert max(map(len, theirs)) == 60, "max_length must have cut something"


@pytest.mark.parametrize("setting", [None, "true"])
def test_the_setting_of_the_tokenizers_library_comes_back(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, setting: str | None
):
    if setting is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    else:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", setting)
    encode_cached(tokenizer, [ROW])
    with pytest.raises(RowError):
        encode_cached(tokenizer, [EMPTY])
    assert os.environ.get("TOKENIZERS_PARALLELISM") == setting


def test_no_tokenizer_is_used_by_two_threads_at_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    busy: dict[int, int] = {}
    original = cache_module.encode_named

    def watched(tokenizer: Tokenizer, *rest: Any) -> Any:
        busy[id(tokenizer)] = busy.get(id(tokenizer), 0) + 1
        assert busy[id(tokenizer)] == 1
        time.sleep(0.05)  # long enough for the other thread to begin
        yield from original(tokenizer, *rest)
        busy[id(tokenizer)] -= 1

    monkeypatch.setattr(cache_module, "encode_named", watched)
    assert len(encode_cached(tokenizer, [ROW] * 4 * BATCH)) == 4 * BATCH
    assert len(busy) == 2, "both threads must have had something to do"


def test_equal_in_two_processes(tiny: Path):
    """The tokenizer is no longer what its folder says."""
    tokenizer = Tokenizer(tiny)
    (added,) = tokenizer.add_tokens(["Question"], special=False)
    tokenizer.template = (tokenizer.template or "") + "{{ 'The end' }}"
    theirs = [encode(tokenizer, row) for row in GOOD]
    assert list(encode_cached(tokenizer, GOOD, processes=2)) == theirs
    assert added in theirs[0].input_ids and tokenizer.decode(theirs[0].input_ids).endswith("The end")


def test_equal_in_memory(tokenizer: Tokenizer):
    ours = encode_cached(tokenizer, (row for row in GOOD), "all")  # rows may come from a generator
    assert ours.path is None and list(ours) == encode_rows(tokenizer, GOOD, "all")


def test_rows_are_dropped_as_by_encode_rows(tokenizer: Tokenizer, tmp_path: Path):
    ours = encode_cached(tokenizer, ROWS, cache=tmp_path, drop=True)
    assert list(ours) == encode_rows(tokenizer, GOOD) and len(ours) < len(ROWS)


def test_no_rows(tokenizer: Tokenizer, tmp_path: Path):
    assert list(encode_cached(tokenizer, [], cache=tmp_path, processes=2)) == []
    assert list(encode_cached(tokenizer, [])) == []


# --- the second time


def test_the_second_call_encodes_nothing(
    tokenizer: Tokenizer, tiny: Path, tmp_path: Path, no_encoding: Callable[[], None], capfd: pytest.CaptureFixture[str]
):
    first = encode_cached(tokenizer, GOOD, cache=tmp_path / "a" / "b")
    assert first.path is not None
    size = f"{first.path.stat().st_size / 1e6:.1f} MB"
    said = f"{first.path}: {len(GOOD)} rows in {size}; the cache now holds 1 stores in {size}\n"
    assert capfd.readouterr().err == said
    no_encoding()
    second = encode_cached(Tokenizer(tiny), [*GOOD], cache=str(tmp_path / "a" / "b"))
    assert list(second) == list(first) and second.path == first.path
    assert capfd.readouterr().err == ""
    with pytest.raises(AssertionError, match="encoded again"):
        encode_cached(tokenizer, GOOD[1:], cache=tmp_path / "a" / "b")


def test_stores_stay_and_are_counted(tokenizer: Tokenizer, tmp_path: Path):
    paths = [encode_cached(tokenizer, [ROW], cache=tmp_path, max_length=length).path for length in (500, 600, 500)]
    (tmp_path / f".{'a' * 64}.tokens.17.part").write_bytes(b"left by a run that was killed")
    (tmp_path / "notes.txt").write_text("not ours")
    assert paths[0] == paths[2] != paths[1]
    sizes = [path.stat().st_size for path in paths[:2] if path is not None]
    assert cache_size(tmp_path) == (2, sum(sizes) + 29)


def key(tokenizer: Tokenizer, rows: list[Any], **changed: Any) -> str:
    options = {"loss_on": "all", "max_length": 8, "special_in_text": False, "drop": False} | changed
    return cache_key(tokenizer, rows, **options)


def without_template(tokenizer: Tokenizer) -> None:
    tokenizer.template = None


@pytest.mark.parametrize(
    ("rows", "changed", "change"),
    [
        ([ROW], {"loss_on": "completion"}, None),
        ([ROW], {"max_length": None}, None),
        ([ROW], {"max_length": 80}, None),
        ([ROW], {"special_in_text": True}, None),
        ([ROW], {"drop": True}, None),
        ([ROW], {}, without_template),
        ([ROW], {}, lambda tokenizer: tokenizer.add_tokens(["Hi"])),
        ([ROW], {}, lambda tokenizer: tokenizer.special.update(bos_token="x")),
        ([], {}, None),
        ([ROW, ROW], {}, None),
        ([ROW | {"id": 1}], {}, None),
        ([{"messages": [dict(reversed(message.items())) for message in ROW["messages"]]}], {}, None),
        ([{"messages": tuple(ROW["messages"])}], {}, None),
    ],
)
def test_what_changes_the_tokens_changes_the_key(
    tiny: Path, rows: list[Any], changed: dict[str, Any], change: Callable[[Tokenizer], Any] | None
):
    before = key(Tokenizer(tiny), [ROW])
    tokenizer = Tokenizer(tiny)
    if change:
        change(tokenizer)
    assert key(tokenizer, rows, **changed) != before


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([{"text": "ab"}, {"text": "c"}], [{"text": "a"}, {"text": "bc"}]),
        ([{"x": 1}], [{"x": True}]),
        ([{"x": 1}], [{"x": 1.0}]),
        ([{"x": 1}], [{"x": "1"}]),
        ([{"x": {1: 2}}], [{"x": {"1": 2}}]),
        ([{"x": np.int64(1)}], [{"x": np.int64(2)}]),
        ([{"x": "\ud800"}], [{"x": "\ud801"}]),
        ([[1], [2]], [[1, 2]]),
    ],
)
def test_rows_that_differ_have_different_keys(tokenizer: Tokenizer, first: list[Any], second: list[Any]):
    assert key(tokenizer, first) != key(tokenizer, second)


def test_equal_rows_have_equal_keys_whatever_their_objects(tokenizer: Tokenizer):
    """A text that is one object in two places, or one that Python keeps only once, is a text like others."""
    word = "".join(["us", "er"])
    shared, apart = [{"text": word, "x": word}], [{"text": "user", "x": "".join(["u", "ser"])}]
    assert shared[0]["text"] is not apart[0]["text"]
    assert key(tokenizer, shared) == key(tokenizer, apart)


def test_another_process_finds_the_same_key(tokenizer: Tokenizer, tiny: Path):
    code = (
        "import sys; from pathlib import Path; from minift.data.cache import cache_key;"
        "from minift.data.tokenizer import Tokenizer;"
        f"print(cache_key(Tokenizer(Path(sys.argv[1])), [{ROW!r}], 'all', 8, False, False))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        timeout=60,
        check=True,
    )
    tokenizer.encode("used", special_in_text=False)  # what a tokenizer was used for does not count
    assert done.stdout.strip() == key(tokenizer, [ROW])


def test_a_template_that_asks_for_the_date(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date(2999, 1, 1)

    plain, template = key(tokenizer, [ROW]), tokenizer.template or ""
    tokenizer.template = "{{ strftime_now('%d %b %Y') }}" + template
    dated = key(tokenizer, [ROW])
    monkeypatch.setattr(cache_module, "date", Tomorrow)
    assert key(tokenizer, [ROW]) != dated
    tokenizer.template = template
    assert key(tokenizer, [ROW]) == plain


def test_a_changed_program_makes_a_new_store(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Students change encode.py and run again."""
    before = key(tokenizer, [ROW])
    assert {"encode.py", "drafts.py", "spans.py", "chat.py"} <= {path.name for path in cache_module.CODE}
    copies = [Path(shutil.copy(path, tmp_path)) for path in cache_module.CODE]
    monkeypatch.setattr(cache_module, "CODE", copies)
    assert key(tokenizer, [ROW]) == before
    copies[-1].write_text(copies[-1].read_text() + "\n")
    assert key(tokenizer, [ROW]) != before


# --- what goes wrong


@pytest.mark.parametrize("processes", [1, 2])
def test_a_refused_row_is_named_and_nothing_is_left(tokenizer: Tokenizer, tmp_path: Path, processes: int):
    rows = [*GOOD[: BATCH + 1], EMPTY, ROW, EMPTY]
    with pytest.raises(RowError) as theirs:
        encode_rows(tokenizer, rows)
    with pytest.raises(RowError, match=rf"^row {BATCH + 2}: the assistant says nothing in message 2") as ours:
        encode_cached(tokenizer, rows, cache=tmp_path, processes=processes)
    assert str(ours.value) == str(theirs.value) and ours.value.reason == theirs.value.reason
    assert [*tmp_path.iterdir()] == []


def test_a_damaged_store_is_named_not_used(tokenizer: Tokenizer, tmp_path: Path):
    path = encode_cached(tokenizer, [ROW], cache=tmp_path).path
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=re.escape(str(path)) + " is damaged"):
        encode_cached(tokenizer, [ROW], cache=tmp_path)


def test_bad_arguments(tokenizer: Tokenizer, tmp_path: Path):
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        encode_cached(tokenizer, [ROW], processes=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"the cache must be a folder, and .*file is a file"):
        encode_cached(tokenizer, [ROW], cache=tmp_path / "file")
    with pytest.raises(ValueError, match="unknown loss_on 'none'"):
        encode_cached(tokenizer, [ROW], "none", cache=tmp_path)  # pyright: ignore[reportArgumentType]


class Deadly:
    """Ends the process that receives it."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_a_process_that_dies_is_not_waited_for(tokenizer: Tokenizer):
    with pytest.raises(RuntimeError, match="ended abruptly: memory ran out, or the script does not say"):
        encode_cached(tokenizer, [*GOOD, ROW | {"x": Deadly()}], processes=2)


# --- more than one at a time

SCRIPT = """
import sys
from pathlib import Path
from minift.data.cache import encode_cached
from minift.data.tokenizer import Tokenizer

if __name__ == "__main__":
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello " * 50}]}
    tokenizer, cache, count, processes = Tokenizer(Path(sys.argv[1])), sys.argv[2], *map(int, sys.argv[3:])
    print(len(encode_cached(tokenizer, [row | {"id": i} for i in range(count)], cache=cache, processes=processes)))
"""


def start(folder: Path, tiny: Path, count: int, processes: int) -> subprocess.Popen:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, tiny, folder / "cache", str(count), str(processes)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def test_two_that_want_the_same_store_both_get_it(tiny: Path, tmp_path: Path):
    runs = [start(tmp_path, tiny, 2 * BATCH, processes=1) for _ in range(2)]
    for run in runs:
        out, errors = run.communicate(timeout=60)
        assert (out, run.returncode) == (f"{2 * BATCH}\n", 0), errors
    (path,) = (tmp_path / "cache").iterdir()
    TokenStore.open(path).verify()


def test_where_an_open_file_cannot_be_replaced_the_other_store_is_used(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def another_is_first(path: Path, key: str, chunks: Any) -> None:
        write_store(path, key, chunks)
        raise PermissionError("in use")  # as Windows does

    def read_only(*_: Any) -> None:
        raise PermissionError("read-only folder")

    monkeypatch.setattr(cache_module, "write_store", another_is_first)
    assert list(encode_cached(tokenizer, [ROW], cache=tmp_path)) == [encode(tokenizer, ROW)]
    monkeypatch.setattr(cache_module, "write_store", read_only)
    with pytest.raises(PermissionError, match="read-only"):
        encode_cached(tokenizer, [ROW, ROW], cache=tmp_path)


def alive(session: int) -> list[str]:
    """Commands of the processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((stat.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:  # ended meanwhile
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("number", "wait"),
    [(signal.SIGINT, 0.3), (signal.SIGINT, 3), (signal.SIGKILL, 3)],
    ids=["Ctrl-C at once", "Ctrl-C", "killed"],
)
def test_a_run_that_is_stopped_leaves_no_process_and_no_store(
    tiny: Path, tmp_path: Path, number: signal.Signals, wait: float
):
    run = start(tmp_path, tiny, 160 * BATCH, processes=2)
    deadline = time.monotonic() + 60
    while not [command for command in alive(run.pid) if "spawn_main" in command]:
        assert run.poll() is None and time.monotonic() < deadline, "no process was started"
        time.sleep(0.01)
    time.sleep(wait)  # they are importing, or at work
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # a terminal sends it to all
    else:
        run.kill()
    _, errors = run.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while alive(run.pid):
        assert time.monotonic() < deadline, alive(run.pid)
        time.sleep(0.05)
    assert run.returncode != 0, "it was done before it was stopped"
    left = [path.name for path in tmp_path.glob("cache/*")]
    if number == signal.SIGINT:
        assert left == [] and errors.count("KeyboardInterrupt") == 1, errors
    else:
        assert all(name.endswith(".part") for name in left)
