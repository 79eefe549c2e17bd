"""The `minift` command: a thin layer of options over the library's functions.

Exit status: 0 done, 2 bad input (one line on standard error says which), 1 failure, 130 stopped by Ctrl-C. A traceback
is shown only with --debug.
"""

import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from minift.course.cli import cli as course
from minift.options import (
    DTYPE_NAMES,
    FORMATS,
    MODEL_HELP,
    attention_option,
    data_options,
    lora_of,
    lora_options,
    machine_of,
    method_given,
    method_options,
    model_options,
    trace_options,
    train_options,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="minift")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Fine-tune language models on one small GPU, or none."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = cli.main(arguments, prog_name="minift", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nStopped.", err=True)
        status = 130
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        bad_input = isinstance(error, ValueError | FileNotFoundError | IsADirectoryError)
        kind = "" if bad_input else f"{type(error).__name__}: "
        message = " ".join(str(error).split()) or "no details"
        click.echo(f"Error: {kind}{message}", err=True)
        status = 2 if bad_input else 1
    sys.exit(status if isinstance(status, int) else 0)


def _say_stopped(result: Any, command: str, rest: str = " (and the same options)") -> int:
    click.echo(
        f"Stopped after step {len(result.steps)}; a checkpoint is in {result.output_dir / 'checkpoints'}.\n"
        f"Go on with: {command} --resume{rest}",
        err=True,
    )
    return 130


TEXT = (
    "The sky is blue because air scatters short waves of light more than long ones. In the evening the light takes a "
    "longer way through the air, so that red is what is left of it."
)


# --- commands -------------------------------------------------------------------------------------------------------

DEMO = {"epochs": 2, "batch_size": 16, "lr": 1e-3, "schedule": "cosine", "warmup_steps": 5, "output_dir": "minift-demo"}


@cli.command()
@model_options()
@lora_options
@train_options(**DEMO)
def demo(model: str, **options: Any) -> int:
    """The main job: teach a small model to speak like Yoda, and see the difference.

    Fine-tunes SmolLM2-135M-Instruct in NF4 with LoRA on 450 sentence pairs that come with minift, and shows its answers
    to held-out sentences before and after.
    """
    from tqdm import tqdm

    from minift.demo import run_demo
    from minift.train.config import TrainConfig

    machine, lora = machine_of(options), lora_of(options)
    result = run_demo(model, *machine, lora, TrainConfig(**options), tqdm.write)
    return 0 if result.training.finished else _say_stopped(result.training, "minift demo")


@cli.command()
@model_options()
@click.option("--data", help="JSON Lines, JSON, CSV or Parquet; rows of messages, prompt and completion, ...")
@click.option("--eval", "eval_data", help="Rows to evaluate on, in the same formats; they are never trained.")
@click.option("--like", help="Folder of an earlier run: everything that is not given here is as it was there.")
@click.option("--measure-memory/--no-measure-memory", default=True,
              help="Measure the memory of the second step, beside what was predicted.")  # fmt: skip
@click.option("--fit", is_flag=True, help="Take the same step in smaller micro-batches where memory is short.")
@attention_option
@method_options
@lora_options
@train_options()
def train(like: str | None, **options: Any) -> int:
    """Fine-tune a model on your own rows, with LoRA or another method.

    The folder of a run remembers every option: `--resume --output-dir FOLDER` goes on with a run that was stopped or
    killed, and `--like FOLDER` does one again; options given beside these count more.
    """
    from tqdm import tqdm

    import minift
    from minift.adapters.report import report
    from minift.study.fit import fit_batch
    from minift.study.outcome import outcome
    from minift.study.watch import MemoryWatch
    from minift.train.plan import longest_row
    from minift.train.remember import fill_in, to_remember

    context = click.get_current_context()
    given = [name for name in options if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    options = fill_in(options, given, like)
    if options["data"] is None:
        raise click.UsageError("Missing option '--data'.", context)
    command = to_remember(options)
    model, data, eval_data, attention = (options.pop(name) for name in ("model", "data", "eval_data", "attention"))
    machine, measure, fit = machine_of(options), options.pop("measure_memory"), options.pop("fit")
    tokenizer = minift.load_tokenizer(model)
    method = method_given(options, given, lambda text: tokenizer.encode(text, add_special_tokens=False))
    config = minift.TrainConfig(**options)
    rows = minift.read_dataset(data)
    eval_rows = minift.read_dataset(eval_data) if eval_data else None
    loaded = minift.load_model(model, *machine, attention)
    minift.add_adapter(loaded, method)
    click.echo(f"{len(rows)} rows\n{report(loaded).format()}")
    if fit:
        config = fit_batch(loaded, config, longest_row(tokenizer, rows, config), click.echo)
        found = {"batch_size": config.batch_size, "gradient_accumulation": config.gradient_accumulation}
        command |= {**found, "fit": False}  # another machine's memory must not make it another run
    watch = MemoryWatch(config, tqdm.write, measure)  # above the progress bar
    result = minift.train(loaded, tokenizer, rows, config, click.echo, eval_rows, command, watch)
    if not result.finished:
        return _say_stopped(result, f"minift train --output-dir {result.output_dir}", "")
    click.echo(outcome(result, model))
    return 0


@cli.command()
@model_options()
@click.option("--adapter", help="Folder of a trained adapter.")
@click.option("--system", help="System message, instead of the one in the model's template.")
@click.option("--max-new-tokens", default=256, help="Longest answer.")
@click.option("--temperature", type=float, help="0 takes the likeliest token; higher is more varied.")
@click.option("--top-k", type=int, help="Draw from this many of the likeliest tokens; 0 from all.")
@click.option("--top-p", type=float, help="Draw from the likeliest tokens that together reach this probability.")
@click.option("--repetition-penalty", type=float, help="Above 1, what has been said becomes less likely.")
@click.option("--seed", default=0, help="Seed of the drawing.")
@click.option("--generation-config/--no-generation-config", default=True,
              help="Take what is not given here from the model's generation_config.json.")  # fmt: skip
@click.option("--memory/--no-memory", default=True, help="Let the model see the earlier turns of the conversation.")
@attention_option
def chat(
    model: str,
    adapter: str | None,
    system: str | None,
    max_new_tokens: int,
    memory: bool,
    attention: str | None,
    **options: Any,
) -> int:
    """Talk to a model, with or without an adapter. Ends with an empty line or Ctrl-D.

    The adapter was trained on the quantized weights, so these are used here, too (4-bit ones decoded once, for speed).
    """
    import minift
    from minift.model.generate import Sampling, stream
    from minift.quant import Linear4bit, dequantize_model

    machine, from_file = machine_of(options), options.pop("generation_config")
    given = {name: value for name, value in options.items() if value is not None}
    sampling = Sampling(**given)  # before the model is loaded, so that a wrong value is said at once
    tokenizer = minift.load_tokenizer(model)
    loaded = minift.load_model(model, *machine, attention)
    if from_file:
        sampling = replace(Sampling.of(loaded.config), **given)
    if adapter:
        minift.load_adapter(loaded, adapter)
    dequantize_model(loaded, Linear4bit)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    interactive = sys.stdin.isatty()
    if interactive:
        click.echo(f"{model}{f' with {adapter}' if adapter else ''}. An empty line ends the conversation.", err=True)
    while True:
        if interactive:
            click.echo("> ", nl=False)
        text = sys.stdin.readline().strip()
        if not text:
            return 0
        messages = [*(messages if memory else start), {"role": "user", "content": text}]
        answer = ""
        for piece in stream(loaded, tokenizer, messages, max_new_tokens, sampling):
            answer += piece
            click.echo(piece, nl=False)
        click.echo()
        messages.append({"role": "assistant", "content": answer})


@cli.command()
@model_options()
@click.option("--adapter", required=True, help="Folder of a trained adapter.")
@click.option("--requantize", is_flag=True, help="Store merged weights in 4 or 8 bits again; moves every weight.")
@click.option("--compare/--no-compare", default=True,
              help="Say how far merging into the unquantized weights would be from it.")  # fmt: skip
@click.option("--text", default=TEXT, help="The drift of the logits is measured on it.")
@click.option("--output-dir", required=True, help="Folder to write; replaced if it exists.")
def merge(
    model: str, adapter: str, output_dir: str, text: str, requantize: bool, compare: bool, **machine: Any
) -> None:
    """Fold an adapter into the model, and save it as a folder that every library of the field loads.

    Give the quantization that the adapter was trained with: it belongs to those weights. The merged ones are stored in
    16 bits (or --dtype), unless --requantize.
    """
    import torch

    import minift
    from minift.adapters.method import method_of

    quantize, dtype, device = machine_of(machine)
    tokenizer = minift.load_tokenizer(model)
    loaded = minift.load_model(model, quantize, dtype, device)
    minift.load_adapter(loaded, adapter)
    if method := method_of(loaded):
        click.echo(f"merged {method.name} into {len(method.merge(loaded))} places")
    else:
        ids = torch.tensor([tokenizer.encode(text)], device=loaded.device)
        original = model if quantize and compare else None
        click.echo(minift.merge_lora(loaded, None, requantize, original, ids).format())
    folder = minift.save_model(loaded, output_dir)
    click.echo(f"Saved {folder}; use it with --model {folder} --quantize none")


@cli.command()
@click.argument("what", required=False)
@click.option("--quantize", type=click.Choice([*FORMATS, "none"]), default="none", help="As it would be loaded.")
@click.option("--dtype", type=click.Choice(["auto", *DTYPE_NAMES]), default="auto",
              help="As it would be loaded; auto is the checkpoint's own.")  # fmt: skip
@click.option("--all", "every", is_flag=True, help="A row for each layer instead of one for all alike.")
@data_options
def inspect(what: str | None, quantize: str, dtype: str, every: bool, data: str | None, **options: Any) -> None:
    """Table of the modules of WHAT, a model (name or folder) or an adapter folder: shapes, types, bytes.

    Reads headers only, so it is instant for any size. With --data: what of a data set will be trained, token by token.
    """
    if data is not None and what is None:
        return _inspect_data(data, **options)
    if data is not None or what is None:
        raise click.UsageError(
            "Give either WHAT (a model or an adapter) or --data (a data set).", click.get_current_context()
        )
    from minift.adapters.folder import CONFIG
    from minift.numerics.dtypes import DTYPES
    from minift.sources.resolve import resolve
    from minift.study.memory import folder_table, format_table, group_layers

    folder = Path(what) if (Path(what) / CONFIG).is_file() else resolve(what)
    rows = folder_table(folder, None if quantize == "none" else quantize, DTYPES.get(dtype))
    click.echo(format_table(rows if every else group_layers(rows)))


def _inspect_data(data: str, model: str, rows: int, html: str | None, **settings: Any) -> None:
    import minift
    from minift.study.dataset import look_at

    config = minift.TrainConfig(**settings)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    look = look_at(minift.load_tokenizer(model), minift.read_dataset(data), config, rows, color)
    click.echo(look)
    if html is not None:
        click.echo(f"Saved {look.save_html(html)}")


@cli.command()
@click.option("--model", default="smollm2-135m-instruct", help=MODEL_HELP)
@click.option("--quantize", type=click.Choice(FORMATS), default="nf4", help="Format of the linear layers.")
@click.option("--blocksize", default=64, help="4 bit: weights per scale, a power of two from 32 to 4096.")
@click.option("--double-quant/--no-double-quant", default=True, help="4 bit: store the scales in 8 bits.")
@click.option("--threshold", default=6.0, help="int8: larger inputs are multiplied unquantized; 0 turns that off.")
@click.option("--skip", default="lm_head", help="Modules that stay as they are: names, or ends of names, by commas.")
@click.option("--dtype", type=click.Choice(["auto", *DTYPE_NAMES]), default="auto",
              help="Type of everything else; auto is the checkpoint's own.")  # fmt: skip
@click.option("--device", default="cpu", help="Where to quantize: cpu, cuda, ...")
@click.option("--output-dir", required=True, help="Folder to write; replaced if it exists.")
def quantize(model: str, quantize: str, dtype: str, device: str, output_dir: str, skip: str, **options: Any) -> None:
    """Quantize a model once, and save it as a folder that minift and transformers + bitsandbytes load.

    Holds the quantized model and one tensor in memory, never the whole original.
    """
    import minift
    from minift.numerics.dtypes import DTYPES
    from minift.study.memory import format_table, group_layers, module_table

    names = tuple(name.strip() for name in skip.split(",") if name.strip())
    config = minift.QuantConfig(quantize, skip=names, **options)
    loaded = minift.load_model(model, config, DTYPES.get(dtype), device)
    folder = minift.save_model(loaded, output_dir)
    click.echo(format_table(group_layers(module_table(loaded))))
    click.echo(f"Saved {folder}; use it with --model {folder} --quantize none")


@cli.command()
@click.option("--model", default="smollm2-135m-instruct", help=MODEL_HELP)
@click.option("--batch", default=8, help="Rows of a micro-batch.")
@click.option("--length", default=1024, help="Tokens of a row.")
@click.option("--quantize", type=click.Choice([*FORMATS, "none"]), help="Of the linears; nf4 unless --full.")
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), default="bfloat16", help="Type of everything else.")
@click.option("--rank", "--lora-rank", default=8, help="LoRA: rank.")
@click.option("--targets", default="all-linear", help="LoRA: all-linear, names by commas, or a regular expression.")
@click.option("--full", is_flag=True, help="Train all parameters instead of adapters.")
@click.option("--checkpointing", type=click.Choice(["off", "on", "selective"]), default="off", help="Compute again.")
@attention_option
@click.option("--optimizer", type=click.Choice(["adamw8bit", "adamw"]), default="adamw8bit", help="Kind of its state.")
@click.option("--packed", is_flag=True, help="Several documents in a row.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", help="A GPU takes more logits at a time.")
@click.option("--budget", help="Memory there is, such as 24GB: say the largest batch and the longest rows that fit.")
def memory(model: str, full: bool, budget: str | None, **options: Any) -> None:
    """How much memory a training step will take, by category and formula; reads nothing but config.json."""
    from minift.sources.resolve import resolve
    from minift.study.ledger import format_fit, parse_bytes, predict
    from minift.study.setting import setting_of

    limit = parse_bytes(budget) if budget else 0
    lora = lora_of(options := options | {"alpha": 16, "dropout": 0.0})
    setting = setting_of(resolve(model), None if full else lora, **options)
    click.echo(predict(setting).format() + (f"\n\n{format_fit(setting, limit)}" if limit else ""))


@cli.command()
@model_options()
@trace_options
@attention_option
@lora_options
def trace(
    model: str, data: str | None, row: int, steps: int, output: str, attention: str | None, **options: Any
) -> None:
    """Follow one row of text through everything, from template to changed answer, as one page.

    Its tokens, labels, pack, mask, logits, loss, gradients, optimizer state, pages and weights in some steps of LoRA
    on that row alone, without dropout. Nothing of the training is kept but the page.
    """
    import torch

    import minift
    from minift.demo import yoda_rows
    from minift.study import trace as study
    from minift.study.show import harmless

    machine, lora, config = machine_of(options), lora_of(options), minift.TrainConfig(**options)
    rows = minift.read_dataset(data) if data else yoda_rows("train")
    if not 1 <= row <= len(rows):
        raise ValueError(f"--row {row}: {data or 'the embedded data'} holds {len(rows)} rows, counted from 1")
    tokenizer = minift.load_tokenizer(model)
    loaded = minift.load_model(model, *machine, attention)
    torch.manual_seed(0)
    minift.add_lora(loaded, lora)
    with study.progress(steps) as report:
        found = study.trace(loaded, tokenizer, rows, row - 1, config, steps, report=report)
    if output == "-":
        return click.echo(found)
    before, after = (" ".join(harmless(answer).split()) for answer in found.numbers.answers)
    click.echo(f"Before  {before}\nAfter   {after}\nSaved   {found.save(output)}")


@cli.command()
def models() -> None:
    """The names that minift knows, and where they are on this machine."""
    from minift.model.families import FAMILIES
    from minift.sources.resolve import KNOWN, cached_folder

    for name, known in KNOWN.items():
        click.echo(f"{name}\n    {known.hub_id}: {known.note}\n    {cached_folder(name) or 'not on this machine yet'}")
    click.echo(f"Any other model of these families by its Hub id (org/name) or folder: {', '.join(FAMILIES)}")
    click.echo("Llama-family .gguf files, too.")


cli.add_command(course, "course")
