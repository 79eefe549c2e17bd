"""Nothing is half-written: write beside the target, then rename.

A rename within one file system is atomic, so a reader (or a run that comes back after a crash, a full disk or Ctrl-C)
sees either the old state or the whole new one. The data is flushed to the disk before the rename; otherwise a power
cut could leave a name that points to nothing.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling of `folder`; on success it takes the place of `folder`, on an error it vanishes.

    An existing `folder` is replaced as a whole. Its old content is moved aside first and deleted last.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        # mkdtemp and safetensors make things readable by their owner only; a cache may serve a whole class.
        mask = _umask()
        temporary.chmod(0o777 & ~mask)
        for path in temporary.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
            if path.is_file():
                _flush(path)
        if folder.exists():
            _replace(folder, temporary)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling path to write to; on success it replaces `path`, on an error it vanishes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(folder: Path, new: Path) -> None:
    """Two renames: the old folder aside, the new one in. If the second fails, the old one comes back."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        folder.rename(aside / folder.name)
        try:
            new.rename(folder)
        except BaseException:
            (aside / folder.name).rename(folder)
            raise
    except BaseException:
        with contextlib.suppress(OSError):
            aside.rmdir()  # only if it is empty: what could not be put back stays
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The permissions that this process leaves out of new files. Reading it means setting it for a moment."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
