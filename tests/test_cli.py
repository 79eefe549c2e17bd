"""The `minift` command: what it prints, what it writes, and with which status it ends.

Most runs happen inside this process (`run`, through the same `main` as the console script); what needs signals, limits
or a real standard error runs in a process of its own (`start`). The model is the tiny random one.
"""

import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import peers
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import minift
from minift.adapters.inject import lora_layers
from minift.adapters.lora import LoraConfig
from minift.adapters.named import NAMED
from minift.cli import DEMO, cli, main
from minift.model.config import ModelConfig
from minift.model.generate import Sampling, generate
from minift.quant.config import QuantConfig
from minift.sources.resolve import KNOWN
from minift.study.dataset import look_at
from minift.study.ledger import format_fit, predict
from minift.study.memory import format_table, group_layers, module_table
from minift.study.setting import Setting

Run = Callable[..., tuple[int, str, str]]
ENTRY = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from minift.cli import main; main()"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("train", "--model", ...) -> exit status, standard output, standard error. Works in an empty folder."""
    (tmp_path / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return call


def start(*arguments: object, setup: str = "", **options: Any) -> subprocess.Popen:
    """The same in a process of its own."""
    command = [sys.executable, "-c", f"{setup}\n{ENTRY}", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=100)
    return process.returncode, stdout.decode(), stderr.decode()


def shown(stderr: str) -> list[str]:
    """The lines that are left to see on a terminal: a progress bar goes back to the start of its line and wipes it."""
    lines = (line.rpartition("\r")[2].strip() for line in stderr.split("\n"))
    return [line for line in lines if line]


def the_error(result: tuple[int, str, str], status: int = 2) -> str:
    """The one line on standard error of a command that failed; above it may stand the bar of a run that had begun."""
    found, _, stderr = result
    (line,) = (line for line in shown(stderr) if not line.startswith("Training "))
    assert line.startswith("Error: ")
    assert found == status, line
    return line


def usage_error(result: tuple[int, str, str]) -> str:
    """Click's own report of a wrong option: usage, then one line."""
    status, stdout, stderr = result
    assert (status, stdout) == (2, "")
    assert stderr.startswith("Usage: minift ")
    (line,) = (line for line in stderr.splitlines() if line.startswith("Error: "))
    return line


ROWS = [
    {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": f"{word.title()}!"}]}
    for word in ("sea", "sky", "sun", "rain", "snow", "wind", "fog", "hail")
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def spoiled(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "spoiled"))


QUICK = ("--dtype", "float32", "--device", "cpu", "--batch-size", 4, "--rank", 2)


# --- help -------------------------------------------------------------------------------------------------------------

COMMANDS = ("demo", "train", "chat", "inspect", "memory", "trace", "models")


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_console_script_is_this_main():
    (script,) = (point for point in entry_points(group="console_scripts") if point.name == "minift")
    assert script.load() is main


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command(flag: str):
    result = CliRunner().invoke(cli, [flag])
    assert result.exit_code == 0
    for name in COMMANDS:
        command = cli.commands[name]
        assert re.search(rf"^  {name} ", result.output, re.MULTILINE)
        assert command.help and flat(command.help)[:25] in flat(result.output)
    assert "--debug" in result.output and "--version" in result.output
    assert set(cli.commands) >= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_explains_every_option(name: str):
    result = CliRunner().invoke(cli, [name, "--help"], terminal_width=200)
    assert result.exit_code == 0
    output = flat(result.output)
    for option in cli.commands[name].params:
        if isinstance(option, click.Option):
            assert option.opts[0] in output
            assert option.help and flat(option.help) in output, option.name


@pytest.mark.parametrize("name", ["demo", "train"])
def test_every_setting_of_a_run_is_an_option_with_its_help(name: str):
    options = {option.name: option for option in cli.commands[name].params if isinstance(option, click.Option)}
    changed = DEMO if name == "demo" else {}
    assert DEMO.keys() <= options.keys()
    for setting in fields(minift.TrainConfig):
        option = options[setting.name]
        assert option.opts[0] == "--" + setting.name.replace("_", "-")
        assert option.help == setting.metadata["help"]
        assert option.default == changed.get(setting.name, setting.default)
        assert isinstance(option.default, type(setting.default))
        if isinstance(setting.default, bool):
            assert option.secondary_opts == [option.opts[0].replace("--", "--no-", 1)]
        if setting.metadata["choices"]:
            assert isinstance(option.type, click.Choice)
            assert tuple(option.type.choices) == tuple(setting.metadata["choices"])
    assert {"rank", "alpha", "dropout", "targets", "model", "quantize", "dtype", "device"} <= options.keys()


def test_version(run: Run):
    status, stdout, stderr = run("--version")
    assert (status, stderr) == (0, "")
    assert minift.__version__ in stdout


# --- train ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8", "none"])
def test_train(run: Run, tiny: Path, data: Path, quantize: str):
    status, stdout, stderr = run("train", "--model", tiny, "--data", data, *QUICK, "--quantize", quantize,
                                 "--epochs", 2, "--lr", 0.01, "--output-dir", "out")  # fmt: skip
    assert status == 0
    assert not shown(stderr) or not any(line.startswith("Error") for line in shown(stderr))
    out = Path("out")
    assert {path.name for path in out.iterdir()} == {
        "adapter", "checkpoints", "config.json", "curves.png", "log.json", "log.jsonl", "loss.png",
        "memory.json",
    }  # fmt: skip

    log = json.loads((out / "log.json").read_text())
    assert [record["step"] for record in log["steps"]] == [1, 2, 3, 4]
    assert log["config"]["lr"] == 0.01 and log["config"]["epochs"] == 2
    first, last = log["steps"][0]["loss"], log["steps"][-1]["loss"]
    assert last < first
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    model = minift.load_model(tiny, None if quantize == "none" else quantize)
    minift.load_adapter(model, out / "adapter")
    assert len(lora_layers(model)) == 14
    weights = load_file(out / "adapter/adapter_model.safetensors")
    assert all(value.any() for value in weights.values())  # every B has left zero
    assert stdout.startswith("8 rows\n")
    assert "not adapted: lm_head" in stdout and f"{sum(v.numel() for v in weights.values()):,} of " in stdout
    assert f"Loss {first:.3f} -> {last:.3f} in 4 steps" in stdout
    for path in (out / "adapter", out / "loss.png", out / "log.json"):
        assert str(path) in stdout


def test_fit(run: Run, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch):
    """A step of 8 rows in pieces that fit; the same losses, and a run that is resumed with the same pieces."""
    begin = ("train", "--model", tiny, "--data", data, "--batch-size", 8, "--rank", 2, "--max-steps", 2,
             "--no-shuffle", "--quantize", "none", "--dtype", "float32")  # fmt: skip
    assert run(*begin, "--output-dir", "whole")[0] == 0
    monkeypatch.setattr("minift.study.fit.free_memory", lambda device: 600_000)
    status, stdout, stderr = run(*begin, "--fit", "--output-dir", "pieces")
    assert status == 0, stderr
    (line,) = [line for line in stdout.splitlines() if line.startswith("Batches of")]
    config = json.loads(Path("pieces/config.json").read_text())["options"]
    assert config["batch_size"] < 8 and config["batch_size"] * config["gradient_accumulation"] == 8, line
    losses = [[json.loads(row)["loss"] for row in Path(f"{name}/log.jsonl").read_text().splitlines()]
              for name in ("whole", "pieces")]  # fmt: skip
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    monkeypatch.setattr("minift.study.fit.free_memory", lambda device: 10**12)
    assert run("train", "--resume", "--output-dir", "pieces", "--max-steps", 2)[0] == 0
    status, stdout, stderr = run(*begin[:5], "--batch-size", 4, "--max-steps", 2, "--method", "bitfit", "--fit")
    assert status == 0 and "Batches of 4 rows, 1 a step" in stdout, stderr


def test_options_reach_the_run(run: Run, tiny: Path, data: Path):
    """One of each kind: number, choice, flag and its opposite, LoRA's own."""
    options = ("--lr", "0.002", "--optimizer", "adamw", "--no-shuffle", "--gradient-checkpointing", "selective",
               "--max-steps", 1,
               "--schedule", "cosine", "--alpha", 7, "--dropout", 0.5, "--targets", "q_proj, up_proj")  # fmt: skip
    status, _, _ = run("train", "--model", tiny, "--data", data, *QUICK, *options)
    assert status == 0 and adapted_layers() == 4
    out = Path("minift-run")
    config = json.loads((out / "log.json").read_text())["config"]
    expected = {"lr": 0.002, "optimizer": "adamw", "shuffle": False, "gradient_checkpointing": "selective",
                "max_steps": 1, "schedule": "cosine", "batch_size": 4}  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    adapter = json.loads((out / "adapter/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (2, 7, 0.5)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all-linear", 14),
        ("q_proj", 2),
        ("q_proj,k_proj,v_proj", 6),
        ("self_attn.q_proj,mlp.up_proj", 4),
        ("layers.1.mlp.up_proj", 1),
        (r".*layers\.1\..*proj", 7),
        ("lm_head", 1),
    ],
)
def test_targets(run: Run, tiny: Path, data: Path, targets: str, layers: int):
    status, _, _ = run("train", "--model", tiny, "--data", data, *QUICK, "--max-steps", 1, "--targets", targets)
    assert status == 0 and adapted_layers() == layers


@pytest.mark.parametrize("method", [name for name in NAMED if name != "lora"])
def test_every_method(run: Run, tiny: Path, data: Path, method: str):
    """Trained, saved, tabulated, and loaded by `chat`, all by the command line."""
    quantize = "none" if method == "full" else "nf4"
    arguments = ("train", "--model", tiny, "--data", data, "--batch-size", 4, "--max-steps", 2, "--method", method,
                 "--lr", 0.1, "--quantize", quantize)  # fmt: skip
    status, stdout, stderr = run(*arguments)
    assert status == 0, stderr
    tensors = load_file("minift-run/adapter/adapter_model.safetensors")
    trained = sum(tensor.numel() for tensor in tensors.values())
    if method != "p-tuning":  # saves what its network computes
        assert f"{trained:,} of " in stdout
    model = minift.load_model(tiny, None if quantize == "none" else quantize)
    before = model(torch.arange(9).unsqueeze(0))
    minift.load_adapter(model, "minift-run/adapter")
    assert not torch.equal(model(torch.arange(9).unsqueeze(0)), before)
    status, stdout, _ = run("inspect", "minift-run/adapter", "--all")
    assert status == 0 and stdout.count("of the input") == len(tensors)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--set", "use_dora=true"), {"use_dora": True, "r": 2}),
        (("--set", "init=pissa", "--set", "use_rslora=true", "--quantize", "none"), {"init_lora_weights": "pissa"}),
        (("--set", 'target_modules=["q_proj"]', "--set", "r=3"), {"target_modules": ["q_proj"], "r": 3}),
    ],
)
def test_other_settings_of_lora(run: Run, tiny: Path, data: Path, options: tuple, expected: dict):
    status, _, stderr = run("train", "--model", tiny, "--data", data, *QUICK, "--max-steps", 1, *options)
    assert status == 0, stderr
    adapter = json.loads(Path("minift-run/adapter/adapter_config.json").read_text())
    assert {key: adapter[key] for key in expected} == expected


def test_a_prompt_begins_as_a_text(run: Run, tiny: Path, data: Path):
    text = "You speak like Yoda"
    status, _, stderr = run("train", "--model", tiny, "--data", data, "--batch-size", 4, "--max-steps", 1,
                            "--lr", 1e-30, "--method", "prompt-tuning", "--prompt-text", text, "--dtype", "bfloat16",
                            "--set", "num_virtual_tokens=5")  # fmt: skip
    assert status == 0, stderr
    words = minift.load_tokenizer(tiny).encode(text, add_special_tokens=False)
    table = minift.load_model(tiny, dtype=torch.bfloat16).decoder.embed_tokens.weight
    (learned,) = load_file("minift-run/adapter/adapter_model.safetensors").values()
    torch.testing.assert_close(learned, table[(words * 5)[:5]].float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "ia3", "--rank", 4), "--rank is LoRA's; ia3 takes its settings by --set NAME=VALUE"),
        (("--method", "ia3", "--set", "rank=4"), "ia3 has no setting 'rank'; it has target_modules"),
        (("--set", "use_dora"), "'use_dora' is no setting: write NAME=VALUE"),
        (("--set", "r=3", "--set", "r=4"), "the setting 'r' is given twice"),
        (("--set", "use_rslora=perhaps"), "use_rslora"),
        (("--method", "full"), "and model.layers.0.self_attn.q_proj is quantized"),
        (("--method", "houlsby", "--set", "reduction_factor=0"), "reduction_factor"),
        (("--prompt-text", "Hello"), "lora has no setting 'init_ids'"),
    ],
)
def test_settings_that_a_method_does_not_have(run: Run, tiny: Path, data: Path, options: tuple, message: str):
    status, _, stderr = run("train", "--model", tiny, "--data", data, "--batch-size", 4, *options)
    assert status == 2
    assert message in " ".join(stderr.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["merged default into 14 layers, stored as float32", "merging into the original weights would differ by"]),
        (("--requantize",), ["stored as nf4", "same most likely token after"]),
        (("--quantize", "none", "--no-compare"), ["stored as float32", "KL divergence"]),
    ],
)
def test_merge(run: Run, tiny: Path, data: Path, options: tuple, words: list[str]):
    """The merged folder answers as model and adapter do, but for what the report says."""
    kind = ("--model", tiny, "--dtype", "float32", *[o for o in options if o in ("--quantize", "none")])
    assert run("train", *kind, "--data", data, *QUICK, "--max-steps", 2, "--lr", 0.01)[0] == 0
    status, stdout, stderr = run("merge", *kind, *options, "--adapter", "minift-run/adapter", "--output-dir", "merged")
    assert status == 0, stderr
    assert all(word in stdout for word in words), stdout
    assert ("original" in stdout) == (not options or options == ("--requantize",))
    ours = minift.load_model(tiny, None if "none" in options else "nf4")
    minift.load_adapter(ours, "minift-run/adapter")
    ids = torch.arange(30).unsqueeze(0)
    drift = (minift.load_model("merged")(ids) - ours(ids)).abs().max()
    assert drift > 0.01 if "--requantize" in options else drift < 1e-4  # 16 levels; the rounding of fp32
    assert run("merge", *kind, "--adapter", "nowhere", "--output-dir", "merged")[0] == 2


def adapted_layers(folder: str = "minift-run/adapter") -> int:
    return len(load_file(f"{folder}/adapter_model.safetensors")) // 2


def test_a_run_is_evaluated_and_done_again_by_one_command(run: Run, tiny: Path, data: Path, tmp_path: Path):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    status, stdout, _ = run("train", "--model", tiny, "--data", data, "--eval", held, *QUICK, "--max-steps", 3,
                            "--eval-every", 1, "--targets", "q_proj,up_proj", "--output-dir", "out")  # fmt: skip
    assert status == 0
    steps = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3] and all(step["eval_loss"] > 0 for step in steps)
    last = steps[-1]
    assert (
        f"Evaluation of the weights of step 3: loss {last['eval_loss']:.3f}, perplexity {last['eval_perplexity']:.2f}"
        in stdout
    )
    assert "weights  " in stdout and "optimizer state" in stdout  # the precision table
    again = re.search(r"Do it again: minift (.*)", stdout)
    assert again
    assert run(*again[1].split())[0] == 0
    repeated = [json.loads(line) for line in Path("out-again/log.jsonl").read_text().splitlines()]
    machine = {"seconds": 0, "peak_memory": 0}  # what is no result of the run
    assert [step | machine for step in repeated] == [step | machine for step in steps]
    same = "adapter/adapter_model.safetensors"
    assert Path("out", same).read_bytes() == Path("out-again", same).read_bytes()
    # What is given beside it counts more.
    assert run("train", "--like", "out", "--output-dir", "other", "--lr", 0.02, "--eval-every", 0)[0] == 0
    config = json.loads(Path("other/config.json").read_text())
    assert (config["config"]["lr"], config["config"]["max_steps"], config["options"]["targets"]) == (
        0.02,
        3,
        "q_proj,up_proj",
    )


def test_a_run_is_not_done_again_on_other_rows_unawares(run: Run, tiny: Path, data: Path):
    assert run("train", "--model", tiny, "--data", data, *QUICK, "--max-steps", 1, "--output-dir", "out")[0] == 0
    message = the_error(run("train", "--like", "out", "--output-dir", "out"))
    assert "give another --output-dir" in message
    data.write_text(data.read_text().replace("Sea", "Ocean"))
    message = the_error(run("train", "--like", "out", "--output-dir", "b"))
    assert "rows.jsonl has changed since the run in out" in message and not Path("b").exists()
    assert run("train", "--like", "out", "--output-dir", "b", "--data", data)[0] == 0
    assert "holds no config.json" in the_error(run("train", "--like", "nowhere", "--output-dir", "c"))


# --- chat -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    """A random adapter of the tiny model."""
    model = minift.load_model(tiny)
    minift.add_lora(model, minift.LoraConfig(r=2))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.matrices("default")[1], std=0.3)
    return minift.save_adapter(model, tmp_path / "adapter")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("quantize", ["nf4", "int8", "none"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_chat_answers_piped_lines(
    run: Run, tiny: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, with_adapter: bool, quantize: str
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nHow many legs has a spider?\n"))
    options = ["--adapter", adapter] if with_adapter else []
    status, stdout, stderr = run(
        "chat", "--model", tiny, *QUICK[:4], "--quantize", quantize, "--max-new-tokens", 12, *options
    )
    assert status == 0 and not shown(stderr)

    model = minift.load_model(tiny, None if quantize == "none" else quantize)
    if with_adapter:
        minift.load_adapter(model, adapter)
    tokenizer = minift.load_tokenizer(tiny)
    first = generate(model, tokenizer, [user("Hello")], 12)
    conversation = [user("Hello"), {"role": "assistant", "content": first}, user("How many legs has a spider?")]
    second = generate(model, tokenizer, conversation, 12)
    assert stdout == f"{first}\n{second}\n"


def test_the_adapter_changes_the_answers(run: Run, tiny: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch):
    answers = []
    for options in ([], ["--adapter", adapter]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        answers.append(run("chat", "--model", tiny, *QUICK[:4], "--max-new-tokens", 12, *options)[1])
    assert answers[0] != answers[1]


def test_chat_options(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAgain\n\nafter an empty line nobody answers\n"))
    options = ("--max-new-tokens", 8, "--system", "Be brief.", "--no-memory",
               "--temperature", 0.8, "--top-p", 0.9, "--seed", 4)  # fmt: skip
    status, stdout, _ = run("chat", "--model", tiny, *QUICK[:4], "--quantize", "none", *options)
    assert status == 0
    model, tokenizer = minift.load_model(tiny), minift.load_tokenizer(tiny)
    system, sampling = {"role": "system", "content": "Be brief."}, Sampling(0.8, 0.9, 4, top_k=50)  # 50: no file says
    expected = [generate(model, tokenizer, [system, user(text)], 8, sampling) for text in ("Hello", "Again")]
    assert stdout == "".join(f"{answer}\n" for answer in expected)


FILE = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ([], Sampling(0.7, 0.8, 0, 20, 1.1)),
        (["--temperature", 0], Sampling(0.0, 0.8, 0, 20, 1.1)),
        (["--temperature", 1.2], Sampling(1.2, 0.8, 0, 20, 1.1)),
        (["--top-k", 0, "--seed", 3], Sampling(0.7, 0.8, 3, 0, 1.1)),
        (["--top-p", 1, "--repetition-penalty", 1.5], Sampling(0.7, 1.0, 0, 20, 1.5)),
        (["--no-generation-config"], Sampling()),
        (["--no-generation-config", "--temperature", 1, "--top-k", 3], Sampling(1.0, top_k=3)),
    ],
    ids=str,
)
def test_chat_follows_the_generation_config_but_for_given_options(
    run: Run, spoiled: Path, monkeypatch: pytest.MonkeyPatch, options: list, sampling: Sampling
):
    (spoiled / "generation_config.json").write_text(json.dumps(FILE))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    status, stdout, _ = run(
        "chat", "--model", spoiled, *QUICK[:4], "--quantize", "none", "--max-new-tokens", 20, *options
    )
    expected = generate(minift.load_model(spoiled), minift.load_tokenizer(spoiled), [user("Hello")], 20, sampling)
    assert (status, stdout) == (0, f"{expected}\n")


def test_chat_names_a_generation_setting_that_is_not_supported_and_the_way_around(
    run: Run, spoiled: Path, monkeypatch: pytest.MonkeyPatch
):
    (spoiled / "generation_config.json").write_text(json.dumps({"num_beams": 4}))
    command = ["chat", "--model", spoiled, *QUICK[:4], "--quantize", "none", "--max-new-tokens", 4]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    message = the_error(run(*command, "--temperature", 1))
    assert "num_beams to 4" in message and "--no-generation-config" in message
    assert run(*command, "--no-generation-config")[0] == 0


# --- inspect, models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("every", [False, True])
def test_inspect_a_model(run: Run, tiny: Path, quantize: str | None, every: bool):
    options = (["--quantize", quantize] if quantize else []) + (["--all"] if every else [])
    status, stdout, stderr = run("inspect", tiny, *options)
    rows = module_table(minift.load_model(tiny, quantize))
    assert (status, stderr) == (0, "")
    assert stdout == format_table(rows if every else group_layers(rows)) + "\n"
    assert ("nf4 + double quant" in stdout) == (quantize == "nf4")
    assert ("layers.1.self_attn.q_proj" in stdout) == every


def test_inspect_reads_no_weights(run: Run, spoiled: Path):
    (spoiled / "model.safetensors").unlink()
    assert run("inspect", spoiled, "--dtype", "bfloat16")[0] == 0


def test_inspect_an_adapter(run: Run, adapter: Path):
    status, stdout, stderr = run("inspect", adapter)
    assert (status, stderr) == (0, "")
    parameters = sum(value.numel() for value in load_file(adapter / "adapter_model.safetensors").values())
    assert stdout.splitlines()[-1].split() == ["total", "28", f"{4 * parameters:,}", f"{parameters:,}"]


def look(tiny: Path, data: Path, first: int = 3, color: bool = False, **settings: Any) -> Any:
    config = minift.TrainConfig(**settings)
    return look_at(minift.load_tokenizer(tiny), minift.read_dataset(data), config, first, color)


def test_inspect_a_data_set(run: Run, tiny: Path, data: Path):
    """Report, batches and the first rows, as the library makes them; the options reach it."""
    assert run("inspect", "--data", data, "--model", tiny) == (0, f"{look(tiny, data)}\n", "")
    options = ["--loss-on", "assistant", "--max-length", 70, "--packing", "bfd", "--batch-size", 3, "--rows", 2]
    status, stdout, stderr = run("inspect", "--model", tiny, "--data", data, *options)
    settings = {"loss_on": "assistant", "max_length": 70, "packing": "bfd", "batch_size": 3}
    assert (status, stdout, stderr) == (0, f"{look(tiny, data, 2, **settings)}\n", "")
    assert "packed (bfd)" in stdout and "row 2: " in stdout and "\nrow 3: " not in stdout and "[" in stdout


def test_inspect_shows_what_training_refuses(run: Run, tiny: Path, data: Path):
    status, stdout, _ = run("inspect", "--data", data, "--model", tiny, "--max-length", 10)
    assert status == 0
    assert "8, 8 of them dropped" in stdout and "\nrow 1: its " in stdout


def test_inspect_writes_a_page(run: Run, tiny: Path, data: Path):
    data.write_text(json.dumps({"text": "</pre><script>alert(1)</script>"}))
    status, stdout, stderr = run("inspect", "--data", data, "--model", tiny, "--loss-on", "all", "--html", "a/b.html")
    assert (status, stderr) == (0, "")
    assert stdout.endswith("\nSaved a/b.html\n")
    page = Path("a/b.html").read_text("utf-8")
    assert look(tiny, data, loss_on="all")._repr_html_() in page and "<script" not in page


@pytest.mark.parametrize(("terminal", "no_color"), [(True, None), (True, ""), (True, "1"), (False, None)])
def test_colours_only_on_a_terminal_that_wants_them(
    run: Run, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, no_color: str | None
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    wanted = terminal and not no_color
    assert run("inspect", "--data", data, "--model", tiny)[1] == f"{look(tiny, data, color=wanted)}\n"
    assert ("\x1b[4;" in str(look(tiny, data, color=wanted))) == wanted


def test_inspect_wants_either_a_model_or_data(run: Run, tiny: Path, data: Path):
    for arguments in ([], [tiny, "--data", data]):
        error = usage_error(run("inspect", *arguments))
        assert "WHAT" in error and "--data" in error


def test_inspect_names_what_is_wrong_with_data(run: Run, tiny: Path, data: Path):
    assert "none.jsonl does not exist" in the_error(run("inspect", "--data", "none.jsonl", "--model", tiny))
    assert "known name" in the_error(run("inspect", "--data", data, "--model", "smollm3"))
    assert "max_length" in the_error(run("inspect", "--data", data, "--model", tiny, "--max-length", 1))
    assert "--rows" in usage_error(run("inspect", "--data", data, "--model", tiny, "--rows", -1))
    with data.open("a") as file:
        file.write('{"question": "?"}\n')
    assert "line 9" in the_error(run("inspect", "--data", data, "--model", tiny))


def test_settings_of_inspect_are_those_of_a_run():
    options = {option.name: option for option in cli.commands["inspect"].params if isinstance(option, click.Option)}
    for setting in fields(minift.TrainConfig):
        if setting.name in ("loss_on", "max_length", "packing", "batch_size"):
            option = options[setting.name]
            assert option.default == setting.default and (option.help or "").endswith(setting.metadata["help"])
            assert getattr(option.type, "choices", None) == setting.metadata["choices"]


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ([], minift.QuantConfig()),
        (["--quantize", "int8", "--threshold", "2.5"], minift.QuantConfig("int8", threshold=2.5)),
        (
            ["--quantize", "fp4", "--blocksize", "32", "--no-double-quant", "--skip", "lm_head, down_proj"],
            minift.QuantConfig("fp4", 32, False, skip=("lm_head", "down_proj")),
        ),
    ],
)
def test_quantize(run: Run, tiny: Path, tmp_path: Path, options: list[str], config: minift.QuantConfig):
    """The folder is what the library writes with these settings, byte for byte."""
    status, stdout, stderr = run("quantize", "--model", tiny, *options, "--output-dir", tmp_path / "ours")
    assert (status, stderr) == (0, "")
    minift.save_model(minift.load_model(tiny, config), tmp_path / "library")
    for path in (tmp_path / "library").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes(), path.name
    assert config.quant_type in stdout and "without quantization state" in stdout
    assert stdout.splitlines()[-1].startswith(f"Saved {tmp_path / 'ours'}")
    table = run("inspect", tmp_path / "ours")[1]
    assert table.splitlines() == stdout.splitlines()[:-1]
    other = "nf4" if "int8" in options else "int8"
    refused, _, error = run(
        "quantize", "--model", tmp_path / "ours", "--quantize", other, "--output-dir", tmp_path / "again"
    )
    assert refused == 2 and "quantized already" in error and not (tmp_path / "again").exists()


def test_names_of_formats_are_the_librarys():
    """They are written out in cli.py, so that --help is quick."""
    from minift.cli import DTYPE_NAMES, FORMATS
    from minift.numerics.dtypes import DTYPES
    from minift.quant import config

    assert tuple(FORMATS) == config.FORMATS
    assert set(DTYPE_NAMES) == set(DTYPES)


def test_models(run: Run, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    status, stdout, stderr = run("models")
    assert (status, stderr) == (0, "")
    assert all(name in stdout and known.hub_id in stdout and known.note in stdout for name, known in KNOWN.items())
    assert stdout.count("not on this machine yet") == len(KNOWN)
    shutil.copytree(tiny, tmp_path / "cache/smollm2-135m-instruct")
    assert str(tmp_path / "cache/smollm2-135m-instruct") in run("models")[1]


# --- bad input: one line, exit status 2 -------------------------------------------------------------------------------


def test_a_data_file_that_is_not_there(run: Run, tiny: Path, tmp_path: Path):
    assert "none.jsonl does not exist" in the_error(run("train", "--model", tiny, "--data", "none.jsonl", *QUICK))
    assert str(tmp_path) in the_error(run("train", "--model", tiny, "--data", tmp_path, *QUICK))  # a folder


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": [', ["line 3", "not valid JSON"]),
        ("[1, 2]", ["line 3", "JSON object"]),
        ('{"question": "?"}', ["line 3", "'question'"]),
        ('{"messages": [{"role": "robot", "content": "x"}]}', ["line 3", "'robot'"]),
        ('{"messages": [{"role": "user", "content": "no answer"}]}', ["row 3", "assistant"]),
        ('{"text": ""}', ["row 3", "no token to train on"]),
    ],
)
def test_a_bad_row_is_named(run: Run, tiny: Path, data: Path, line: str, words: list[str]):
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    message = the_error(run("train", "--model", tiny, "--data", data, *QUICK))
    assert all(word in message for word in words), message
    assert not Path("minift-run/adapter").exists()


def test_a_row_that_is_cut_before_its_answer(run: Run, tiny: Path, data: Path):
    message = the_error(run("train", "--model", tiny, "--data", data, *QUICK, "--max-length", 10))
    assert "row 1" in message and "max_length 10" in message and "answer" in message


def test_data_shorter_than_one_batch(run: Run, tiny: Path, data: Path):
    message = the_error(run("train", "--model", tiny, "--data", data, *QUICK, "--batch-size", 9))
    assert "8 rows" in message and "batch of 9" in message and "batch_size" in message


@pytest.mark.parametrize("command", [["train", "--data", "rows.jsonl"], ["chat"], ["inspect"], ["demo"]])
@pytest.mark.parametrize("name", ["org/name", "smollm3"])
def test_an_unknown_model(run: Run, data: Path, command: list[str], name: str):
    shutil.copy(data, "rows.jsonl")
    given = [name] if command[0] == "inspect" else ["--model", name]
    message = the_error(run(*command, *given))
    assert name in message
    assert ("cannot be reached" if "/" in name else "known name (smollm2-135m-instruct, ") in message


def spoil_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_text("These are not the tensors you are looking for.\n" * 9)


def spoil_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def spoil_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_safetensors, ["model.safetensors", "not a complete safetensors file"]),
        (spoil_pickle, ["pytorch_model.bin", "pickle"]),
        (spoil_architecture, ["'mamba'", "supported: llama"]),
        (spoil_tokenizer, ["tokenizer.json"]),
    ],
)
@pytest.mark.parametrize("command", ["train", "chat"])
def test_a_bad_checkpoint(run: Run, spoiled: Path, data: Path, spoil: Callable, words: list[str], command: str):
    spoil(spoiled)
    options = ["--data", data, *QUICK] if command == "train" else QUICK[:4]
    message = the_error(run(command, "--model", spoiled, *options))
    assert all(word in message for word in words), message


def test_an_adapter_for_another_model(run: Run, tiny_odd: Path, adapter: Path):
    assert "for another model" in the_error(run("chat", "--model", tiny_odd, *QUICK[:4], "--adapter", adapter))


def test_an_adapter_that_is_none(run: Run, tiny: Path):
    assert "adapter_config.json" in the_error(run("chat", "--model", tiny, *QUICK[:4], "--adapter", tiny))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--rank", 0], "rank must be at least 1, got 0"),
        (["--alpha", 0], "alpha"),
        (["--dropout", 1], "dropout"),
        (["--targets", "query"], "query"),
        (["--targets", "(q_proj"], "(q_proj"),
        (["--targets", ""], "target"),
        (["--lr", 0], "lr must be positive"),
        (["--epochs", 0], "epochs must be at least 1"),
        (["--batch-size", -1], "batch_size"),
        (["--max-length", 1], "max_length"),
        (["--warmup-steps", -1], "warmup_steps"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--device", "toaster"], "device 'toaster' cannot be used here"),
    ],
    ids=str,
)
def test_a_bad_setting(run: Run, tiny: Path, data: Path, options: list, word: str):
    message = the_error(run("train", "--model", tiny, "--data", data, *QUICK, *options))
    assert word in message, message
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["train"], "--data"),
        (["train", "--data", "x", "--rnak", "3"], "--rnak"),
        (["train", "--data", "x", "--rank", "many"], "many"),
        (["train", "--data", "x", "--optimizer", "sgd"], "adamw8bit"),
        (["train", "--data", "x", "--quantize", "int4"], "nf4"),
        (["quantize"], "--output-dir"),
        (["quantize", "--quantize", "none", "--output-dir", "x"], "nf4"),
        (["chat", "--dtype", "float8"], "bfloat16"),
        (["inspect"], "WHAT"),
        (["teach"], "teach"),
    ],
    ids=str,
)
def test_a_wrong_option_is_clicks_usage_error(run: Run, arguments: list[str], word: str):
    assert word in usage_error(run(*arguments))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--temperature", -1], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", 0], "top_p"),
        (["--top-k", -1], "top_k"),
        (["--repetition-penalty", 0], "repetition_penalty"),
        (["--seed", -1], "seed"),
        (["--max-new-tokens", 5000], "context of 2048"),
    ],
    ids=str,
)
def test_bad_settings_of_a_chat(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch, options: list, word: str):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert word in the_error(run("chat", "--model", tiny, *QUICK[:4], *options))


def test_debug_shows_the_traceback(run: Run, tiny: Path):
    _, _, stderr = run("train", "--model", tiny, "--data", "none.jsonl", *QUICK)
    assert "Traceback" not in stderr
    status, _, stderr = run("--debug", "train", "--model", tiny, "--data", "none.jsonl", *QUICK)
    assert status == 2
    assert "Traceback (most recent call last)" in stderr and "read_dataset" in stderr
    assert shown(stderr)[-1].startswith("Error: none.jsonl does not exist")


def test_a_failure_of_the_library_is_named_and_is_status_1(run: Run, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("of\nall things")

    monkeypatch.setattr("minift.sources.resolve.cached_folder", broken)
    assert the_error(run("models"), status=1) == "Error: ZeroDivisionError: of all things"


def test_a_real_standard_error_holds_the_line_and_nothing_else(tiny: Path, tmp_path: Path, data: Path):
    """In a process of its own, into a pipe: no progress bar, no warning, no traceback."""
    process = start("train", "--model", tiny, "--data", data, *QUICK, "--batch-size", 9, cwd=tmp_path)
    status, _, stderr = finish(process)
    assert status == 2
    assert stderr.startswith("Error: the data holds 8 rows") and stderr.count("\n") == 1 and "\r" not in stderr


# --- a full disk ------------------------------------------------------------------------------------------------------


def half_written(folder: Path) -> list[str]:
    """What minift/atomic.py leaves behind if it does not clean up: hidden siblings."""
    return [str(path) for path in folder.rglob(".*")]


@pytest.mark.parametrize("what", ["adapter", "checkpoint"])
def test_a_full_disk_is_status_1_and_nothing_is_half_written(
    run: Run, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch, what: str
):
    def full(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    # By name in sys.modules: `minift.train` is the function, which hides the package of that name.
    module = {"adapter": "minift.adapters.folder", "checkpoint": "minift.train.checkpoint"}[what]
    monkeypatch.setattr(sys.modules[module], "save_file", full)
    message = the_error(run("train", "--model", tiny, "--data", data, *QUICK, "--max-steps", 2), status=1)
    assert "OSError" in message and "No space left on device" in message
    out = Path("minift-run")
    assert not (out / "adapter").exists()
    assert not half_written(out)
    assert len(list((out / "checkpoints").glob("step-*"))) == (1 if what == "adapter" else 0)


def test_a_real_write_that_fails(tiny: Path, data: Path, tmp_path: Path):
    """Files may not grow beyond 20 kB in this process; the checkpoint needs more."""
    pytest.importorskip("resource")  # not on Windows
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    process = start("train", "--model", tiny, "--data", data, *QUICK, "--max-steps", 2, "--rank", 16,
                    setup=limit, cwd=tmp_path)  # fmt: skip
    assert "File too large" in the_error(finish(process), status=1)
    assert not half_written(tmp_path / "minift-run")
    assert not list((tmp_path / "minift-run").glob("*/step-*")) and not (tmp_path / "minift-run/adapter").exists()


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    until = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < until
        time.sleep(0.01)


def test_ctrl_c_saves_a_checkpoint_and_resume_goes_on(run: Run, tiny: Path, data: Path, tmp_path: Path):
    steps = 120
    options = ["train", "--model", tiny, "--data", data, *QUICK, "--max-steps", steps, "--save-every", 5,
               "--output-dir", tmp_path / "out"]  # fmt: skip
    process = start(*options)
    wait_for(lambda: any((tmp_path / "out").glob("checkpoints/step-*")), process)
    process.send_signal(signal.SIGINT)
    status, _, stderr = finish(process)
    assert status == 130
    stopped = re.search(r"Stopped after step (\d+); a checkpoint is in (\S+)\.\n", stderr)
    assert stopped and 5 <= int(stopped[1]) < steps
    assert f"Go on with: minift train --output-dir {tmp_path / 'out'} --resume" in stderr
    assert "Traceback" not in stderr
    assert Path(stopped[2], f"step-{int(stopped[1]):06d}").is_dir()
    assert not (tmp_path / "out/adapter").exists()

    status, stdout, _ = run("train", "--resume", "--output-dir", tmp_path / "out")  # the folder knows the rest
    assert status == 0 and f"in {steps} steps" in stdout
    log = json.loads((tmp_path / "out/log.json").read_text())
    assert [record["step"] for record in log["steps"]] == list(range(1, steps + 1))
    minift.load_adapter(minift.load_model(tiny), tmp_path / "out/adapter")


def test_a_run_with_other_settings_is_not_resumed(run: Run, tiny: Path, data: Path):
    options = ["train", "--model", tiny, "--data", data, *QUICK, "--max-steps", 2]
    assert run(*options)[0] == 0
    message = the_error(run(*options, "--resume", "--lr", 0.5))
    assert "another run" in message and "step-000002" in message


def test_ctrl_c_while_nothing_is_trained_yet_is_130(run: Run, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minift.sources.resolve.cached_folder", interrupted)
    status, _, stderr = run("models")
    assert (status, shown(stderr)) == (130, ["Stopped."])


# --- the demo ---------------------------------------------------------------------------------------------------------


def test_demo(run: Run, tiny: Path):
    """test_demo.py has the details; here it is the command."""
    status, stdout, stderr = run(
        "demo", "--model", tiny, *QUICK[:4], "--rank", 2, "--max-steps", 2, "--output-dir", "out"
    )
    assert status == 0 and not any(line.startswith("Error") for line in shown(stderr))
    assert "Held-out" in stdout and "minift chat --model" in stdout
    assert {path.name for path in Path("out").iterdir()} == {
        "adapter", "answers.json", "checkpoints", "config.json", "log.json", "log.jsonl", "loss.png",
        "memory.json",
    }  # fmt: skip


def test_a_checkpoint_of_peers_own_making(run: Run, tmp_path: Path):
    """A folder as transformers writes it, three layers and no tying, goes through the whole command line."""
    peers.tiny_llama(tmp_path / "model", layers=3, tied=False)
    assert run("inspect", tmp_path / "model", "--quantize", "nf4")[0] == 0


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_prints_the_ledger(run: Run, tiny: Path):
    config = ModelConfig.from_folder(tiny)
    expected = Setting(config, 8, 1024, torch.bfloat16, QuantConfig(), LoraConfig(r=8), device="cuda")
    assert run("memory", "--model", tiny) == (0, predict(expected).format() + "\n", "")
    options = ["--batch", 2, "--length", 64, "--quantize", "none", "--dtype", "float32", "--lora-rank", 3, "--targets",
               "q_proj,v_proj", "--checkpointing", "selective", "--attention", "eager", "--optimizer", "adamw",
               "--packed", "--device", "cpu"]  # fmt: skip
    lora = LoraConfig(r=3, target_modules=("q_proj", "v_proj"))
    changed = Setting(config, 2, 64, torch.float32, None, lora, "selective", "eager", "adamw", True)
    assert run("memory", "--model", tiny, *options) == (0, predict(changed).format() + "\n", "")


def test_memory_of_full_fine_tuning_with_a_budget(run: Run, tiny: Path):
    status, stdout, stderr = run("memory", "--model", tiny, "--full", "--checkpointing", "on", "--budget", "100MB")
    setting = Setting(ModelConfig.from_folder(tiny), 8, 1024, checkpointing=True, device="cuda")
    assert (status, stderr) == (0, "")
    assert stdout == predict(setting).format() + "\n\n" + format_fit(setting, 10**8) + "\n"
    assert "largest batch" in stdout and "adapters" not in stdout


def test_memory_says_what_to_change_if_nothing_fits(run: Run, tiny: Path):
    status, stdout, _ = run("memory", "--model", tiny, "--budget", "100 kB")
    assert status == 0
    assert "no batch fits" in stdout and "no length fits" in stdout and "gradient checkpointing" in stdout


def test_memory_reads_no_weights(run: Run, spoiled: Path):
    (spoiled / "model.safetensors").unlink()
    assert run("memory", "--model", spoiled)[0] == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--budget", "much"], "24GB"),
        (["--batch", 0], "at least 1 row"),
        (["--full", "--quantize", "nf4"], "cannot be trained"),
        (["--rank", 0], "rank"),
        (["--targets", "nothing"], "nothing"),
    ],
    ids=str,
)
def test_memory_refuses(run: Run, tiny: Path, options: list[Any], word: str):
    assert word in the_error(run("memory", "--model", tiny, *options))
