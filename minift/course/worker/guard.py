"""What a submission may not do while it is graded: a guard rail with a clear sentence, not a wall.

An audit hook sees every file that is opened, process that is started, socket that is connected and module that is
imported, and cannot be taken out again. It stops what an honest student does by accident and what a lazy one tries
first: importing the library that holds the answer, reading the solution from the package, writing outside the folder.
Whoever writes machine code gets around it, which is why the verdict is made in another process, from raw numbers.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

# Libraries that hold the answers; the parent's scan of the source names the same ones.
ANSWERS = (
    "minift", "minift_kernels", "bitsandbytes", "peft", "trl", "transformers", "torchao", "torchtune", "litgpt",
    "accelerate", "optimum", "auto_gptq", "unsloth", "liger_kernel", "xformers", "flash_attn",
)  # fmt: skip
PROCESSES = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill",
    "os.killpg", "pty.spawn", "os.startfile",
)  # fmt: skip
NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")
# Event -> how many of its first arguments are paths that it changes.
CHANGES = {
    "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1, "os.chmod": 1, "os.chown": 1, "os.utime": 1,
    "os.rename": 2, "os.link": 2, "os.symlink": 2, "shutil.rmtree": 1, "shutil.move": 2, "shutil.copyfile": 2,
}  # fmt: skip


class Refused(PermissionError):  # noqa: N818 (a sentence for students, not an error of the judge)
    """The submission tried something that is not part of the exercise."""


def _ban(path: str, refuse: Callable[[str], NoReturn]) -> None:
    """Put a function that refuses in the place of `torch.nn.functional.gelu`, or of a method."""
    parts = path.split(".")
    owner = importlib.import_module(parts[0])
    for end in range(2, len(parts)):
        if not hasattr(owner, parts[end - 1]):
            importlib.import_module(".".join(parts[:end]))
        owner = getattr(owner, parts[end - 1])

    def refusing(*args: Any, **kwargs: Any) -> NoReturn:
        refuse(f"this exercise is solved without {path}")

    setattr(owner, parts[-1], refusing)


def arm(folder: str, secret: Iterable[str], banned: Iterable[str]) -> list[str]:
    """From here on refuse what is listed above; returns the list that every refusal is written to."""
    refusals: list[str] = []
    home = os.path.realpath(folder) + os.sep
    hidden = tuple(os.path.realpath(path) + os.sep for path in secret)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    real, null = os.path.realpath, os.path.realpath(os.devnull)

    def refuse(reason: str) -> NoReturn:
        refusals.append(reason)
        raise Refused(reason)

    def where(path: Any) -> str | None:
        """The real path behind a name, or None for an open file's number."""
        return None if isinstance(path, int) or path is None else real(os.fsdecode(path))

    def opened(path: Any, mode: Any, flags: Any) -> None:
        place = where(path)
        if place is None or place == null:
            return
        if place.startswith(hidden) and not place.startswith(home):
            refuse("a submission may not read the files of the exercises")
        changes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool((flags or 0) & writing)
        if changes and not place.startswith(home):
            refuse(f"a submission may not write outside its folder ({place})")

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            opened(*args[:3])
        elif event == "import":
            if args[0].split(".")[0] in ANSWERS:
                refuse(f"a submission may not import {args[0].split('.')[0]}: it holds the answer")
        elif event in CHANGES:
            for path in args[: CHANGES[event]]:
                place = where(path)
                if place is not None and not (place + os.sep).startswith(home):
                    refuse(f"a submission may not change files outside its folder ({place})")
        elif event in PROCESSES:
            refuse(f"a submission may not start or stop processes ({event})")
        elif event in NETWORK:
            refuse("a submission may not use the network")
        elif event == "ctypes.dlopen":
            refuse("a submission may not load foreign libraries")

    for path in banned:
        _ban(path, refuse)
    sys.addaudithook(hook)
    return refusals
