"""The showdown counts what can be counted by hand, agrees with the book where that is arithmetic, times in turns."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minift.study import showdown as module
from minift.study.book_tables import OPT_350M
from minift.study.showdown import (
    ATTENTIONS,
    BOOK,
    WORKSPACE,
    Cost,
    format_costs,
    layer_bytes,
    layer_flops,
    layer_seconds,
    showdown,
)

WEIGHTS = 4 * (1024 * 1024 + 1024) * 2  # bytes in 16 bits


def held(tokens: int, batch: int = 2) -> int:
    """Of a hidden state."""
    return batch * tokens * 1024 * 2


def test_the_book_table():
    """Its ratios, as they are printed."""
    found = {(cost.attention, cost.tokens): cost for cost in BOOK}
    for name, memory, time in (("steps", 9.87, 1.89), ("sdpa", 2.58, 1.00), ("flash", 2.45, 1.00)):
        short, long = found[name, 256], found[name, 1024]
        assert long.bytes / short.bytes == pytest.approx(memory, abs=0.005)
        assert long.seconds / short.seconds == pytest.approx(time, abs=0.006)


@pytest.mark.parametrize("name", ["sdpa", "flash"])
def test_fused_attention_keeps_nothing_of_the_scores(name: str):
    """q, k, v, what attention found and the result, for each of three passes, and one fp32 number a query and head."""
    sums = 2 * 64 * 16 * 4
    for graphs in (1, 3):
        assert layer_bytes(name, 64, graphs=graphs) == WEIGHTS + held(64) + graphs * (5 * held(64) + sums)


def test_the_books_flash_attention_holds_three_graphs():
    """To the digits that the book prints: weights, input, 15 hidden states, sums, and the workspace of products. SDPA
    has one hidden state more in each graph."""
    book = {(cost.attention, cost.tokens): cost.bytes for cost in BOOK}
    for s in (256, 1024):
        flash = WEIGHTS + held(s) + 3 * (5 * held(s) + 2 * s * 16 * 4) + WORKSPACE
        assert book["flash", s] == pytest.approx(flash, abs=10_000)
        assert book["sdpa", s] == pytest.approx(flash + 3 * held(s), abs=10_000)


def test_written_out_attention_keeps_the_scores():
    """By autograd probabilities in fp32 and 16 bits stay of a pass: 3 score tensors; at the worst moment of the next
    there are scores, masked scores, a copy in fp32 and probabilities in fp32: 6. A GPU needs no copy and the book no
    mask, but the probabilities in 16 bits are there at its worst moment: 4."""
    score = 2 * 16 * 256 * 256 * 2
    for graphs in (1, 2, 3):
        written_out, fused = (layer_bytes(name, 256, graphs=graphs) for name in ("steps", "flash"))
        assert (written_out - fused) / score == pytest.approx(3 * (graphs - 1) + 6, abs=0.1)
    assert layer_bytes("eager", 256) < layer_bytes("steps", 256)
    for tokens in (256, 1024):
        book = {cost.attention: cost.bytes for cost in BOOK if cost.tokens == tokens}
        assert (book["steps"] - book["flash"]) / (2 * 16 * tokens**2 * 2) == pytest.approx(3 + 3 + 4, abs=0.3)


def test_numbers_are_counted_in_their_dtype():
    assert layer_bytes("sdpa", 32, dtype=torch.float32) > 1.9 * layer_bytes("sdpa", 32)


def test_all_ways_compute_the_same():
    """Attention of 20 tokens in fp32; sums of 20 terms of about 1, each of 2^-24 relative error."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 16, 20, 64) for _ in range(3))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for attend in ATTENTIONS.values():
        assert (attend(q, k, v, None, None, 0.0) - theirs).abs().max() < 1e-5


def test_flops_by_counting_products():
    """64 tokens: four layers of 1024 x 1024 and two products of 64 x 64 x 64 for each of 16 heads."""
    assert layer_flops(64, batch=1) == 2 * (4 * 64 * 1024 * 1024 + 2 * 16 * 64 * 64 * 64)
    assert layer_flops(64, batch=3) == 3 * layer_flops(64, batch=1)
    assert OPT_350M.hidden_size == 1024


def test_the_clock_takes_turns_and_the_median(monkeypatch: pytest.MonkeyPatch):
    """A clock that says 9 for the warm-up of each way, then 1, 8, 2 times the place of the way."""
    calls: list[float] = []

    def clock(run: object, passes: int, device: str) -> float:
        turn, place = divmod(len(calls), len(ATTENTIONS))
        calls.append(0.0)
        return (9, 1, 8, 2)[turn] * (place + 1.0)

    monkeypatch.setattr(module, "_clock", clock)
    assert layer_seconds(8, repeats=3) == {name: 2.0 * (place + 1) for place, name in enumerate(ATTENTIONS)}
    assert len(calls) == 4 * len(ATTENTIONS)


def test_a_table_of_this_machine():
    counted = [Cost(name, 16, 1000 + place) for place, name in enumerate(ATTENTIONS)]
    found = showdown(tokens=(16, 32), repeats=1, counted=counted)
    assert [(cost.attention, cost.tokens) for cost in found] == [(name, s) for s in (16, 32) for name in ATTENTIONS]
    assert [cost.bytes for cost in found[:4]] == [1000, 1001, 1002, 1003]
    assert found[6].bytes == layer_bytes("sdpa", 32)
    assert all(cost.seconds > 0 for cost in found)


def test_the_table_as_text():
    text = format_costs(BOOK)
    assert text.splitlines()[0].split() == ["MB", "256", "MB", "1,024", "ratio", "ms", "256", "ms", "1,024", "ratio"]
    assert text.splitlines()[1].split() == ["steps", "75.63", "746.72", "9.87", "0.4038", "0.7645", "1.89"]
    untimed = format_costs([replace(cost, seconds=0.0) for cost in BOOK])
    assert untimed.splitlines()[2].split() == ["sdpa", "37.99", "98.05", "2.58"]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="unknown attention 'fast': choose one of steps, eager, sdpa, flash"):
        layer_bytes("fast", 8)
    with pytest.raises(ValueError, match="0 repeats: at least 1"):
        showdown(repeats=0)
