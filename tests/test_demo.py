"""The main job: its data, its yardstick, and the whole of it, on the tiny model and (slow) on the real one."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import minift
from minift.adapters.inject import lora_layers
from minift.cli import DEMO
from minift.demo import SHOWN, run_demo, same_word_order, yoda_rows
from minift.model.generate import generate_batch

# --- the data ---------------------------------------------------------------------------------------------------------


def test_450_and_50_rows_that_have_nothing_in_common():
    train, heldout = yoda_rows("train"), yoda_rows("heldout")
    assert (len(train), len(heldout)) == (450, 50)
    for turn in (0, 1):
        sentences = Counter(row["messages"][turn]["content"].lower() for row in [*train, *heldout])
        assert max(sentences.values()) == 1


def test_a_row_is_one_question_and_one_answer():
    for row in [*yoda_rows("train"), *yoda_rows("heldout")]:
        assert row.keys() == {"messages"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message.keys() == {"role", "content"} for message in row["messages"])


def pairs(part: str) -> list[tuple[str, str]]:
    return [(user["content"], assistant["content"]) for user, assistant in (row["messages"] for row in yoda_rows(part))]


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_an_answer_is_its_sentence_turned_once(part: str):
    """`A B.` becomes `B, A.`: the same words, one comma more, a capital letter at the beginning and where there was
    one in the middle of the sentence (a name, or "I")."""
    for sentence, answer in pairs(part):
        where = f"{sentence} -> {answer}"
        assert sentence == sentence.strip() and answer == answer.strip(), where
        assert "  " not in sentence + answer and "," not in sentence, where
        assert sentence[-1] == answer[-1] == "." and "." not in sentence[:-1] + answer[:-1], where
        assert answer.count(",") == 1, where
        front, back = (part.split(" ") for part in answer[:-1].split(", "))
        words, turned = sentence[:-1].split(" "), [*front, *back]
        cut = len(words) - len(front)
        assert 0 < cut < len(words), where
        rotated = words[cut:] + words[:cut]
        assert [word.lower() for word in turned] == [word.lower() for word in rotated], where

        assert words[0][0].isupper() and turned[0][0].isupper(), where
        assert turned[0][1:] == rotated[0][1:], where
        for position in range(1, len(words)):
            word, original = turned[position], rotated[position]
            if position == len(front):  # it began the sentence: small now, unless it is a name or "I"
                assert word in (original, original[0].lower() + original[1:]), where
            else:
                assert word == original, where


SMALL = {"the", "a", "an", "he", "she", "it", "we", "they", "you", "this", "that", "my", "your", "his", "her", "our"}


def test_the_word_that_began_a_sentence_keeps_its_capital_only_if_it_is_a_name():
    """What keeps its capital letter is written small nowhere; what loses it is neither "I" nor a known name."""
    rows = pairs("train") + pairs("heldout")
    inside = [word for sentence, _ in rows for word in sentence[:-1].split()[1:]]
    small, names = {word for word in inside if word[0].islower()}, {word for word in inside if word[0].isupper()}
    for sentence, answer in rows:
        first, moved = sentence.split()[0], answer.split(", ")[1].rstrip(".").split()[0]
        if moved[0].isupper():
            assert moved.lower() not in small | SMALL, sentence
        else:
            assert first not in names and first.split("'")[0] != "I", sentence


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("Still warm, the bread is.", "Still warm, the bread is.", True),
        ("still warm the bread is", "Still warm, the bread is.", True),
        ("  STILL warm --\nthe bread is!!", "Still warm, the bread is.", True),
        ("The bread is still warm.", "Still warm, the bread is.", False),
        ("Still warm, the bread is. Yes.", "Still warm, the bread is.", False),
        ("Still warm, the bread", "Still warm, the bread is.", False),
        ("Still warm, the breads is.", "Still warm, the bread is.", False),
        ("", "Still warm, the bread is.", False),
        ("Don't, I", "Don't, I.", True),
        ("Dont, I", "Don't, I.", False),
        ("Café, the", "café the", True),
        ("12 eggs, I have", "12 eggs I have.", True),
    ],
)
def test_same_word_order(answer: str, reference: str, same: bool):
    assert same_word_order(answer, reference) == same


def test_the_yardstick_tells_the_answers_from_the_sentences():
    """Or a model that repeats what it is told would already be right."""
    for row in yoda_rows("heldout"):
        sentence, answer = (message["content"] for message in row["messages"])
        assert same_word_order(answer, answer) and not same_word_order(sentence, answer)


# --- the run ----------------------------------------------------------------------------------------------------------


def demo_config(folder: Path, **changes: object) -> minift.TrainConfig:
    settings: dict = DEMO | changes | {"output_dir": str(folder)}
    return minift.TrainConfig(**settings)


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_the_demo_from_end_to_end(tiny: Path, tmp_path: Path, quantize: str | None):
    said: list[str] = []
    config = demo_config(tmp_path / "out", max_steps=3, batch_size=4)
    lora = minift.LoraConfig(r=2, target_modules=("q_proj", "down_proj"))
    result = run_demo(str(tiny), quantize, torch.float32, "cpu", lora, config, said.append)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "adapter", "answers.json", "checkpoints", "config.json", "log.json", "log.jsonl", "loss.png",
        "memory.json",
    }  # fmt: skip
    assert result.training.finished and result.training.output_dir == out and result.training.adapter == out / "adapter"

    # The numbers in the files are those that were returned, and those that were said.
    answers = json.loads((out / "answers.json").read_text(encoding="utf-8"))
    heldout = yoda_rows("heldout")
    assert [(a["sentence"], a["reference"]) for a in answers] == [
        tuple(message["content"] for message in row["messages"]) for row in heldout
    ]
    for when, share in (("before", result.right_before), ("after", result.right_after)):
        assert share == sum(same_word_order(a[when], a["reference"]) for a in answers) / 50
    log = json.loads((out / "log.json").read_text())
    assert log["model"] == str(tiny) and log["config"]["max_steps"] == 3
    assert [record["loss"] for record in log["steps"]] == [record.loss for record in result.training.steps]
    assert [record["step"] for record in log["steps"]] == [1, 2, 3]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = "\n".join(said)
    assert f"{log['steps'][0]['loss']:.3f} -> {log['steps'][-1]['loss']:.3f} in 3 steps" in report
    assert f"{result.right_after:.0%} of 50 sentences" in report and f"(before: {result.right_before:.0%})" in report
    assert f"minift chat --model {tiny} --adapter {out / 'adapter'}" in report
    weights = 384 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64) + 64
    trained = 2 * 2 * (64 + 64 + 128 + 64)
    assert f"{weights:,} weights" in report and f"on 4 layers: {trained:,} trained parameters" in report
    assert report.count("\nsentence   ") == SHOWN
    for line in (answers[0]["sentence"], answers[SHOWN - 1]["sentence"]):
        assert line in report

    # The saved adapter gives the answers that were written down.
    model, tokenizer = minift.load_model(tiny, quantize, torch.float32, attention="eager"), minift.load_tokenizer(tiny)
    questions = [row["messages"][:1] for row in heldout]
    assert generate_batch(model, tokenizer, questions, 24) == [a["before"] for a in answers]
    minift.load_adapter(model, out / "adapter")
    assert len(lora_layers(model)) == 4
    assert generate_batch(model, tokenizer, questions, 24) == [a["after"] for a in answers]


def test_a_demo_that_is_stopped_says_so(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By Ctrl-C: the result of training is not finished, so there are no answers after it."""
    from minift.train.loop import TrainResult

    monkeypatch.setattr("minift.demo.train", lambda *_, **__: TrainResult(output_dir=tmp_path))
    said: list[str] = []
    result = run_demo(str(tiny), None, torch.float32, "cpu", minift.LoraConfig(r=2), demo_config(tmp_path), said.append)
    assert not result.training.finished
    assert result.right_after != result.right_after  # nan
    assert not list(tmp_path.glob("answers.json")) and not any("Held-out" in line for line in said)


@pytest.mark.slow
def test_the_real_demo(real: Path, tmp_path: Path):
    """`minift demo` with its own settings: the model learns the rule, and did not know it before."""
    from minift.numerics.dtypes import fast_dtype

    said: list[str] = []
    config = demo_config(tmp_path)
    result = run_demo(str(real), "nf4", fast_dtype("cpu"), "cpu", minift.LoraConfig(), config, said.append)
    print("\n".join(said))
    assert result.right_before < 0.1
    assert result.right_after >= 0.6
    assert result.training.steps[-1].loss < 0.5 * result.training.steps[0].loss
    assert len(result.training.steps) == DEMO["epochs"] * 29  # 450 rows in batches of 16
