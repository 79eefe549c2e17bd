"""Options of the `minift` command that several of its subcommands share, and what the library makes of them.

A field of TrainConfig is an option of the same name, with the same help; so nothing has to be written twice.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import Field, fields
from typing import Any

import click

from minift.adapters.named import NAMED, method_named, parse_settings

MODEL_HELP = "A known name (see `minift models`), a Hugging Face Hub id, a folder, or a .gguf file."
FORMATS, DTYPE_NAMES = ("nf4", "fp4", "int8"), ("bfloat16", "float16", "float32")


def model_options(default: str | None = "smollm2-135m-instruct") -> Callable:
    """--model, --quantize, --dtype, --device."""
    options = [
        click.option("--model", default=default, required=default is None, help=MODEL_HELP),
        click.option(
            "--quantize",
            type=click.Choice([*FORMATS, "none"]),
            default="nf4",
            help="Format of the linear layers; none keeps the checkpoint's own.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", *DTYPE_NAMES]),
            default="auto",
            help="Type of the arithmetic; auto takes bfloat16 where this machine is fast in it.",
        ),
        click.option("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."),
    ]
    return lambda command: _apply(options, command)


def attention_option(command: Callable) -> Callable:
    """--attention."""
    text = "How attention is computed; by default sdpa, and eager for models that cap their scores."
    return click.option("--attention", type=click.Choice(["eager", "sdpa", "flash"]), help=text)(command)


def train_options(**defaults: Any) -> Callable:
    """An option for every field of TrainConfig; `defaults` replaces some of its defaults."""
    from minift.train.config import TrainConfig

    settings = fields(TrainConfig)
    options = [_of_setting(s, defaults.get(s.name, s.default), s.metadata["help"]) for s in settings]
    return lambda command: _apply(options, command)


def _of_setting(setting: Field, default: Any, text: str) -> Callable:
    """The option for a field of TrainConfig."""
    flag, choices = "--" + setting.name.replace("_", "-"), setting.metadata["choices"]
    if isinstance(default, bool):
        return click.option(f"{flag}/--no-{flag[2:]}", setting.name, default=default, help=text)
    kind = click.Choice(choices) if choices else type(default)
    return click.option(flag, setting.name, type=kind, default=default, help=text)


LORA_OPTIONS = ("rank", "alpha", "dropout", "targets")


def lora_options(command: Callable) -> Callable:
    """--rank, --alpha, --dropout, --targets."""
    options = [
        click.option("--rank", default=8, help="LoRA: rank."),
        click.option("--alpha", default=16.0, help="LoRA: the change is scaled by alpha / rank."),
        click.option("--dropout", default=0.0, help="LoRA: dropout of the adapters' input."),
        click.option(
            "--targets",
            default="all-linear",
            help="LoRA: all-linear, names separated by commas, or a regular expression.",
        ),
    ]
    return _apply(options, command)


def method_options(command: Callable) -> Callable:
    """--method, --set, --prompt-text."""
    options = [
        click.option("--method", type=click.Choice(list(NAMED)), default="lora", help="What to train."),
        click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
                     help="Another setting of the method, as often as needed: use_dora=true, init=pissa, ..."),
        click.option("--prompt-text", help="prompt-tuning: the virtual tokens begin as those of this text."),
    ]  # fmt: skip
    return _apply(options, command)


def _apply(options: list[Callable], command: Callable) -> Callable:
    for option in reversed(options):
        command = option(command)
    return command


def lora_of(options: dict[str, Any]) -> Any:
    """Take LoRA's options out of `options`."""
    from minift.adapters.config import LoraConfig

    return LoraConfig(**_lora_settings(options))


def _lora_settings(options: dict[str, Any]) -> dict[str, Any]:
    targets = options.pop("targets")
    names = tuple(name.strip() for name in targets.split(","))
    is_list = targets != "all-linear" and all(re.fullmatch(r"[\w.]+", name) for name in names)
    settings = {"r": options.pop("rank"), "alpha": options.pop("alpha"), "dropout": options.pop("dropout")}
    return settings | {"target_modules": names if is_list else targets}


def method_given(options: dict[str, Any], given: Collection[str], encode: Callable[[str], list[int]]) -> Any:
    """Take the method's options out of `options`: its settings.

    Args:
        given: names of the options that were given; those of LoRA mean nothing to another method.
        encode: text -> token ids.
    """
    name, text = options.pop("method"), options.pop("prompt_text")
    settings = parse_settings(options.pop("settings"))
    lora = _lora_settings(options)
    if text is not None:
        settings = {"init": "text", "init_ids": tuple(encode(text)), **settings}
    if name == "lora":
        return method_named(name, lora | settings)
    meaningless = [option for option in LORA_OPTIONS if option in given]
    if meaningless:
        raise click.UsageError(f"--{meaningless[0]} is LoRA's; {name} takes its settings by --set NAME=VALUE")
    return method_named(name, settings)


def machine_of(options: dict[str, Any]) -> tuple[str | None, Any, str]:
    """Take --quantize, --dtype and --device out of `options`, as the library takes them."""
    import torch

    from minift.numerics.dtypes import DTYPES, fast_dtype

    quantize, dtype, device = (options.pop(name) for name in ("quantize", "dtype", "device"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return None if quantize == "none" else quantize, fast_dtype(device) if dtype == "auto" else DTYPES[dtype], device


def data_options(command: Callable) -> Callable:
    """What `inspect` asks about a data set; the settings that decide what is trained are those of `train`."""
    from minift.train.config import TrainConfig

    settings = {setting.name: setting for setting in fields(TrainConfig)}
    options = [
        click.option("--data", help="Look at this data set instead: JSON Lines, JSON, CSV or Parquet."),
        click.option("--model", default="smollm2-135m-instruct", help="With --data: whose tokenizer and template."),
        click.option("--rows", default=3, type=click.IntRange(min=0), help="With --data: how many rows to show."),
        click.option("--html", help="With --data: write the same to this file, to be opened in a browser."),
    ]
    for name in ("loss_on", "max_length", "packing", "batch_size"):
        setting = settings[name]
        options.append(_of_setting(setting, setting.default, f"With --data: {setting.metadata['help']}"))
    return _apply(options, command)


def trace_options(command: Callable) -> Callable:
    """What `trace` asks; the settings are those of `train`, some with other defaults."""
    from minift.train.config import TrainConfig

    options = [
        click.option("--data", help="JSON Lines, JSON, CSV or Parquet; else 450 sentences that come with minift."),
        click.option("--row", default=1, help="Which row, counted from 1."),
        click.option("--steps", default=5, type=click.IntRange(min=1), help="Training steps on this one row."),
        click.option("--output", default="trace.html", type=click.Path(dir_okay=False, allow_dash=True),
                     help="Page to write; - prints it as text instead."),
    ]  # fmt: skip
    defaults: dict[str, Any] = {"lr": 1e-3, "schedule": "constant"}
    settings = {setting.name: setting for setting in fields(TrainConfig)}
    for name in ("loss_on", "max_length", "lr", "schedule", "weight_decay", "max_grad_norm"):
        setting = settings[name]
        options.append(_of_setting(setting, defaults.get(name, setting.default), setting.metadata["help"]))
    return _apply(options, command)
