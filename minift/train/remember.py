"""A run by its folder alone: the options that a command began it with, so that one command does it again.

config.json holds them, and the SHA-256 of the data files, so that a run on other rows is not taken for the same run.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from minift.train.checkpoint import file_hash
from minift.train.folder import read_config

FILES = ("data", "eval_data")
OWN = ("output_dir", "resume")  # of each run


def fill_in(options: Mapping[str, Any], given: Collection[str], like: str | None) -> dict[str, Any]:
    """All options of a run: those named in `given`, then those of the run in the folder `like`, then `options`' own.

    A run that is resumed without data is like itself.

    Raises:
        FileNotFoundError: `like` is not the folder of a run.
        ValueError: that run remembers no options, would be overwritten, or its data have changed since.
    """
    if like is None and options["resume"] and options["data"] is None:
        like = options["output_dir"]
    if like is None:
        return dict(options)
    saved = read_config(Path(like)).get("options") or {}
    if "data" not in saved:
        raise ValueError(f"{like} does not remember any options: that run was not started by `minift train`")
    if Path(like).resolve() == Path(options["output_dir"]).resolve() and not options["resume"]:
        raise ValueError(f"the run would take the place of the one it is like: give another --output-dir than {like}")
    filled = {name: value if name in given else saved.get(name, value) for name, value in options.items()}
    hashes = data_hashes(filled)
    for name in FILES:
        path = filled[name]
        if name not in given and hashes.get(path) != saved["sha256"].get(path):
            raise ValueError(f"{path} has changed since the run in {like}; to train on it as it is, give it by name")
    return filled


def to_remember(options: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json keeps of the options."""
    kept = {name: value for name, value in options.items() if name not in OWN}
    return {**kept, "sha256": data_hashes(options)}


def data_hashes(options: Mapping[str, Any]) -> dict[str, str]:
    """The hash of each data file, by its path."""
    paths = [options[name] for name in FILES if options[name]]
    return {path: file_hash(Path(path)) for path in paths if Path(path).is_file()}
