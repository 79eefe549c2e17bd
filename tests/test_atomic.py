"""atomic_file and atomic_folder: whatever goes wrong, the old content is whole and nothing temporary is left.

What can go wrong is an exception inside the `with` block (an error of the program, Ctrl-C, a full disk), and one
between the block and the end: flushing to the disk, the renames.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from minift import atomic
from minift.atomic import atomic_file, atomic_folder

FULL_DISK = OSError(errno.ENOSPC, "No space left on device")
ERRORS = [RuntimeError("a bug"), KeyboardInterrupt(), FULL_DISK, SystemExit(1)]


def error_name(error: BaseException) -> str:
    return type(error).__name__


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    """Sets the mask of new files' permissions, and puts the old one back."""
    before = os.umask(0o022)

    def set_mask(mask: int) -> None:
        os.umask(mask)

    yield set_mask
    os.umask(before)


def tree(folder: Path) -> dict[str, str | None]:
    """Everything below a folder, hidden things too: path -> content (None for a folder)."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def old_file(folder: Path) -> Path:
    path = folder / "target"
    path.write_text("old")
    return path


def old_folder(folder: Path) -> Path:
    path = folder / "target"
    (path / "deep").mkdir(parents=True)
    (path / "gone").write_text("old")
    (path / "deep" / "kept").write_text("old")
    return path


def write_file(place: Path) -> None:
    place.write_text("new")


def write_folder(place: Path) -> None:
    (place / "deep" / "deeper").mkdir(parents=True)
    (place / "first").write_text("new")
    (place / "deep" / "deeper" / "second").write_text("new")


Make = Callable[[Path], Path]
Open = Callable[[Path], AbstractContextManager[Path]]
Write = Callable[[Path], None]
KINDS = [
    pytest.param(old_file, atomic_file, write_file, id="file"),
    pytest.param(old_folder, atomic_folder, write_folder, id="folder"),
]


@pytest.mark.parametrize(("make", "open_", "write"), KINDS)
@pytest.mark.parametrize("there_before", [True, False])
@pytest.mark.parametrize("half_written", [True, False])
@pytest.mark.parametrize("error", ERRORS, ids=error_name)
def test_error_inside(
    tmp_path: Path, make: Make, open_: Open, write: Write, error: BaseException, half_written: bool, there_before: bool
):
    target = make(tmp_path) if there_before else tmp_path / "target"
    before = tree(tmp_path)
    with pytest.raises(type(error)) as caught, open_(target) as place:
        if half_written:
            write(place)
        raise error
    assert caught.value is error
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("make", "open_", "write"), KINDS)
@pytest.mark.parametrize("there_before", [True, False])
@pytest.mark.parametrize("error", ERRORS, ids=error_name)
def test_error_while_flushing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Make,
    open_: Open,
    write: Write,
    error: BaseException,
    there_before: bool,
):
    """A full disk often shows only when the data is flushed."""
    target = make(tmp_path) if there_before else tmp_path / "target"
    before = tree(tmp_path)

    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(type(error)), open_(target) as place:
        write(place)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", ERRORS, ids=error_name)
@pytest.mark.parametrize("nth", [0, 1])
def test_error_while_renaming_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, error: BaseException):
    """Replacing takes two renames, the old folder aside and the new one in; if one fails, the old folder is back."""
    target = old_folder(tmp_path)
    before = tree(tmp_path)
    rename, calls = Path.rename, []

    def fail(self: Path, to: Path) -> Path:
        calls.append(to)
        if len(calls) == nth + 1:
            raise error
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)), atomic_folder(target) as place:
        write_folder(place)
    assert len(calls) > nth, "no rename was stopped: this test has to follow the code"
    assert tree(tmp_path) == before


def test_error_while_renaming_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = old_file(tmp_path)

    def fail(self: Path, to: Path) -> Path:
        raise FULL_DISK

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"), atomic_file(target) as place:
        write_file(place)
    assert tree(tmp_path) == {"target": "old"}


@pytest.mark.parametrize(("make", "open_", "write"), KINDS)
def test_old_content_is_readable_until_the_end(tmp_path: Path, make: Make, open_: Open, write: Write):
    target = make(tmp_path)
    before = tree(target) if target.is_dir() else target.read_text()
    with open_(target) as place:
        assert place != target and place.parent == tmp_path, "beside the target: a rename across disks copies"
        write(place)
        assert (tree(target) if target.is_dir() else target.read_text()) == before


def test_file_is_replaced(tmp_path: Path):
    target = old_file(tmp_path)
    with atomic_file(target) as place:
        write_file(place)
    assert tree(tmp_path) == {"target": "new"}


def test_folder_is_replaced_as_a_whole(tmp_path: Path):
    """Only the new files are there: an old shard or checkpoint part would be read along with them."""
    target = old_folder(tmp_path)
    with atomic_folder(target) as place:
        assert tree(place) == {}
        write_folder(place)
    assert tree(tmp_path) == {
        "target": None,
        "target/first": "new",
        "target/deep": None,
        "target/deep/deeper": None,
        "target/deep/deeper/second": "new",
    }


@pytest.mark.parametrize(("make", "open_", "write"), KINDS)
def test_parent_folders_are_made(tmp_path: Path, make: Make, open_: Open, write: Write):
    target = tmp_path / "not" / "there" / "yet"
    with open_(target) as place:
        write(place)
    assert target.exists() and len(list(target.parent.iterdir())) == 1


def test_nothing_written_is_an_error(tmp_path: Path):
    """A file that was never written must not replace, or remove, the old one."""
    target = old_file(tmp_path)
    with pytest.raises(FileNotFoundError), atomic_file(target):
        pass
    assert tree(tmp_path) == {"target": "old"}


def test_data_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Otherwise a power cut may leave a name without its data. The folder's files are flushed one by one."""
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def log_fsync(descriptor: int) -> None:
        events.append("flush")
        fsync(descriptor)

    def log_rename(self: Path, to: Path) -> Path:
        events.append("rename")
        return rename(self, to)

    def log_replace(self: Path, to: Path) -> Path:
        events.append("rename")
        return replace(self, to)

    monkeypatch.setattr(atomic.os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "rename", log_rename)
    monkeypatch.setattr(Path, "replace", log_replace)
    with atomic_file(tmp_path / "file") as place:
        write_file(place)
    assert events[:2] == ["flush", "rename"]
    events.clear()
    with atomic_folder(tmp_path / "folder") as place:
        write_folder(place)
    assert events[:3] == ["flush", "flush", "rename"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, umask: Callable[[int], None], mask: int):
    """Temporary folders, and files that safetensors writes, are readable by their owner only; results are not."""
    umask(mask)
    with atomic_file(tmp_path / "file") as place:
        write_file(place)
    with atomic_folder(tmp_path / "folder") as place:
        write_folder(place)
        (place / "first").chmod(0o600)
    assert permissions(tmp_path / "file") == 0o666 & ~mask
    assert permissions(tmp_path / "folder") == permissions(tmp_path / "folder" / "deep") == 0o777 & ~mask
    assert permissions(tmp_path / "folder" / "first") == 0o666 & ~mask
    assert permissions(tmp_path / "folder" / "deep" / "deeper" / "second") == 0o666 & ~mask
    current = os.umask(0o022)
    assert current == mask, "reading the umask must not change it"
