"""Checkpoints: everything a run needs to go on as if it had never stopped, and nothing that has to be unpickled.

    output_dir/checkpoints/step-000120/
        trainable.safetensors     the trained parameters, by name
        optimizer.safetensors     the optimizer's tensors and the state of the random-number generators
        state.json                the optimizer's numbers, the records of all steps, the identity of the run

A checkpoint appears under its name only when it is complete (atomic.py). The identity is a hash of what a run must not
change half-way: the encoded rows, the base model, the adapter, and the settings that decide what a step does.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minift.adapters.inject import lora_layers
from minift.atomic import atomic_folder
from minift.data.encode import Example
from minift.train.config import TrainConfig

if TYPE_CHECKING:
    from minift.train.loop import StepRecord

# Settings that may change between two parts of a run: they do not touch any step that is still to come.
MAY_CHANGE = ("output_dir", "save_every", "resume", "log_every", "gradient_checkpointing")
KEPT = 2  # newest checkpoints that stay: the last one and, should the disk hold a damaged file, the one before


def fingerprint(examples: Sequence[Example], model: nn.Module, config: TrainConfig) -> str:
    """The identity of a run, as a hexadecimal hash. Of each frozen tensor the first bytes stand for the whole."""
    settings = {key: value for key, value in asdict(config).items() if key not in MAY_CHANGE}
    adapters = [asdict(layer.configs[name]) for layer in lora_layers(model).values() for name in layer.active]
    digest = hashlib.sha256(json.dumps([settings, adapters]).encode())
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}  # not by name: a tied weight has two
    for name, tensor in model.state_dict().items():
        is_trained = tensor.data_ptr() in trained
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {is_trained}".encode())
        if not is_trained:
            digest.update(tensor.flatten()[:64].cpu().view(torch.uint8).numpy().tobytes())
    for example in examples:
        digest.update(json.dumps([example.input_ids, example.labels]).encode())
    return digest.hexdigest()


def save_checkpoint(
    output: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: str,
    steps: Sequence["StepRecord"],
) -> Path:
    """Write the checkpoint of the state after the last step of `steps`; older ones than the newest two go."""
    tensors, numbers = {"rng.cpu": torch.get_rng_state()}, {}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for owner, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{owner}.{key}"] = value.detach().cpu().contiguous()
            else:
                numbers[f"{owner}.{key}"] = value
    content = {"identity": identity, "optimizer": numbers, "steps": [asdict(record) for record in steps]}
    folder = output / "checkpoints" / f"step-{len(steps):06d}"
    with atomic_folder(folder) as place:
        save_file({k: p.detach().cpu().contiguous() for k, p in parameters.items()}, place / "trainable.safetensors")
        save_file(tensors, place / "optimizer.safetensors")
        (place / "state.json").write_text(json.dumps(content), encoding="utf-8")
    for old in _checkpoints(output)[:-KEPT]:
        shutil.rmtree(old)
    return folder


def newest_checkpoint(output: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    return (_checkpoints(output) or [None])[-1]


def remove_checkpoints(output: Path) -> None:
    """Delete the checkpoints of an earlier run in the same folder."""
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def load_checkpoint(
    folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, identity: str
) -> list[dict[str, Any]]:
    """Restore parameters, optimizer and random-number generators; return the records of the steps so far.

    Raises:
        ValueError: a damaged checkpoint, or one of another run.
    """
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        trained = load_file(folder / "trainable.safetensors")
        tensors = load_file(folder / "optimizer.safetensors")
        found, numbers, steps = content["identity"], content["optimizer"], content["steps"]
        cpu_rng = tensors.pop("rng.cpu")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged ({error!r}); delete it to go on from the one before") from None
    if found != identity:
        raise ValueError(
            f"{folder} belongs to another run (other rows, model, adapter or settings); "
            "use another output_dir, or leave out resume"
        )
    if trained.keys() != parameters.keys():
        raise ValueError(f"{folder} is damaged (it lacks parameters); delete it to go on from the one before")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(trained[name])
    torch.set_rng_state(cpu_rng)
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    state: dict[Any, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *numbers.items()]:
        owner, _, key = name.partition(".")
        state.setdefault(int(owner) if owner.isdigit() else owner, {})[key] = value
    device = next(iter(parameters.values())).device
    for values in state.values():
        values.update({key: value.to(device) for key, value in values.items() if isinstance(value, Tensor)})
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return steps


def _checkpoints(output: Path) -> list[Path]:
    found = (output / "checkpoints").glob("step-*")
    return sorted((p for p in found if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
