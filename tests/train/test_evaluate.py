"""Evaluation: the numbers against transformers' own forward pass; early stops and best checkpoints against a search by
hand through the records; and that looking changes nothing.

Tolerance of the loss: test_step.py derives 2.7e-5 relative for a gradient; the loss lies at the end of half of those
sums, so the same bound holds for it with room.
"""

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import minift
from minift.data.collate import collate, share_prefix
from minift.data.encode import IGNORE, Example, encode
from minift.data.packing import pack
from minift.data.tokenizer import Tokenizer
from minift.train.config import TrainConfig
from minift.train.evaluate import Evaluation, evaluate
from minift.train.loop import TrainResult, train
from minift.train.records import StepRecord, best_step, has_stalled

TOLERANCE = 40 * math.sqrt(128) * 2**-24
step_module, loop = import_module("minift.train.step"), import_module("minift.train.loop")
ROWS, EVAL = peers.demo_rows(9)[:5], peers.demo_rows(9)[5:]


@pytest.fixture(scope="module")
def examples(tiny: Path) -> list[Example]:
    return [encode(Tokenizer(tiny), row) for row in peers.demo_rows(7)]


@pytest.fixture(scope="module")
def theirs(tiny: Path, examples: list[Example]) -> tuple[float, int, int]:
    """Sum of -log p, likeliest tokens that are right, and trained tokens, row by row in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval()
    loss, right, trained = 0.0, 0, 0
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0, :-1]
        for row, label in zip(logits, example.labels[1:], strict=True):
            if label != IGNORE:
                loss -= float(row.log_softmax(-1)[label])
                right += int(row.argmax()) == label
                trained += 1
    return loss, right, trained


@pytest.mark.parametrize("layout", ["one", "two", "alone", "shared", "packed"])
def test_the_numbers_equal_transformers_however_the_rows_are_divided(
    tiny: Path, make_model: Any, examples: list[Example], theirs: tuple[float, int, int], layout: str
):
    """A mean of means would differ from division to division."""
    batches = {
        "one": [collate(examples, 0)],
        "two": [collate(examples[:1], 0), collate(examples[1:], 0)],
        "alone": [collate([example], 0) for example in examples],
        "shared": [share_prefix(collate(examples, 0))],
        "packed": pack(examples, 3 * max(map(len, examples))),
    }[layout]
    found = evaluate(make_model(tiny, r=0), batches)
    loss, right, trained = theirs
    assert found.trained_tokens == trained
    assert math.isclose(found.loss, loss / trained, rel_tol=TOLERANCE)
    assert found.accuracy == right / trained
    assert found.perplexity == pytest.approx(math.exp(loss / trained), rel=found.loss * 2 * TOLERANCE)


def test_accuracy_is_that_of_a_model_that_has_learned(tiny: Path, make_model: Any, examples: list[Example]):
    """A random model is right about nothing, so its accuracy could not tell a shifted comparison from a right one."""
    model = make_model(tiny, r=0)
    batches = [collate(examples, 0)]
    optimizer = minift.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        step_module.train_step(model, batches, optimizer)
    found = evaluate(model, batches)
    with torch.no_grad():
        guess = model(batches[0].input_ids_bs).argmax(-1)[:, :-1]
    label = batches[0].labels_bs[:, 1:]
    assert found.accuracy == (guess == label).sum().item() / (label != IGNORE).sum().item() > 0.5


def test_the_head_sees_a_few_rows_at_a_time(
    tiny: Path, make_model: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
):
    model, rows = make_model(tiny), []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    whole = evaluate(model, [collate(examples, 0)])
    assert rows == [whole.trained_tokens]
    rows.clear()
    monkeypatch.setitem(step_module.LOGITS_AT_ONCE, "cpu", 3 * model.config.vocab_size)
    pieces = evaluate(model, [collate(examples, 0)])
    assert max(rows) == 3 and sum(rows) == whole.trained_tokens
    # The product with the head may sum in another order for another number of rows.
    assert math.isclose(pieces.loss, whole.loss, rel_tol=TOLERANCE) and pieces.accuracy == whole.accuracy


@pytest.mark.parametrize("training", [False, True])
def test_looking_changes_nothing(tiny: Path, make_model: Any, examples: list[Example], training: bool):
    """Dropout is off, so two looks agree; mode, gradients and random numbers are as before."""
    model = make_model(tiny, dropout=0.5, warm=True).train(training)
    random = torch.get_rng_state()
    first, second = (evaluate(model, [collate(examples, 0)]) for _ in range(2))
    assert first == second
    assert model.training is training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_nothing_to_evaluate_is_refused(tiny: Path, make_model: Any):
    with pytest.raises(ValueError, match="nothing to evaluate: no batch holds a label"):
        evaluate(make_model(tiny), [collate([Example([1, 2, 3], [IGNORE] * 3)], 0)])
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(make_model(tiny), [])


def test_perplexity_of_a_hopeless_model_is_infinite():
    assert Evaluation(1000.0, 0.0, 1).perplexity == math.inf
    assert Evaluation(math.log(50), 0.0, 1).perplexity == pytest.approx(50)


# --- what the records decide


def records(losses: list[float | None]) -> list[StepRecord]:
    return [StepRecord(n, 1.0, 1.0, 1e-3, 1, 1, 0.1, eval_loss=loss) for n, loss in enumerate(losses, 1)]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.none(), st.sampled_from([1.0, 2.0, 3.0])), max_size=12), st.integers(0, 4))
def test_best_and_patience_equal_a_counter_that_walks(losses: list[float | None], patience: int):
    """The usual way: keep the lowest so far and count the looks since then."""
    lowest, best, since, stalled = math.inf, None, 0, False
    for number, loss in enumerate(losses, 1):
        if loss is None:
            continue
        if loss < lowest:
            lowest, best, since = loss, number, 0
        else:
            since += 1
        stalled = patience > 0 and since >= patience
    assert best_step(records(losses)) == best
    assert has_stalled(records(losses), patience) == stalled


# --- in a run


def run(model: Any, folder: Path, output: Path, eval_rows: Any = EVAL, **chosen: Any) -> TrainResult:
    given: dict[str, Any] = {"max_steps": 6, "batch_size": 2, "lr": 2e-3} | chosen
    config = TrainConfig(**given, output_dir=str(output))
    return train(model, minift.load_tokenizer(folder), ROWS, config, eval_rows=eval_rows)


def looked(result: TrainResult) -> dict[int, float]:
    return {record.step: record.eval_loss for record in result.steps if record.eval_loss is not None}


@pytest.mark.parametrize(("every", "steps"), [(0, [6]), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6])])
def test_a_run_looks_when_it_should_and_learns_the_same(
    tiny: Path, tmp_path: Path, make_model: Any, every: int, steps: list[int]
):
    model = make_model(tiny, dropout=0.2)
    result = run(model, tiny, tmp_path / "a", eval_every=every)
    assert list(looked(result)) == steps
    blind = run(make_model(tiny, dropout=0.2), tiny, tmp_path / "b", eval_rows=None)
    assert [record.loss for record in blind.steps] == [record.loss for record in result.steps]
    assert looked(blind) == {}
    # The last look is at the weights that were saved.
    tokenizer = minift.load_tokenizer(tiny)
    found = evaluate(model, [collate([encode(tokenizer, row)], 0) for row in EVAL])
    last = result.steps[-1]
    assert last.eval_loss is not None and math.isclose(last.eval_loss, found.loss, rel_tol=TOLERANCE)
    assert last.eval_perplexity == math.exp(last.eval_loss) and last.eval_accuracy == found.accuracy
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line} == looked(result)


def plan_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[int]:
    """Evaluations find these losses in turn; the list that is returned grows with each look."""
    looks: list[int] = []

    def found(*_: Any) -> Evaluation:
        looks.append(1)
        return Evaluation(losses[len(looks) - 1], 0.5, 10)

    monkeypatch.setattr(loop, "evaluate", found)
    return looks


def test_a_run_without_improvement_stops_early_and_goes_on_with_more_patience(
    tiny: Path, tmp_path: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch
):
    plan_losses(monkeypatch, [3.0, 2.0, 2.5, 2.0, 1.0, 1.0])
    first = run(make_model(tiny), tiny, tmp_path, eval_every=1, patience=2)
    assert len(first.steps) == 4 and first.stopped_early and first.finished and first.adapter is not None
    looks = plan_losses(monkeypatch, [1.0, 1.0])
    again = run(make_model(tiny), tiny, tmp_path, eval_every=1, patience=2, resume=True)
    assert len(again.steps) == 4 and again.stopped_early and looks == []
    more = run(make_model(tiny), tiny, tmp_path, eval_every=1, patience=3, resume=True)
    assert len(more.steps) == 6 and not more.stopped_early and more.finished
    whole = run(make_model(tiny), tiny, tmp_path / "whole", eval_rows=None)
    assert [record.loss for record in more.steps] == [record.loss for record in whole.steps]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("resumed", [False, True])
def test_best_keeps_the_best_checkpoint_and_ends_with_its_weights(
    tiny: Path, tmp_path: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch, resumed: bool
):
    plan_losses(monkeypatch, [3.0, 1.5, 2.5, 2.0, 1.5, 1.6])
    model = make_model(tiny)
    result = run(model, tiny, tmp_path / "run", eval_every=1, best=True, keep_last=1)
    assert names(tmp_path / "run" / "checkpoints") == ["step-000002", "step-000006"]
    if resumed:  # a finished run: the last checkpoint is read, no step is taken, the best is put back
        model = make_model(tiny, seed=3)
        result = run(model, tiny, tmp_path / "run", eval_every=1, best=True, keep_last=1, resume=True)
    assert result.weights_of == 2
    monkeypatch.undo()
    short = make_model(tiny)
    run(short, tiny, tmp_path / "two", eval_rows=None, max_steps=6, save_every=2, keep_last=9)
    from safetensors.torch import load_file

    wanted = load_file(tmp_path / "two" / "checkpoints" / "step-000002" / "trainable.safetensors")
    got = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert not all(torch.equal(p, wanted[name]) for name, p in short.named_parameters() if p.requires_grad)
    saved = minift.load_model(tiny, dtype=torch.float32)
    assert result.adapter is not None
    minift.load_adapter(saved, result.adapter)
    assert all(torch.equal(p, wanted[name]) for name, p in saved.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_stay(tiny: Path, tmp_path: Path, make_model: Any, keep: int):
    run(make_model(tiny), tiny, tmp_path, eval_rows=None, save_every=1, keep_last=keep)
    assert names(tmp_path / "checkpoints") == [f"step-{step:06d}" for step in range(7 - keep, 7)]


def test_eval_every_without_rows_is_refused(tiny: Path, tmp_path: Path, make_model: Any):
    with pytest.raises(ValueError, match="eval_every needs rows to evaluate on"):
        run(make_model(tiny), tiny, tmp_path / "run", eval_rows=None, eval_every=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "fault"),
    [([], "no rows"), ([{"text": ""}], r"cannot be trained on|all 1 rows are refused"), (EVAL[:1], "another run")],
    ids=["none", "nothing-to-learn", "others-than-before"],
)
def test_bad_evaluation_rows_are_refused(tiny: Path, tmp_path: Path, make_model: Any, rows: Any, fault: str):
    run(make_model(tiny), tiny, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=fault):
        run(make_model(tiny), tiny, tmp_path, eval_rows=rows, max_steps=1, resume=True)
