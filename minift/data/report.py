"""What a data set will train, before it does.

The failures that cost a training run leave no trace in it: an answer that was cut away (loss 0.0, "success"), a turn
whose end is never trained (the model does not stop), a template that leaves the answer out. `examine` encodes every
row as training will, counts what it sees, and stops with an explanation where a row would train nothing.

    rows                                  43, 3 of them dropped
      answer cut away                     2: row 17: its 88 tokens are cut to max_length 80, which removes ...
      empty answer                        1: row 41: the assistant says nothing in message 2, so ...
    trained tokens                        319 (10.5%), loss on completion
    answers end with                      <|im_end|> (2): 37

`problems` says how strict it is. "stop": any row that is refused, and any answer that is cut away, is an error that
holds the whole report. "drop": such rows are left out and counted. "show": no error at all, to look at a data set.
If no answer at all ends with a control token, both stop: that is the template, and no row is better than another.

Left out: judging what the rows say (duplicates, languages, quality).
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from minift.data.drafts import Draft, LossOn, RowError, drafts
from minift.data.encode import Example, cut
from minift.data.formats import Row
from minift.data.tokenizer import Tokenizer

Problems = Literal["stop", "drop", "show"]
PROBLEMS: tuple[Problems, ...] = ("stop", "drop", "show")
QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
SHOWN = 3  # rows named for each kind of finding


@dataclass
class Finding:
    """Rows with something in common: how many, and what is said of the first few."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(text)


@dataclass
class DataReport:
    """What `examine` found. Counts of tokens are of the rows that are kept, after cutting.

    Attributes:
        rows: all that were given. examples: those that can be trained on, in order.
        tokens, trained_tokens: of the examples.
        lengths: tokens of each row that could be encoded, before cutting. longest: the longest rows, (tokens, name).
        dropped: rows that cannot be trained on, by kind of fault.
        truncated: rows longer than max_length.
        cut_answers: answers that lose their end, and so do not teach when to stop.
        removed_answers: answers of which no token is left.
        ends: how often each control token (text, id) ends a trained answer, after cutting.
        endless: answers that no control token ends; those that were cut do not count.
        two_begins: rows whose text began with the begin token that the tokenizer adds as well; one was dropped.
        parted: rows whose prompt, encoded alone, is not how the whole begins.
        controls: rows whose text spells a control token, by token; `special_in_text` says how it was read.
    """

    loss_on: LossOn
    max_length: int | None
    special_in_text: bool
    rows: int = 0
    examples: list[Example] = field(default_factory=list, repr=False)
    tokens: int = 0
    trained_tokens: int = 0
    lengths: list[int] = field(default_factory=list, repr=False)
    longest: list[tuple[int, str]] = field(default_factory=list)
    dropped: dict[str, Finding] = field(default_factory=dict)
    truncated: Finding = field(default_factory=Finding)
    cut_answers: Finding = field(default_factory=Finding)
    removed_answers: Finding = field(default_factory=Finding)
    ends: Counter[tuple[str, int]] = field(default_factory=Counter)
    endless: Finding = field(default_factory=Finding)
    two_begins: Finding = field(default_factory=Finding)
    parted: Finding = field(default_factory=Finding)
    controls: dict[str, Finding] = field(default_factory=dict)

    @property
    def trained_share(self) -> float:
        """Trained tokens per token, 0 to 1."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    @property
    def is_end_trained(self) -> bool:
        """Whether any answer teaches when to stop."""
        return bool(self.ends)

    def quantile(self, share: float) -> int:
        """The length that this share of the rows does not exceed; the shortest row for 0."""
        rank = math.ceil(share * len(self.lengths))
        return sorted(self.lengths)[max(0, rank - 1)] if self.lengths else 0

    def format(self) -> str:
        """As aligned text."""
        lines = [
            ("rows", f"{self.rows:,}, {self.rows - len(self.examples):,} of them dropped"),
            *((f"  {kind}", f"{found.count:,}: {found.first[0]}") for kind, found in sorted(self.dropped.items())),
            ("tokens", f"{self.tokens:,}"),
            ("trained tokens", f"{self.trained_tokens:,} ({self.trained_share:.1%}), loss on {self.loss_on}"),
            ("length of a row", ", ".join(f"{_name(share)} {self.quantile(share):,}" for share in QUANTILES)),
            ("longest rows", ", ".join(f"{where} ({length:,})" for length, where in self.longest) or "none"),
            (f"cut to {self.max_length}" if self.max_length else "cut", _shown(self.truncated)),
            ("  answers without end", _shown(self.cut_answers)),
            ("  answers removed", _shown(self.removed_answers)),
            ("answers end with", self._ends()),
            ("prompt splits apart", _shown(self.parted)),
            ("begin token twice", _shown(self.two_begins)),
            (f"control tokens in text, read as {'tokens' if self.special_in_text else 'text'}", self._controls()),
        ]
        width = max(len(name) for name, _ in lines) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in lines)

    def _ends(self) -> str:
        found = [f"{token} ({index}): {count:,}" for (token, index), count in self.ends.most_common()]
        if self.endless.count:
            found.append(f"no control token: {_shown(self.endless)}")
        return ", ".join(found) or "nothing: no answer is complete"

    def _controls(self) -> str:
        return ", ".join(f"{token}: {_shown(found)}" for token, found in sorted(self.controls.items())) or "none"


def examine(
    tokenizer: Tokenizer,
    rows: Iterable[Row],
    loss_on: LossOn = "completion",
    max_length: int | None = None,
    special_in_text: bool = False,
    problems: Problems = "stop",
) -> DataReport:
    """Encode every row as `encode` does, and report what will be trained; `.examples` are ready for training.

    Args:
        loss_on, max_length, special_in_text: see `encode`.
        problems: "stop", "drop" or "show", see above.

    Raises:
        ValueError: nothing can be trained on; no answer ends with a control token; a row is refused, or an answer cut
            away (unless `problems` says otherwise). The message holds the report.
    """
    if problems not in PROBLEMS:
        raise ValueError(f"unknown problems {problems!r}: choose one of {', '.join(PROBLEMS)}")
    report = DataReport(loss_on, max_length, special_in_text)
    numbered = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    for draft in drafts(tokenizer, numbered, loss_on, special_in_text):
        report.rows += 1
        if isinstance(draft, Draft):
            _look(report, draft, tokenizer)
        try:
            example = cut(draft, loss_on, max_length)
        except RowError as error:
            report.dropped.setdefault(error.reason, Finding()).add(str(error))
            continue
        report.examples.append(example)
        report.tokens += len(example)
        report.trained_tokens += example.trained_tokens
    if problems != "show" and (fault := _fault(report, problems)):
        raise ValueError(f"{fault}\n\n{report.format()}")
    return report


def _look(report: DataReport, draft: Draft, tokenizer: Tokenizer) -> None:
    """What is to be seen before the row is cut."""
    where, length = draft.where, len(draft.ids)
    limit = length if report.max_length is None else report.max_length
    report.lengths.append(length)
    report.longest = sorted([*report.longest, (length, where)], key=lambda row: -row[0])[:SHOWN]
    if length > limit:
        report.truncated.add(where)
    for (start, stop), end in zip(draft.ranges, draft.ends, strict=True):
        if start >= limit:
            report.removed_answers.add(where)
        elif (stop - 1 if end is None else end) >= limit:
            report.cut_answers.add(where)
        elif end is None:
            report.endless.add(where)
        else:
            report.ends[tokenizer.decode([draft.ids[end]]), draft.ids[end]] += 1
    if draft.two_begins:
        report.two_begins.add(where)
    if draft.parted:
        alone, together = draft.parted
        report.parted.add(f"{where}: {alone!r} alone, {together!r} in the whole")
    for token in dict.fromkeys(draft.controls):
        report.controls.setdefault(token, Finding()).add(where)


def _fault(report: DataReport, problems: Problems) -> str | None:
    """Why training should not begin."""
    refused = sum(found.count for found in report.dropped.values())
    if not report.examples:
        return "nothing to train on: " + ("no rows" if not report.rows else f"all {report.rows:,} rows are refused")
    if report.endless.count and not report.is_end_trained:
        return (
            "no control token ends the trained answers, so the model would not learn to stop: use a chat template that "
            "ends a turn with one"
        )
    if problems == "drop":
        return None
    advice = 'correct them, or leave them out with problems="drop"'
    if refused:
        first = next(iter(report.dropped.values())).first[0]
        return f"{refused:,} of {report.rows:,} rows cannot be trained on ({first}); {advice}"
    if report.removed_answers.count:
        return (
            f"cutting to max_length {report.max_length} removes {report.removed_answers.count:,} answers "
            f'({", ".join(report.removed_answers.first)}): raise max_length, or accept it with problems="drop"'
        )
    return None


def _shown(found: Finding) -> str:
    more = ", ..." if found.count > len(found.first) else ""
    return f"{found.count:,} ({', '.join(found.first)}{more})" if found.count else "0"


def _name(share: float) -> str:
    return {0.0: "shortest", 0.5: "median", 1.0: "longest"}.get(share, f"{share:.0%}")
