"""Checkpoints: everything a run needs to go on as if it had never stopped, and nothing that has to be unpickled.

    output_dir/checkpoints/step-000120/
        trainable.safetensors     the trained parameters, by name
        optimizer.safetensors     the optimizer's tensors and the state of the random-number generators
        state.json                the optimizer's numbers, the records of all steps, the identity of the run,
                                  and the SHA-256 of the two files above

A checkpoint appears under its name only when it is complete (atomic.py), and loses its name before it is deleted, so a
run that is killed at any moment leaves whole checkpoints and perhaps hidden rests, which the next run removes. A file
that has changed since it was written is recognized by its hash. The identity is a hash of each thing that a run must
not change half-way: the encoded rows, the base model, the adapter, and the settings that decide what a step does.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minift.adapters.method import method_of
from minift.adapters.switched import switched
from minift.atomic import atomic_folder
from minift.data.encode import Example
from minift.train.config import TrainConfig
from minift.train.records import StepRecord

# Settings that may change between two parts of a run: they do not touch any step that is still to come.
MAY_CHANGE = (
    "output_dir", "cache", "save_every", "resume", "log_every", "gradient_checkpointing",
    "keep_last", "patience", "tensorboard", "paged", "page_budget",
)  # fmt: skip
TRAINED, STATE, CONTENT = "trainable.safetensors", "optimizer.safetensors", "state.json"


def fingerprint(
    examples: Sequence[Example], model: nn.Module, config: TrainConfig, evaluated: Sequence[Example] = ()
) -> dict[str, str]:
    """The identity of a run: a hexadecimal hash for each part. Of a frozen tensor the first bytes stand for the whole.

    `evaluated` are the evaluation rows: the best step is the best on these.
    """
    settings = {key: value for key, value in asdict(config).items() if key not in MAY_CHANGE}
    adapters: list[Any] = [asdict(place.configs[n]) for place in switched(model).values() for n in place.active]
    method = method_of(model)
    if method is not None:
        adapters.append([method.name, repr(method)])
    digest = hashlib.sha256()
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}  # not by name: a tied weight has two
    for name, tensor in model.state_dict().items():
        is_trained = tensor.data_ptr() in trained
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {is_trained}".encode())
        if not is_trained:
            digest.update(tensor.flatten()[:64].cpu().view(torch.uint8).numpy().tobytes())
    return {
        "settings": _hash([settings]),
        "adapter": _hash([adapters]),
        "model": digest.hexdigest(),
        "rows": rows_hash(examples),
        "evaluation rows": rows_hash(evaluated),
    }


def rows_hash(examples: Sequence[Example]) -> str:
    """SHA-256 of the ids and labels of all rows, in order."""
    return _hash([example.input_ids, example.labels] for example in examples)


def _hash(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()


def save_checkpoint(
    output: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, str],
    steps: Sequence[StepRecord],
    keep_last: int = 2,
    keep_step: int | None = None,
) -> Path:
    """Write the checkpoint of the state after the last step of `steps`.

    Of the older ones, the newest stay, so that there are `keep_last`, and that of step `keep_step`.

    Raises:
        OSError: it cannot be written; the ones before are left, and nothing half-written.
    """
    tensors, numbers = {"rng.cpu": torch.get_rng_state()}, {}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for owner, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{owner}.{key}"] = value.detach().cpu().contiguous()
            else:
                numbers[f"{owner}.{key}"] = value
    folder = checkpoint_of(output, len(steps))
    try:
        with atomic_folder(folder) as place:
            save_file({k: p.detach().cpu().contiguous() for k, p in parameters.items()}, place / TRAINED)
            save_file(tensors, place / STATE)
            content = {
                "identity": identity, "optimizer": numbers, "steps": [asdict(record) for record in steps],
                "sha256": {name: file_hash(place / name) for name in (TRAINED, STATE)},
            }  # fmt: skip
            (place / CONTENT).write_text(json.dumps(content), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise _not_saved(folder, error) from error
    kept = checkpoint_of(output, keep_step or 0)
    for old in [path for path in checkpoints(output)[:-keep_last] if path != kept]:
        _delete(old)
    return folder


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_saved(folder: Path, error: OSError | SafetensorError) -> OSError:
    before = checkpoints(folder.parent.parent)
    rest = f"{before[-1].name} is whole: resume goes on from there" if before else "there is none before it"
    number = error.errno if isinstance(error, OSError) else None
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = f"the checkpoint {folder} cannot be written: {reason}; make room, or choose another output_dir; {rest}"
    return OSError(number, text) if number else OSError(text)


def _delete(folder: Path) -> None:
    """Under another name first, so that no half of a checkpoint bears the name of a whole one."""
    aside = folder.with_name(f".{folder.name}.old")
    folder.rename(aside)
    shutil.rmtree(aside)


def remove_rests(output: Path) -> None:
    """Delete what a killed run was writing or deleting."""
    for path in (output / "checkpoints").glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def checkpoint_of(output: Path, step: int) -> Path:
    """Where the checkpoint of the state after a step is, or would be."""
    return output / "checkpoints" / f"step-{step:06d}"


def newest_checkpoint(output: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    return (checkpoints(output) or [None])[-1]


def remove_checkpoints(output: Path) -> None:
    """Delete the checkpoints of an earlier run in the same folder."""
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


class Saved(NamedTuple):
    """What a checkpoint holds."""

    identity: Any
    steps: list[dict[str, Any]]
    numbers: dict[str, Any]
    trained: dict[str, Tensor]
    tensors: dict[str, Tensor]


def read_checkpoint(folder: Path) -> Saved:
    """Read and check a checkpoint.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads((folder / CONTENT).read_text(encoding="utf-8"))
        for name, known in content["sha256"].items():
            if file_hash(folder / name) != known:
                raise ValueError(f"{name} has changed since it was written")
        tensors = load_file(folder / STATE)
        saved = Saved(content["identity"], content["steps"], content["optimizer"], load_file(folder / TRAINED), tensors)
        tensors["rng.cpu"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged ({error!r})") from None
    return saved


def load_checkpoint(
    folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, identity: Mapping[str, str]
) -> list[StepRecord]:
    """Restore parameters, optimizer and random-number generators; return the records of the steps so far.

    Raises:
        ValueError: a damaged checkpoint, or one of another run; nothing has been changed then.
    """
    try:
        saved = read_checkpoint(folder)
    except ValueError as error:
        raise ValueError(f"{error}; {_way_out(folder, identity)}") from None
    if saved.identity != identity:
        found = saved.identity if isinstance(saved.identity, dict) else {}
        other = ", ".join(part for part in identity if found.get(part) != identity[part])
        before = _before(folder, identity)
        or_before = f"; or delete it to go on from the one before: {before}" if before else ""
        raise ValueError(
            f"{folder} belongs to another run (other {other}); use another output_dir, or leave out resume{or_before}"
        )
    restore_weights(saved, parameters)
    tensors = dict(saved.tensors)
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    state: dict[Any, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *saved.numbers.items()]:
        owner, _, key = name.partition(".")
        state.setdefault(int(owner) if owner.isdigit() else owner, {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return [StepRecord(**record) for record in saved.steps]


@torch.no_grad()
def restore_weights(saved: Saved, parameters: Mapping[str, Tensor]) -> None:
    """Copy the trained parameters of a checkpoint of this run into those of the model."""
    for name, p in parameters.items():
        p.copy_(saved.trained[name])


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in the folder of a run, oldest first."""
    found = (output / "checkpoints").glob("step-*")
    return sorted((p for p in found if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))


def _before(folder: Path, identity: Mapping[str, str]) -> Path | None:
    """The newest of the older checkpoints that is whole and of this run."""
    every = checkpoints(folder.parent.parent)
    for path in reversed(every[: every.index(folder)]):
        try:
            if read_checkpoint(path).identity == identity:
                return path
        except ValueError:
            continue
    return None


def _way_out(folder: Path, identity: Mapping[str, str]) -> str:
    before = _before(folder, identity)
    if before is None:
        return "no other checkpoint of this run is whole; leave out resume to begin again"
    return f"delete it to go on from the one before: {before}"
