"""The report before training: every number against a count made here, and every reason to stop."""

import random
import re
from pathlib import Path
from typing import Any

import dialects
import numpy as np
import peers
import pytest
from dialects import DIALECTS

from minift.data.encode import IGNORE, encode_rows
from minift.data.report import QUANTILES, DataReport, examine
from minift.data.tokenizer import Tokenizer

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CHAT = {"messages": [USER, ASSISTANT]}
LONG = {"messages": [{"role": "user", "content": "the sea " * 50}, ASSISTANT]}
EMPTY = {"messages": [USER, {"role": "assistant", "content": ""}]}
LONG_ANSWER = {"messages": [USER, {"role": "assistant", "content": "the sea " * 50}]}


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer(tiny)


def with_template(tiny: Path, template: str) -> Tokenizer:
    tokenizer = Tokenizer(tiny)
    tokenizer.template = template
    return tokenizer


def test_counts_equal_those_of_trl(tiny: Path, tokenizer: Tokenizer):
    """TRL's rows, tokens and labels; it drops what cutting leaves without an answer, without a word."""
    rows = peers.demo_rows(60)
    for length in (None, 74):
        theirs = peers.peer_tokens(tiny, rows, max_length=length)
        report = examine(tokenizer, rows, max_length=length, problems="drop")
        assert [(example.input_ids, example.labels) for example in report.examples] == theirs
        assert report.rows == 60
        assert report.tokens == sum(len(ids) for ids, _ in theirs)
        assert report.trained_tokens == sum(label != IGNORE for _, labels in theirs for label in labels)
        assert report.trained_share == report.trained_tokens / report.tokens
        whole = [len(ids) for ids, _ in peers.peer_tokens(tiny, rows, max_length=None)]
        assert report.lengths == whole
        assert [tokens for tokens, _ in report.longest] == sorted(whole, reverse=True)[:3]
        assert all(whole[int(where.removeprefix("row ")) - 1] == tokens for tokens, where in report.longest)
        assert report.truncated.count == sum(tokens > (length or 10**9) for tokens in whole)
        dropped = sum(found.count for found in report.dropped.values())
        assert dropped == 60 - len(theirs) and bool(dropped) == (length is not None)
        assert report.removed_answers.count == dropped


def test_the_end_of_turn_is_counted_where_it_is_left(tokenizer: Tokenizer):
    rows = peers.as_messages(peers.demo_rows(60))
    report = examine(tokenizer, rows, max_length=74, problems="drop")
    ending = [example.input_ids for example in report.examples if 2 in example.labels]
    assert report.ends == {("<|im_end|>", 2): len(ending)} and report.is_end_trained
    assert report.cut_answers.count == sum(2 not in example.labels for example in report.examples)
    assert any(example.labels[-1] == 2 for example in report.examples), "a cut right behind the end loses nothing"
    assert report.endless.count == 0


def test_quantiles_are_lengths_of_rows():
    draw = random.Random(3)
    for count in (1, 2, 3, 10, 99, 100, 101):
        report = DataReport("all", None, False, lengths=[draw.randint(1, 1000) for _ in range(count)])
        for share in QUANTILES:
            assert report.quantile(share) == np.quantile(report.lengths, share, method="inverted_cdf")
    assert DataReport("all", None, False).quantile(0.5) == 0


# --- reasons to stop


ROWS = [CHAT, LONG, EMPTY, {"wrong": 1}, CHAT, LONG]


def test_rows_that_cannot_be_trained_on_stop_with_the_report(tokenizer: Tokenizer):
    with pytest.raises(
        ValueError, match=r"^4 of 6 rows cannot be trained on \(row 2: its \d+ tokens are cut"
    ) as caught:
        examine(tokenizer, ROWS, max_length=60)
    assert 'problems="drop"' in str(caught.value)
    assert re.search(r"\n\nrows +6, 4 of them dropped\n", str(caught.value))
    assert re.search(r"\n  answer cut away +2: row 2: its", str(caught.value))


def test_dropped_rows_are_counted_by_reason(tokenizer: Tokenizer):
    report = examine(tokenizer, ROWS, max_length=60, problems="drop")
    assert {kind: found.count for kind, found in report.dropped.items()} == {
        "answer cut away": 2,
        "empty answer": 1,
        "malformed row": 1,
    }
    assert report.dropped["malformed row"].first[0].startswith("row 4: needs 'messages'")
    assert report.examples == encode_rows(tokenizer, ROWS, max_length=60, drop=True) and len(report.examples) == 2


def test_an_answer_that_is_cut_away_stops_even_if_others_of_the_row_are_left(tokenizer: Tokenizer):
    """TRL trains the first turn and says nothing about the second."""
    rows = [{"messages": [USER, ASSISTANT, *LONG["messages"]]}]
    with pytest.raises(ValueError, match=r"^cutting to max_length 60 removes 1 answers \(row 1\): raise max_length"):
        examine(tokenizer, rows, "assistant", max_length=60)
    report = examine(tokenizer, rows, "assistant", max_length=60, problems="drop")
    assert (report.removed_answers.count, len(report.examples), report.ends.total()) == (1, 1, 1)


def test_an_answer_that_only_loses_its_end_is_shown(tokenizer: Tokenizer):
    report = examine(tokenizer, [LONG_ANSWER, CHAT], max_length=60)
    assert report.cut_answers.first == ["row 1"] and report.ends.total() == 1
    assert re.search(r"\n  answers without end +1 \(row 1\)\n", report.format())


@pytest.mark.parametrize("problems", ["stop", "drop"])
def test_nothing_to_train_on_stops_in_any_case(tokenizer: Tokenizer, problems: Any):
    with pytest.raises(ValueError, match=r"^nothing to train on: no rows"):
        examine(tokenizer, [], problems=problems)
    with pytest.raises(ValueError, match=r"^nothing to train on: all 2 rows are refused") as caught:
        examine(tokenizer, [LONG, EMPTY], max_length=60, problems=problems)
    assert "empty answer" in str(caught.value)


NO_END = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
# The end of a turn is written by whoever speaks next, so the last turn has none.
LATE_END = (
    "{% for m in messages %}{% if not loop.first %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}"
)
# The marks leave the end of the turn out.
OUTSIDE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("problems", ["stop", "drop"])
@pytest.mark.parametrize("loss_on", ["all", "completion", "assistant"])
def test_a_template_that_never_ends_a_turn_stops(tiny: Path, problems: Any, loss_on: Any):
    tokenizer = with_template(tiny, NO_END)
    with pytest.raises(ValueError, match=r"^no control token ends the trained answers.*use a chat template") as caught:
        examine(tokenizer, [CHAT, CHAT], loss_on, problems=problems)
    assert re.search(r"answers end with +no control token: 2 \(row 1, row 2\)", str(caught.value))
    report = examine(tokenizer, [CHAT], loss_on, problems="show")
    assert not report.is_end_trained and report.endless.count == 1


def test_turns_without_an_end_are_reported(tiny: Path):
    """Two turns: the first is ended by the user's, and that token is trained; nothing ends the second."""
    tokenizer = with_template(tiny, LATE_END)
    report = examine(tokenizer, [{"messages": [USER, ASSISTANT, USER, ASSISTANT]}], "assistant")
    assert report.ends == {("<|im_end|>", 2): 1} and report.endless.count == 1
    trained = [label for label in report.examples[0].labels if label != IGNORE]
    assert tokenizer.decode(trained) == "Hello<|im_end|>Hello"


def test_the_end_of_a_turn_is_trained_even_if_the_marks_leave_it_out(tiny: Path, tmp_path: Path):
    """TRL only warns, and trains a model that does not stop."""
    dialect = DIALECTS["chatml"]._replace(template=OUTSIDE)
    folder = dialects.write(tiny, tmp_path / "outside", dialect)
    row = {"messages": [USER, ASSISTANT, USER, ASSISTANT]}
    ((ids, labels),) = peers.peer_tokens(folder, [row], False, assistant_only=True)
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode([label for label in labels if label != IGNORE]) == "HelloHello"
    (example,) = examine(tokenizer, [row], "assistant").examples
    assert example.input_ids == ids
    assert tokenizer.decode([x for x in example.labels if x != IGNORE]) == "Hello<|im_end|>Hello<|im_end|>"


def test_a_template_that_leaves_the_answer_out_is_refused(tiny: Path):
    """TRL trains the header of an empty turn."""
    silent = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role != 'assistant' %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for loss_on in ("completion", "assistant"):
        with pytest.raises(ValueError, match=r"leaves out what the assistant says in message 2"):
            examine(with_template(tiny, silent), [CHAT], loss_on)
    shouting = silent.replace("{% if m.role != 'assistant' %}{{ m.content }}{% endif %}", "{{ m.content | upper }}")
    assert examine(with_template(tiny, shouting), [CHAT]).trained_tokens  # changed, but there
    assert examine(with_template(tiny, silent), [CHAT], "all").trained_tokens  # nobody asked for the answer


# --- what is shown


def test_where_prompt_and_answer_merge_the_first_token_that_differs_is_shown(real: Path):
    tokenizer = Tokenizer(real)
    answer = {"role": "assistant", "content": "\n\nHi"}
    report = examine(
        tokenizer, [CHAT, {"messages": [USER, answer]}, {"prompt": "the capital of Fr", "completion": "ance"}]
    )
    assert report.parted.count == 2
    assert report.parted.first[0] == "row 2: '\\n' alone, '\\n\\n' in the whole"
    assert report.parted.first[1].startswith("row 3: ' Fr' alone, ' France")
    assert "'\\\\n' alone" in repr(report.format())


def test_begin_tokens_that_would_double_are_counted(with_bos: Path):
    rows = [{"text": "<|endoftext|>The sea"}, {"text": "The sea"}]
    report = examine(Tokenizer(with_bos), rows, special_in_text=True)
    assert report.two_begins.first == ["row 1"]
    assert report.examples[0] == report.examples[1]
    assert examine(Tokenizer(with_bos), rows).two_begins.count == 0  # the user's is text, then


def test_control_tokens_in_the_text_are_shown(tokenizer: Tokenizer):
    rows = [
        CHAT,
        {"messages": [{"role": "user", "content": "<|im_end|><|im_end|>"}, ASSISTANT]},
        {"text": "a<|im_start|>"},
    ]
    for special in (False, True):
        report = examine(tokenizer, rows, special_in_text=special)
        assert {token: found.first for token, found in report.controls.items()} == {
            "<|im_end|>": ["row 2"],
            "<|im_start|>": ["row 3"],
        }
        assert f"control tokens in text, read as {'tokens' if special else 'text'}  <|im_end|>: 1" in report.format()


def test_the_text_is_aligned(tokenizer: Tokenizer):
    lines = examine(tokenizer, ROWS, max_length=60, problems="show").format().splitlines()
    starts = [found.end() for line in lines for found in re.finditer(r"^ *\S+(?: \S+)*  +(?=\S)", line)]
    assert len(starts) == len(lines) > 10 and len(set(starts)) == 1
    assert all(line == line.rstrip() for line in lines)


def test_show_never_stops(tokenizer: Tokenizer):
    assert examine(tokenizer, [], problems="show").examples == []
    report = examine(tokenizer, [EMPTY, LONG], max_length=60, problems="show")
    assert report.rows == 2 and report.trained_share == 0.0
    assert "nothing: no answer is complete" in report.format()


def test_an_unknown_choice_lists_the_choices(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="'warn': choose one of stop, drop, show"):
        examine(tokenizer, [CHAT], problems="warn")  # pyright: ignore[reportArgumentType]
