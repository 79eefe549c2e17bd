"""The look at a data set: its parts against what they are made of, packing and padding against counts by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

import minift
from minift.data.report import examine
from minift.study.dataset import look_at, show_rows
from minift.study.show import show_example
from minift.train.config import Packing


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> minift.Tokenizer:
    return minift.load_tokenizer(tiny)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def text(tokens: int) -> dict[str, Any]:
    """A row of so many tokens: letters, and the end of the text."""
    return {"text": "x" * (tokens - 1)}


ROWS = [chat("sea?", "Sea."), chat("sky?", ""), chat("sun?", "The sun is 8 times <|im_end|> as big.")]


def test_rows_are_shown_as_encode_makes_them(tokenizer: minift.Tokenizer):
    shown = show_rows(tokenizer, ROWS, "assistant", color=True)
    assert shown.color
    for number in (0, 2):
        (alone,) = show_example(tokenizer, minift.encode(tokenizer, ROWS[number], "assistant")).rows
        assert shown.rows[number].parts == alone.parts
        assert shown.rows[number].title == f"row {number + 1}: {alone.title}"
    assert shown.rows[1].title.startswith("row 2: the assistant says nothing in message 2") and not shown.rows[1].parts


def test_rows_are_cut(tokenizer: minift.Tokenizer):
    whole = show_rows(tokenizer, ROWS[:1]).rows[0].parts[0].tokens
    cut = show_rows(tokenizer, ROWS[:1], max_length=len(whole) - 2).rows[0].parts[0].tokens
    assert cut == whole[:-2]
    assert "removes the whole answer" in show_rows(tokenizer, ROWS[:1], max_length=5).rows[0].title


def test_what_it_says(tokenizer: minift.Tokenizer):
    config = minift.TrainConfig(loss_on="assistant", max_length=60, batch_size=2)
    look = look_at(tokenizer, ROWS, config, first=2)
    report = examine(tokenizer, ROWS, "assistant", 60, problems="show")
    parts = str(look).split("\n\n", 2)
    assert parts[0] == report.format() and "1 of them dropped" in parts[0]
    assert parts[1].startswith("batches of 2, at random") and "packed" not in parts[1]
    assert parts[2] == str(show_rows(tokenizer, ROWS[:2], "assistant", 60)) == str(look.shown)
    assert repr(look) == str(look)


def test_batches_and_packs_by_hand(tokenizer: minift.Tokenizer):
    """Lengths 2 4 6 8 in pairs: at random whatever is drawn; by length 8 + 6 and 4 + 2, which is 4 places too many."""
    rows = [text(size) for size in (2, 4, 6, 8)]
    config = minift.TrainConfig(loss_on="all", batch_size=2, max_length=10, packing="bfd")
    look = look_at(tokenizer, rows, config)
    assert [len(example) for example in look.report.examples] == [2, 4, 6, 8]
    random, by_length, packed = look.batches.splitlines()
    assert by_length == "batches of 2, by length  2 batches, 20 tokens in 24 places: 16.7% padding"
    assert packed == "packed (bfd)             2 rows of 10 tokens hold 4 documents of 20 tokens: 100.0% full"
    drawn = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()  # accelerate's sampler
    places = sum(2 * max((2, 4, 6, 8)[row] for row in pair) for pair in (drawn[:2], drawn[2:]))
    assert random.startswith(f"batches of 2, at random  2 batches, 20 tokens in {places} places")


@pytest.mark.parametrize(("packing", "cut"), [("none", 6), ("bfd", 6), ("bfd_split", 8), ("wrapped", 8)])
def test_rows_are_cut_where_training_cuts_them(tokenizer: minift.Tokenizer, packing: Packing, cut: int):
    config = minift.TrainConfig(loss_on="all", max_length=6, packing=packing, batch_size=1)
    look = look_at(tokenizer, [text(8)], config)
    assert len(look.shown.rows[0].parts[0].tokens) == look.report.tokens == cut
    assert ("2 rows of 6 tokens" in look.batches) == (cut == 8)


def test_what_packing_cuts_stands_below(tokenizer: minift.Tokenizer):
    config = minift.TrainConfig(loss_on="all", max_length=6, packing="bfd_split", batch_size=1)
    lines = look_at(tokenizer, [text(8)], config).batches.splitlines()
    assert lines[-2].startswith("packed (bfd_split)") and lines[-1] == " " * 25 + "1 document cut, 0 tokens dropped"


def test_nothing_to_batch(tokenizer: minift.Tokenizer):
    look = look_at(tokenizer, [ROWS[1]])
    assert look.batches == "" and str(look).count("\n\n") == 2 and "row 2" not in str(look)


def test_a_page(tokenizer: minift.Tokenizer, tmp_path: Path):
    evil = "<script>alert(1)</script>"
    look = look_at(tokenizer, [chat(evil, evil), chat("\x1b[2J", "")], first=2)
    path = look.save_html(str(tmp_path / "new" / "page.html"))
    page = path.read_text("utf-8")
    assert page.startswith("<!doctype html>\n") and 'charset="utf-8"' in page
    assert look._repr_html_() in page and look.shown._repr_html_() in page
    assert "<script" not in page and "&lt;" in page
    assert [found.name for found in path.parent.iterdir()] == ["page.html"]


def test_the_report_cannot_speak_to_the_terminal(tokenizer: minift.Tokenizer):
    """A template may put a row's text into its refusal, which the report repeats."""
    look = look_at(tokenizer, [chat("sea?", "Sea.")])
    look.report.two_begins.add("\x1b[2J")
    for page in (str(look), look._repr_html_()):
        assert "\x1b" not in page and "[2J" in page
