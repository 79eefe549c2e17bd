"""The book's tables, filled by real steps: every row is there, and what is measured is what was predicted."""

from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from pictures import texts

from minift.model.decoder import CausalLM
from minift.study import ablations
from minift.study.ablations import (
    CASES,
    INT8_CASES,
    Case,
    Filled,
    fill,
    format_table,
    narrow_opt,
    ratios,
    take_steps,
)
from minift.study.book_tables import ABLATIONS, INT8_ABLATIONS, OPT_350M, setting_of_row
from minift.study.ledger import predict
from minift.study.plots.memory import ablation_runs

LORA = [case for case in CASES if case.book.lora]
BY_LABEL = {case.label: case for case in (*CASES, *INT8_CASES)}


@pytest.fixture(scope="module")
def filled() -> dict[tuple[str, str], Filled]:
    """LoRA in some ways, and full fine-tuning with each optimizer, by label and attention."""
    fused = ("500, LoRA", "500, full", "500, full, 8-bit Adam", "500, full, accumulation", "2000, int8 bf16, ckpt")
    both = ("2000, LoRA", "2000, LoRA, ckpt")
    found = [*fill((BY_LABEL[name] for name in both), progress=False),
             *fill((BY_LABEL[name] for name in fused), ("sdpa",), progress=False)]  # fmt: skip
    return {(one.case.label, one.attention): one for one in found}


# --- the cases --------------------------------------------------------------------------------------------------------


def test_every_row_of_the_book_is_a_case():
    assert {case.book for case in CASES} == set(ABLATIONS) and [c.book for c in INT8_CASES] == list(INT8_ABLATIONS)
    assert len(CASES) == 16 and len(BY_LABEL) == 16 + 8
    assert [case.label for case in CASES if case.accumulation == 2] == [
        "500, full, accumulation", "2000, full, accumulation",
        "500, full, accumulation, ckpt", "2000, full, accumulation, ckpt",
    ]  # fmt: skip


def test_the_book_size_is_the_setting_of_its_row():
    for case in (*CASES, *INT8_CASES):
        here, there = case.setting("eager", 1, "cuda"), setting_of_row(case.book, "eager")
        if case.accumulation == 2:
            there = replace(there, optimizer="adamw", accumulation=2)
        assert here == there


@pytest.mark.parametrize("narrower", [1, 4, 16])
def test_a_narrower_opt_is_smaller_by_the_square(narrower: int):
    """All matrices by narrower^2: of the layers, the embedding half as wide as they, its projections, and positions."""
    assert narrow_opt(1) == OPT_350M
    with torch.device("meta"):
        model = CausalLM(narrow_opt(narrower))
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    h, v, positions = 1024 // narrower, 50272 // narrower, 2048 // narrower + 2
    assert matrices == 24 * 12 * h * h + h * h + v * h // 2 + positions * h
    assert model.config.num_hidden_layers == 24 and model.config.num_attention_heads == 16


@pytest.mark.parametrize("narrower", [0, 3, 128])
def test_heads_stay_whole(narrower: int):
    with pytest.raises(ValueError, match=f"heads of 64 numbers cannot be {narrower} times narrower"):
        narrow_opt(narrower)


# --- measured ---------------------------------------------------------------------------------------------------------


def test_what_is_measured_was_predicted(filled: dict[tuple[str, str], Filled]):
    """Within 2 %: what the ledger promises on a CPU is 10 %."""
    assert len(filled) == 2 * 2 + 5
    for one in filled.values():
        assert one.measured is not None and one.predicted == pytest.approx(one.measured, rel=0.02)
        assert one.narrower == 16 and one.enlarged == one.measured * 256 / 1e6


def test_a_narrow_model_tells_of_the_real_one(filled: dict[tuple[str, str], Filled]):
    """What was measured times 256 against the ledger of OPT-350M itself, on a GPU, where all logits are made at a time,
    as those of a small model are anywhere. Biases and norms, 0.1 % of its numbers, are 1/16 as many and not 1/256, and
    tensors of less than 4096 numbers keep the states of 8-bit Adam in fp32, which here are more."""
    for one in filled.values():
        real = predict(one.case.setting(one.attention, 1, "cuda")).peak
        assert one.enlarged == pytest.approx(real / 1e6, rel=0.08 if one.case.book.small_state else 0.04)


def test_fused_attention_with_lora_takes_what_the_book_measured(filled: dict[tuple[str, str], Filled]):
    """The one thing that both programs do alike (book_tables.py)."""
    for label, book in (("500, LoRA", 1287), ("2000, LoRA", 3109)):
        assert filled[label, "sdpa"].book == book
        assert filled[label, "sdpa"].enlarged == pytest.approx(book, rel=0.06)


def test_eager_attention_stores_its_scores(filled: dict[tuple[str, str], Filled]):
    """2 bytes a score in every layer, 8 in the book; the fused one keeps its output instead, 2 h bytes a token."""
    eager, fused = (filled["2000, LoRA", name].measured for name in ("eager", "sdpa"))
    assert eager and fused
    assert (eager - fused) / (24 * 16 * 125**2) == pytest.approx(2 - 2 * 64 / (16 * 125), abs=0.1)


def test_accumulation_saves_no_state(filled: dict[tuple[str, str], Filled]):
    """Against the book's table, where it is as small as 8-bit Adam."""
    plain, small, twice = (
        filled[f"500, full{kind}", "sdpa"].measured for kind in ("", ", 8-bit Adam", ", accumulation")
    )
    assert plain and small and twice and small < 0.6 * plain < plain < 0.97 * twice  # gradients beside activations


def test_the_first_step_holds_no_state_of_adam():
    """It is made by the first update: 8 bytes a parameter, in fp32."""
    setting = BY_LABEL["500, full"].setting("sdpa", 32, "cpu")
    first, second = (take_steps(setting, steps) for steps in (1, 2))
    assert first and second
    with torch.device("meta"):
        parameters = sum(p.numel() for p in CausalLM(setting.config).parameters())
    assert first.parts["optimizer"] == 0 and second.parts["optimizer"] == 8 * parameters
    assert second.before == first.before + 8 * parameters


def test_a_step_that_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    def lacking(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ablations, "_take_steps", lacking)
    (one,) = fill(LORA[:1], ("sdpa",), progress=False)
    assert one.measured is None and one.enlarged is None and one.predicted > 0
    assert "none" in format_table([one]) and ratios([one]) == [(1.0, None)]


def test_other_errors_pass_through():
    with pytest.raises(ValueError, match="unknown attention 'slow'"):
        fill(LORA[:1], ("slow",), progress=False)


def test_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    take_steps(LORA[0].setting("sdpa", 32, "cpu"), 1)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_shows_how_far_it_is(progress: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ablations, "take_steps", lambda setting: None)
    fill(LORA[:2], ("sdpa",), progress=progress)
    out, err = capsys.readouterr()
    assert out == "" and ("Training steps" in err and "500, LoRA" in err) == progress and bool(err) == progress


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_books_sizes_on_a_gpu():
    found = fill([case for case in LORA if not case.book.checkpointing], ("sdpa",), "cuda", progress=False)
    for one in found:
        assert one.narrower == 1 and one.measured == pytest.approx(one.predicted, rel=0.1)
        assert one.enlarged == pytest.approx(one.book, rel=0.1)


# --- shown ------------------------------------------------------------------------------------------------------------


def row(attention: str, book: int, measured: int | None, case: Case = LORA[0]) -> Filled:
    return Filled(case, attention, book, 3_000_000, measured, 16)


def test_ratios_are_to_the_first_of_the_same_attention():
    results = [row("sdpa", 100, 10), row("eager", 400, 20), row("sdpa", 250, 15), row("eager", 100, None)]
    assert ratios(results) == [(1.0, 1.0), (1.0, 1.0), (2.5, 1.5), (0.25, None)]
    assert ratios([row("sdpa", 100, None), row("sdpa", 200, 4)]) == [(1.0, None), (2.0, None)]


def test_the_table_has_all_numbers():
    text = format_table([row("sdpa", 1287, 5_000_000), row("sdpa", 3109, None, LORA[1])])
    header, first, second = text.split("\n")
    assert header.replace(" ", "") == "attentionpredictedmeasuredasOPT-350Mbooktofirst:herebook"
    assert first.split() == ["500,", "LoRA", "sdpa", "3.00", "5.00", "1,280", "1,287", "1.00", "1.00"]
    assert second.split() == ["2000,", "LoRA", "sdpa", "3.00", "none", "3,109", "2.42"]
    assert len({len(line) for line in (header, first, second)}) == 1


def test_the_picture_has_both_ratios(figures: list[Figure], filled: dict[tuple[str, str], Filled]):
    results = [one for one in filled.values() if one.case.book.lora]
    assert ablation_runs(results).png.startswith(b"\x89PNG")
    (figure,) = figures
    widths = {axes.get_title(): sorted(round(bar.get_width(), 3) for bar in axes.patches) for axes in figure.axes}  # pyright: ignore[reportAttributeAccessIssue]
    for attention in ("eager", "sdpa"):
        pairs = [both for one, both in zip(results, ratios(results), strict=True) if one.attention == attention]
        assert widths[attention] == sorted(round(value or 0, 3) for pair in pairs for value in pair)
    written = texts(figure)
    assert "2000, LoRA, ckpt" in written and "measured here" in written and "the book's, of OPT-350M" in written
    assert {bar.get_hatch() for axes in figure.axes for bar in axes.patches} == {"", "//"}  # not by colour alone
