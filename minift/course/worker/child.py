"""The child: load one file, call its functions with the given inputs, write what they return. It decides nothing.

A job is a folder with `request.bin`; the answers go to `response.bin`, one frame before and one after each call, so
that the parent knows how far a process came that did not end by itself. Importing torch takes seconds, a fork takes
milliseconds: on Linux one process (the zygote) imports torch, never runs a submission, and forks one child a job.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
import types
from typing import Any, BinaryIO

import torch

from . import guard, wire

try:
    import resource
except ImportError:  # Windows
    resource = None

OUTPUT_LIMIT = 1 << 26  # bytes in any one file, the answers included
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def limit(seconds: float, memory_mb: int) -> None:
    """Bound this process: CPU time, memory beyond what torch has mapped already (Linux), size of a file, core dumps."""
    if resource is None:
        return
    spent = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(spent.ru_utime + spent.ru_stime + seconds) + 2
    bounds = {"RLIMIT_CPU": cpu, "RLIMIT_FSIZE": OUTPUT_LIMIT, "RLIMIT_CORE": 0}
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        bounds["RLIMIT_AS"] = mapped + memory_mb * (1 << 20)
        bounds["RLIMIT_NPROC"] = _tasks() + 128
    for name, bound in bounds.items():
        # A limit that the machine does not let us set is already tighter than ours.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (bound, bound))


def _tasks() -> int:
    """Threads on this machine: the limit on processes counts those of the user that exist already."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def _load(name: str, source: str, path: str) -> types.ModuleType:
    with open(path, "w", encoding="utf-8") as file:
        file.write(source)
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def _describe(error: BaseException, path: str) -> dict[str, Any]:
    """What was raised, and on which line of the student's own file it happened last."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    try:
        message = str(error)[:600]
    except BaseException:
        message = ""
    return {"raised": type(error).__name__, "message": message, "line": lines[-1] if lines else None}


def _call(function: Any, first: list[Any], given: dict[str, Any], path: str) -> dict[str, Any]:
    """Call with the given arguments by name; what is `first` (the student's module, for drive.py) goes before them."""
    before = {name: wire.pack(value, whole=True) for name, value in given.items()}
    start = time.monotonic()
    try:
        answer = {"value": function(*first, **given)}
        wire.pack(answer)
    except BaseException as error:
        answer = _describe(error, path)
    answer["seconds"] = time.monotonic() - start
    changed = {}
    for name, value in given.items():
        # A generator is there to be used up; every other input must be as it was.
        if not isinstance(value, torch.Generator) and wire.pack(value, whole=True) != before[name]:
            changed[name] = _storage(value)
    answer["changed"] = changed
    return answer


def _storage(value: Any) -> Any:
    """Of a tensor all bytes, those before and after the view included: guard bands are looked at there."""
    if not isinstance(value, torch.Tensor):
        return None
    return torch.empty(0, dtype=value.dtype).set_(value.detach().untyped_storage())  # pyright: ignore[reportArgumentType]


def _answer(request: dict[str, Any], folder: str, out: BinaryIO) -> None:
    helper = _load("drive", request["drive"], os.path.join(folder, "drive.py")) if request["drive"] else None
    path = os.path.join(folder, request["name"])
    refusals = guard.arm(folder, request["secret"], request["banned"])
    try:
        student = _load("submission", request["source"], path)
    except BaseException as error:
        out.write(wire.pack({"import": _describe(error, path), "refusals": refusals}))
        return
    out.write(wire.pack({"names": [name for name in request["names"] if hasattr(student, name)]}))
    for number, call in request["calls"]:
        out.write(wire.pack({"begin": number}))
        driven = getattr(helper, call["call"], None)
        function = getattr(student, call["call"], None)
        if driven is not None:
            answer = _call(driven, [student], call["given"], path)
        elif function is not None:
            answer = _call(function, [], call["given"], path)
        else:
            answer = {"missing": call["call"]}
        out.write(wire.pack({"end": number, "refusals": refusals[:5]} | answer))
    out.write(wire.pack({"done": True}))


def run_job(folder: str, seconds: float, memory_mb: int) -> None:
    """Do the job in a folder and end this process, without the exit handlers that a submission may have left."""
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder, TORCHINDUCTOR_CACHE_DIR=folder, TRITON_CACHE_DIR=folder)
    quiet = os.open(os.devnull, os.O_RDONLY)
    printed = os.open("printed.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, target in ((quiet, 0), (printed, 1), (printed, 2)):
        os.dup2(source, target)
    torch.set_num_threads(1)
    with open("response.bin", "wb", buffering=0) as out:
        try:
            with open("request.bin", "rb") as file:
                request = next(wire.frames(file))
            os.remove("request.bin")
            for name in request["preload"]:
                __import__(name)  # before the limits: what a library maps is not the submission's
            out.write(wire.pack({"started": True}))  # from here on the time counts
            limit(seconds, memory_mb)
            _answer(request, folder, out)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(0)


def _fork_job(folder: str, seconds: float, memory_mb: int, preload: list[str]) -> dict[str, Any]:
    for name in preload:  # once for all jobs; what a manifest requires, nothing of a submission
        with contextlib.suppress(Exception):  # the child says what is wrong with it
            __import__(name)
    start, parent = time.monotonic(), os.getpid()
    child = os.fork()
    if child == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no submission outlives the judge
        if os.getppid() != parent:
            os._exit(1)
        os.closerange(3, 64)  # the pipes to the parent are not for submissions
        run_job(folder, seconds, memory_mb)
    status, timed_out = None, False
    while status is None:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() - start > seconds or select.select([0], [], [], 0.002)[0]:  # no more input: no parent
            timed_out = True
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        os.killpg(child, signal.SIGKILL)  # whatever it started and left behind
    return {"status": status, "timed_out": timed_out, "seconds": time.monotonic() - start}


def zygote(home: str) -> None:
    """One job a line on standard input, one result a line on standard output, until the input ends.

    It ends when the parent is gone, however that ended; `home`, the folder of all jobs, is removed then.
    """
    torch.set_num_threads(1)
    # The first backward pass with a given gradient imports sympy: 0.3 s here, once, rather than in each child.
    torch.ones(1, requires_grad=True).backward(torch.ones(1))
    replies = os.fdopen(os.dup(1), "w")
    os.set_inheritable(replies.fileno(), False)
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    try:
        for line in sys.stdin:
            print(json.dumps(_fork_job(**json.loads(line))), file=replies, flush=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
