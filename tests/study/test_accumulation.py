"""Both ways of accumulating against transformers' loss with and without `num_items_in_batch`."""

import math
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from transformers import AutoModelForCausalLM

import minift
from minift.data.collate import collate
from minift.data.encode import IGNORE, Example, encode
from minift.study.accumulation import compare_accumulation

# Two orders of the same fp32 sums: 40 sums of up to 128 terms lie between a weight and the loss (tests/train/
# test_step.py), relative to a tensor's largest element; a whole gradient's length averages over these.
TOLERANCE = 40 * math.sqrt(128) * 2**-24


@pytest.fixture(scope="module")
def examples(tiny: Path) -> list[Example]:
    """Answers of very different length."""
    tokenizer = minift.load_tokenizer(tiny)
    rows = [
        {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "sea " * count}]}
        for count in (1, 30, 4)
    ]
    return [encode(tokenizer, row) for row in rows]


@pytest.fixture(scope="module")
def theirs(tiny: Path, examples: list[Example]) -> dict[str, tuple[float, torch.Tensor]]:
    """transformers, a row a micro-batch: its loss with the step's count of tokens, and the mean of its mean losses."""
    found = {}
    total = sum(example.trained_tokens for example in examples)
    for name in ("right", "wrong"):
        model: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).train()
        model.model.embed_tokens.padding_idx = None
        loss = torch.zeros(())
        for example in examples:
            ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
            given = {"num_items_in_batch": torch.tensor(total)} if name == "right" else {}
            part = model(input_ids=ids, labels=labels, use_cache=False, **given).loss
            part = part if name == "right" else part / len(examples)
            part.backward()
            loss = loss + part.detach()
        grads = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
        found[name] = float(loss), grads
    return found


def test_both_ways_equal_transformers(tiny: Path, examples: list[Example], theirs: dict[str, Any]):
    model = minift.load_model(tiny, dtype=torch.float32).requires_grad_(True)
    whole, right, wrong = compare_accumulation(model, examples).ways
    for way, (loss, grad) in ((right, theirs["right"]), (wrong, theirs["wrong"])):
        assert math.isclose(way.loss, loss, rel_tol=TOLERANCE)
        assert math.isclose(way.grad_norm, float(grad.norm()), rel_tol=TOLERANCE)
    assert math.isclose(whole.loss, right.loss, rel_tol=TOLERANCE)
    assert (whole.error, whole.angle) == (0.0, 0.0)
    assert right.error < TOLERANCE and right.angle < math.degrees(TOLERANCE)
    truth, off = theirs["right"][1], theirs["wrong"][1]
    error = float((off - truth).norm() / truth.norm())
    angle = math.degrees(math.acos(float(off @ truth / (off.norm() * truth.norm()))))
    assert math.isclose(wrong.error, error, rel_tol=10 * TOLERANCE) and error > 0.1
    # The arc cosine loses digits: at a cosine c, an error e of c becomes e / sin(angle).
    assert abs(wrong.angle - angle) < math.degrees(10 * TOLERANCE / math.sin(math.radians(angle))) and angle > 1


def test_equally_many_tokens_hide_the_bug(tiny: Path, examples: list[Example]):
    """Why it was not noticed for years: with the loss on all tokens of full windows, both are the same."""
    model = minift.load_model(tiny, dtype=torch.float32).requires_grad_(True)
    alike = [Example(list(range(start, start + 9)), [IGNORE, *range(start + 1, start + 9)]) for start in (3, 40, 80)]
    study = compare_accumulation(model, alike)
    assert study.trained_tokens == (8, 8, 8)
    assert study.ways[2].error < TOLERANCE


def test_it_leaves_the_model_as_it_was(tiny: Path, examples: list[Example]):
    model = minift.load_model(tiny, dtype=torch.float32).requires_grad_(True)
    before = [p.detach().clone() for p in model.parameters()]
    compare_accumulation(model, examples, batch_size=2)
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(model.parameters(), before, strict=True))


def test_it_prints_as_a_table(tiny: Path, examples: list[Example]):
    model = minift.load_model(tiny, dtype=torch.float32).requires_grad_(True)
    study = compare_accumulation(model, examples, batch_size=2)
    lines = str(study).splitlines()
    counts = [collate(part, 0).trained_tokens for part in (examples[:2], examples[2:])]
    assert lines[0] == f"trained tokens of the micro-batches: {counts[0]}, {counts[1]}"
    for way, line in zip(study.ways, lines[3:], strict=True):
        assert line.startswith(way.name) and f"{way.loss:.4f}" in line and f"{way.grad_norm:.4f}" in line


def test_what_cannot_be_compared_is_refused(tiny: Path, examples: list[Example]):
    model = minift.load_model(tiny, dtype=torch.float32).requires_grad_(True)
    for size in (0, 3):
        with pytest.raises(ValueError, match=r"3 rows in batches of .* are not several"):
            compare_accumulation(model, examples, size)
    with pytest.raises(ValueError, match="micro-batch 2 holds no trained token"):
        compare_accumulation(model, [examples[0], Example([1, 2], [IGNORE, IGNORE])])
    with pytest.raises(ValueError, match="nothing to train"):
        compare_accumulation(model.requires_grad_(False), examples)


def test_demo_rows_show_it_too(tiny: Path):
    """Ordinary rows: a few per cent, which is what users saw and could not explain."""
    tokenizer = minift.load_tokenizer(tiny)
    rows = [encode(tokenizer, row) for row in peers.demo_rows(8)]
    wrong = compare_accumulation(minift.load_model(tiny, dtype=torch.float32).requires_grad_(True), rows, 2).ways[2]
    assert wrong.error > 100 * TOLERANCE
