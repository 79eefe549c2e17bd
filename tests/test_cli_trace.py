"""`minift trace`: the page it writes, what it says, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import minift
from minift.cli import cli, main
from minift.demo import yoda_rows
from minift.study.trace import trace

Run = Callable[..., tuple[int, str, str]]

ROWS = [
    {"messages": [{"role": "user", "content": f"{word}?"}, {"role": "assistant", "content": f"The {word} is wide."}]}
    for word in ("sea", "sky", "sun")
]
QUICK = ("--dtype", "float32", "--device", "cpu", "--quantize", "none", "--steps", 2)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("--model", ...) -> exit status, standard output, standard error of `minift trace`, in an empty folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["trace", *map(str, arguments)])
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def left(stderr: str) -> list[str]:
    """What is left to see on a terminal after a progress bar has wiped its line."""
    lines = (line.rpartition("\r")[2].strip() for line in stderr.split("\n"))
    return [line for line in lines if line]


def test_a_page(run: Run, tiny: Path, data: Path):
    status, stdout, stderr = run("--model", tiny, "--data", data, *QUICK, "--row", 2, "--rank", 4, "--lr", 0.01)
    assert (status, left(stderr)) == (0, [])
    assert "Tracing" in stderr and "step 2 of 2" in stderr
    before, after, saved = stdout.splitlines()
    assert before.startswith("Before  ") and after.startswith("After   ") and saved == "Saved   trace.html"
    page = Path("trace.html").read_text("utf-8")
    assert page.startswith("<!doctype html>") and "The sky is wide." in page and "Row 2" in page
    assert [path.name for path in Path().iterdir()] == ["trace.html"]


def test_text_equals_that_of_the_library(run: Run, tiny: Path, data: Path):
    options = ("--max-length", 100, "--lr", 0.02, "--schedule", "linear", "--loss-on", "assistant", "--rank", 2,
               "--weight-decay", 0.5, "--max-grad-norm", 0.25, "--alpha", 3, "--targets", "q_proj")  # fmt: skip
    status, stdout, stderr = run("--model", tiny, "--data", data, *QUICK, "--output", "-", *options)
    assert (status, left(stderr)) == (0, []) and not [*Path().iterdir()]
    model = minift.load_model(tiny, dtype=torch.float32)
    torch.manual_seed(0)
    minift.add_lora(model, minift.LoraConfig(r=2, alpha=3, target_modules=("q_proj",)))
    config = minift.TrainConfig(max_length=100, lr=0.02, schedule="linear", loss_on="assistant", weight_decay=0.5,
                                max_grad_norm=0.25)  # fmt: skip
    assert stdout == f"{trace(model, minift.load_tokenizer(tiny), ROWS, 0, config, 2)}\n"


def test_the_embedded_rows_are_the_default(run: Run, tiny: Path):
    status, stdout, _ = run("--model", tiny, *QUICK, "--row", 450, "--output", "-", "--steps", 1)
    question, answer = (message["content"] for message in yoda_rows("train")[449]["messages"])
    assert status == 0 and f"user: {question}\n  assistant: {answer}\n" in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--row", 4), "--row 4: {data} holds 3 rows, counted from 1"),
        (("--row", 0), "--row 0: {data} holds 3 rows, counted from 1"),
        (("--lr", 0), "lr must be positive, got 0.0"),
        (("--max-length", 10), "row 1: its"),
        (("--targets", "nothing"), "nothing"),
        (("--rank", 0), "r"),
    ],
)
def test_one_sentence_about_what_is_wrong(run: Run, tiny: Path, data: Path, arguments: tuple, message: str):
    Path("trace.html").write_text("old")
    status, stdout, stderr = run("--model", tiny, "--data", data, *QUICK, *arguments)
    (line,) = left(stderr)
    assert (status, stdout) == (2, "") and line.startswith("Error: ") and message.format(data=data) in line
    assert Path("trace.html").read_text() == "old" and len([*Path().iterdir()]) == 1


def test_files_that_are_none(run: Run, tiny: Path, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("")
    for name, message in (("empty.jsonl", "holds no rows"), ("missing.jsonl", "does not exist")):
        status, _, stderr = run("--model", tiny, "--data", tmp_path / name, *QUICK)
        (line,) = left(stderr)
        assert status == 2 and line.startswith("Error: ") and message in line


@pytest.mark.parametrize(("option", "value", "message"), [("--steps", 0, "x>=1"), ("--output", "..", "is a directory")])
def test_usage(run: Run, tiny: Path, option: str, value: object, message: str):
    status, stdout, stderr = run("--model", tiny, option, value)
    assert (status, stdout) == (2, "") and stderr.startswith("Usage: minift trace ") and message in stderr


def test_a_full_disk_leaves_no_half_page(run: Run, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    status, _, stderr = run("--model", tiny, "--data", data, *QUICK)
    assert status == 1 and left(stderr) == ["Error: OSError: disk full"] and not [*Path().iterdir()]


def test_help():
    result = CliRunner().invoke(cli, ["trace", "--help"], terminal_width=200)
    assert result.exit_code == 0
    output = " ".join(result.output.split())
    for option in ("--data", "--row", "--steps", "--output", "--lr", "--loss-on", "--rank", "--model", "--attention"):
        assert option in output
    assert "counted from 1" in output and "[default: trace.html]" in output and "[default: 0.001]" in output
