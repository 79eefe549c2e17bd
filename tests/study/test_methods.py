"""The comparison of methods: counts by hand, bytes of fp32 AdamW, the same losses as a plain loop, and the picture."""

from pathlib import Path

import pytest
import torch

import minift
from minift.adapters.bottleneck import PfeifferConfig
from minift.adapters.ia3 import IA3Config
from minift.adapters.own import FullConfig, NormConfig
from minift.adapters.verbs import add_adapter
from minift.data.collate import Batch
from minift.optim.adamw import AdamW
from minift.study.methods import MethodRow, compare, every_method, format_methods, mean_loss, reports

METHODS = {"lora": minift.LoraConfig(r=2), "ia3": IA3Config(), "pfeiffer": PfeifferConfig(), "norms": NormConfig()}


@pytest.fixture(scope="module")
def batches(tiny: Path) -> list[Batch]:
    tokenizer = minift.load_tokenizer(tiny)
    pairs = [("Where is the sea?", "The sea is wide."), ("Name a colour.", "Red, green and blue."), ("8?", "A spider.")]
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in pairs
    ]
    examples = [minift.encode(tokenizer, row, loss_on="completion", max_length=64) for row in rows]
    return [minift.collate(examples[:2], pad_id=0), minift.collate(examples[2:], pad_id=0)]


@pytest.fixture(scope="module")
def rows(tiny: Path, batches: list[Batch]) -> list[MethodRow]:
    return compare(lambda: minift.load_model(tiny), METHODS | {"full": FullConfig()}, batches, steps=4)


def test_counts_and_bytes(rows: list[MethodRow]):
    total = 384 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64) + 64
    lora = 2 * 2 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    counts = {"lora": lora, "ia3": 2 * 192, "pfeiffer": 2 * (2 * 4 * 64 + 64 + 4), "norms": 5 * 64, "full": total}
    assert {row.method: row.trained for row in rows} == counts
    for row in rows:
        assert row.total == total + (0 if row.method in ("norms", "full") else row.trained)
        # fp32, with as large a gradient and two moments.
        assert (row.trained_bytes, row.gradient_bytes) == (4 * row.trained, 4 * row.trained)
        assert 8 * row.trained <= row.optimizer_bytes <= 8 * row.trained + 64 * 30  # and a counter for each of <= 30
        assert row.peak > 4 * row.total + row.optimizer_bytes
        assert row.seconds > 0
    assert len({row.loss_before for row in rows}) == 1


def test_losses_are_those_of_a_plain_loop(tiny: Path, batches: list[Batch], rows: list[MethodRow]):
    """Cross entropy by hand over the labels; four steps of AdamW, one batch each; all operations are the same, in
    another order only in the head, so fp32 agrees to some ulps of a loss near 6."""
    model = minift.load_model(tiny)
    add_adapter(model, NormConfig())
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    def loss(batch: Batch) -> tuple[torch.Tensor, int]:
        logits = model(batch.input_ids_bs, batch.positions_bs, batch.documents_bs).log_softmax(-1)[:, :-1]
        labels = batch.labels_bs[:, 1:]
        shown = labels != -100
        picked = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return -picked[shown].sum(), int(shown.sum())

    for step in range(4):
        value, n = loss(batches[step % 2])
        (value / n).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        parts = [loss(batch) for batch in batches]
        expected = float(sum(value for value, _ in parts)) / sum(n for _, n in parts)
    (row,) = (row for row in rows if row.method == "norms")
    assert row.loss_after == pytest.approx(expected, abs=1e-4)
    assert row.loss_after < row.loss_before - 1e-3
    assert mean_loss(minift.load_model(tiny), batches) == row.loss_before


def test_every_method_is_there():
    assert {"lora", "ia3", "houlsby", "pfeiffer", "parallel", "bitfit", "norms", "full"} <= every_method().keys()
    assert all(name in ("lora", getattr(config, "name", "")) for name, config in every_method().items())


def test_table(rows: list[MethodRow]):
    lines = format_methods(rows).split("\n")
    assert len({len(line) for line in lines}) == 1 and len(lines) == 1 + len(rows)
    assert lines[0].split()[:3] == ["method", "trained", "share"]
    assert lines[-1].split()[:3] == ["full", "98,624", "100.000%"]


def test_reports_are_those_of_the_trained_models(tiny: Path, rows: list[MethodRow]):
    found = reports(lambda: minift.load_model(tiny), METHODS | {"full": FullConfig()})
    assert [(name, said.trained, said.total) for name, said in found.items()] == [
        (row.method, row.trained, row.total) for row in rows
    ]
    assert [said.method for said in found.values()] == list(found)


def test_too_little(tiny: Path, batches: list[Batch]):
    for given, steps in (([], 5), (batches, 2)):
        with pytest.raises(ValueError, match="at least 1 and 3 are needed"):
            compare(lambda: minift.load_model(tiny), METHODS, given, steps)
