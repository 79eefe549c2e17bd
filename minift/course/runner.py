"""Where a job runs: a process of its own, with limits, without the network where the system allows that.

Three levels, always stated with a verdict:

    linux    a zygote (torch imported once) forks one child a job; limits on time, memory, processes and file sizes; an
             empty network and process namespace where `unshare` is allowed
    macos    one fresh process a job; limits on CPU time and file sizes
    windows  one fresh process a job; a limit on time only
"""

import contextlib
import importlib.util
import json
import os
import select
import shutil
import site
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from minift.course.worker import wire

COURSE = Path(__file__).parent
# The course's folder is on the path of the child for this one import only.
_START = (
    "import os, sys; sys.path.extend(filter(None, sys.argv[2].split(os.pathsep))); sys.path.insert(0, sys.argv[1]); "
    "from worker import child; del sys.path[0]; "
)
_NAMESPACES = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
_KEPT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "LANG")
_CPU_TIME = -24  # ended by SIGXCPU, the signal of the limit on CPU time
_START_SECONDS = 120.0  # importing torch from a cold disk
_END_SECONDS = 10.0  # until a killed process is gone
_PRINTED = 1 << 16  # bytes that are kept of what a submission prints


class Closed(RuntimeError):  # noqa: N818 (not an error of anybody: the run was stopped)
    """The runner was closed while it was at work, so there is no result."""


@dataclass(frozen=True)
class Ended:
    """What a job left: the frames it wrote, how it ended (done, timeout, crash), what it printed, seconds."""

    frames: list[Any]
    how: str
    printed: str
    seconds: float


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return kept | {
        "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONIOENCODING": "utf-8", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def _places() -> str:
    """Where an isolated Python would not look, although this one has its libraries there: `pip install --user`."""
    found = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        found.append(str(Path(torch.origin).parents[1]))
    return os.pathsep.join(found)


def _python(call: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-B", "-W", "ignore", "-c", _START + call, str(COURSE), _places(), *arguments]


def has_namespaces() -> bool:
    """Whether this system lets an ordinary user make an empty network."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run([*_NAMESPACES, "true"], capture_output=True, timeout=20).returncode == 0
    return False


def _end(process: subprocess.Popen) -> None:
    """Kill a process, if it still runs, and take note of its end, so that no zombie stays."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)


class Runner:
    """Runs jobs one after another; a context manager, because it may keep a warm process. Not for several threads."""

    def __init__(self, namespaces: bool | None = None) -> None:
        self.forks = sys.platform == "linux"
        self._namespaces = has_namespaces() if namespaces is None and self.forks else bool(namespaces)
        self._zygote: subprocess.Popen | None = None
        self._home: tempfile.TemporaryDirectory | None = None
        self._count = 0
        self._closed = False

    @property
    def network_off(self) -> bool:
        """Whether a submission has no network at all, rather than a guard that tells it so."""
        return self.forks and self._namespaces

    @property
    def isolation(self) -> str:
        """One sentence about how far a submission is kept apart here."""
        if not self.forks:
            limits = "time limit" if sys.platform == "win32" else "time and file limits"
            return f"own process, {limits}; network refused by a guard in Python, which is not a security boundary"
        limits = "own process, limits on time, memory, processes and files"
        if self.network_off:
            return f"{limits}; no network (namespace)"
        return f"{limits}; network refused by a guard in Python, which is not a security boundary"

    def run(self, request: dict[str, Any], seconds: float, memory_mb: int) -> Ended:
        """Do one job. It has the given wall time; whatever it does, this returns, or raises Closed."""
        if self._home is None:
            self._home = tempfile.TemporaryDirectory(prefix="minift-course-", ignore_cleanup_errors=True)
        self._count += 1
        folder = Path(self._home.name) / str(self._count)
        folder.mkdir()
        (folder / "request.bin").write_bytes(wire.pack(request, whole=True))
        job = {"folder": str(folder), "seconds": seconds, "memory_mb": memory_mb, "preload": request["preload"]}
        start = time.monotonic()
        # Opened before the submission runs, which may remove these files or put a pipe without an end in their place.
        with open(folder / "response.bin", "w+b") as response, open(folder / "printed.txt", "w+b") as printed:
            try:
                how = self._fork(job) if self.forks else self._spawn(job, response)
                if self._closed:
                    raise Closed("stopped while a submission was running")
                frames, text = self._read(response), printed.read(_PRINTED).decode("utf-8", "replace")
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        finished = bool(frames) and ("done" in frames[-1] or "import" in frames[-1])
        return Ended(frames, "done" if finished else how, text, time.monotonic() - start)

    @staticmethod
    def _read(response: BinaryIO) -> list[Any]:
        """The frames up to the first that cannot be read: a submission may have written into the file itself."""
        found: list[Any] = []
        with contextlib.suppress(Exception):
            for frame in wire.frames(response):
                if not isinstance(frame, dict):
                    break
                found.append(frame)
        return found

    def _fork(self, job: dict[str, Any]) -> str:
        if self._zygote is None or self._zygote.poll() is not None:
            self._start()
        reply = self._say(job, job["seconds"] + (_START_SECONDS if job["preload"] else _END_SECONDS))
        if reply is None:
            self._stop()
            return "crash"
        return "timeout" if reply["timed_out"] or reply["status"] == _CPU_TIME else "crash"

    def _spawn(self, job: dict[str, Any], response: BinaryIO) -> str:
        """A fresh process for one job. Its time counts from when it has imported torch and begun to answer."""
        call = "child.run_job(sys.argv[3], float(sys.argv[4]), int(sys.argv[5]))"
        command = _python(call, job["folder"], str(job["seconds"]), str(job["memory_mb"]))
        nothing = subprocess.DEVNULL
        process = subprocess.Popen(
            command, env=_environment(), stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
        )
        deadline, begun = time.monotonic() + _START_SECONDS, False
        try:
            while process.poll() is None and not self._closed:
                if not begun and os.fstat(response.fileno()).st_size:
                    begun, deadline = True, time.monotonic() + job["seconds"]
                if time.monotonic() > deadline:
                    return "timeout"
                time.sleep(0.01)
        finally:
            _end(process)
        return "timeout" if process.returncode == _CPU_TIME else "crash"

    def _start(self) -> None:
        if self._closed or self._home is None:
            raise Closed("stopped before a submission was run")
        command = [*(_NAMESPACES if self._namespaces else []), *_python("child.zygote(sys.argv[3])", self._home.name)]
        # A session of its own: Ctrl-C is for the parent, which then ends this process.
        self._zygote = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment(),
            start_new_session=True,
        )  # fmt: skip
        if self._say(None, _START_SECONDS) is None:
            self._stop()
            if self._closed:
                raise Closed("stopped before a submission was run")
            raise RuntimeError("the process that runs submissions did not start: is torch installed for this Python?")

    def _say(self, job: dict[str, Any] | None, seconds: float) -> dict[str, Any] | None:
        """Send a job to the zygote and wait for its reply; None if it died (a submission made it) or was closed."""
        zygote = self._zygote
        if zygote is None:  # closed meanwhile by another thread
            return None
        assert zygote.stdin is not None and zygote.stdout is not None
        try:
            if job is not None:
                zygote.stdin.write(json.dumps(job).encode() + b"\n")
                zygote.stdin.flush()
            if not select.select([zygote.stdout], [], [], seconds)[0]:
                return None
            return json.loads(zygote.stdout.readline())
        except (OSError, ValueError):
            return None

    def _stop(self) -> None:
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            _end(zygote)
            for pipe in (zygote.stdin, zygote.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()

    def close(self) -> None:
        """End the warm process and remove the folder of the jobs; called from another thread, stop the running job."""
        self._closed = True
        self._stop()
        if self._home is not None:
            self._home.cleanup()

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
