"""Single keys from a terminal, without Enter. Where there is no terminal there are no keys, and only time passes.

On Linux and macOS the terminal is told not to collect lines (Ctrl-C still interrupts); Windows has calls of its own.
"""

import os
import sys
import time
from types import TracebackType
from typing import TextIO

if sys.platform == "win32":
    import msvcrt
else:
    import select
    import termios
    import tty

_STEP = 0.05  # seconds between two looks, where one cannot sleep until a key comes


def _terminal(stream: TextIO | None) -> int | None:
    """The number of an open terminal that this process may read from, or None."""
    if stream is None or not stream.isatty():
        return None
    number = stream.fileno()
    if sys.platform != "win32":
        try:  # a process in the background that touches its terminal is stopped by the system
            return number if os.tcgetpgrp(number) == os.getpgrp() else None
        except OSError:  # a terminal, but not the one this process was started from
            pass
    return number


class Keys:
    """The keys pressed while this context is open; afterwards the terminal is as it was."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._number = _terminal(stream or sys.stdin)
        self._before: list | None = None

    @property
    def active(self) -> bool:
        """Whether there is a terminal to read keys from."""
        return self._number is not None

    def __enter__(self) -> "Keys":
        if self._number is not None and sys.platform != "win32":
            self._before = termios.tcgetattr(self._number)
            tty.setcbreak(self._number, termios.TCSANOW)
        return self

    def wait(self, seconds: float) -> str:
        """The next key, or nothing if none comes within some seconds. A terminal that is gone says q."""
        if self._number is None:
            time.sleep(seconds)
            return ""
        if sys.platform == "win32":
            end = time.monotonic() + seconds
            while not msvcrt.kbhit():
                if time.monotonic() >= end:
                    return ""
                time.sleep(_STEP)
            return msvcrt.getwch()
        if not select.select([self._number], [], [], seconds)[0]:
            return ""
        try:
            return os.read(self._number, 1).decode("ascii", "replace") or "q"
        except OSError:
            return "q"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._number is not None and self._before is not None and sys.platform != "win32":
            termios.tcsetattr(self._number, termios.TCSANOW, self._before)
