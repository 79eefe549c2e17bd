"""How wrong the mean of means is, by how unevenly trained tokens are spread over micro-batches.

With n_i trained tokens in micro-batch i of N, and g_i the gradient of its own mean loss:

    right     sum of n_i / n  * g_i          wrong     sum of 1 / N  * g_i

Both are weighted means of the same g_i. What differs is the weights, and half the sum of their differences is the
share of the weight that lies in the wrong place:

    misplaced    1/2 * sum of |1 / N - n_i / n|          (3, 11) -> 1/2 - 3/14 = 29 %

So the error grows with it, times how much the g_i differ. It is zero for equal counts, and for one micro-batch.

Rows of uneven length are made of the demo's sentences: one row asks for k of them at a time.
"""

from collections.abc import Sequence

from minift.data.encode import encode
from minift.data.formats import Row
from minift.data.tokenizer import Tokenizer
from minift.model.decoder import CausalLM
from minift.study.accumulation import AccumulationStudy, compare_accumulation


def misplaced_weight(counts: Sequence[int]) -> float:
    """Share of the weight that the mean of means gives to the wrong tokens, 0 to 1.

    Raises:
        ValueError: no micro-batch, or one without a trained token.
    """
    if not counts or min(counts) < 1:
        raise ValueError(f"trained tokens of micro-batches must be at least 1, got {list(counts)}")
    return sum(abs(1 / len(counts) - count / sum(counts)) for count in counts) / 2


def joined_row(rows: Sequence[Row]) -> Row:
    """One row of several with one question and one answer each: all questions, then all answers."""
    turns = zip(*(row["messages"] for row in rows), strict=True)
    return {"messages": [{"role": same[0]["role"], "content": " ".join(t["content"] for t in same)} for same in turns]}


def by_unevenness(
    model: CausalLM, tokenizer: Tokenizer, rows: Sequence[Row], sentences: Sequence[int]
) -> list[AccumulationStudy]:
    """For each k of `sentences`, a step of two micro-batches: a row of one sentence, and a row of the k that follow it.

    Raises:
        ValueError: too few rows.
    """
    if len(rows) < 1 + max(sentences):
        raise ValueError(f"{len(rows)} rows are too few for 1 and {max(sentences)} sentences")
    short = encode(tokenizer, rows[0])
    longer = [encode(tokenizer, joined_row(rows[1 : 1 + count])) for count in sentences]
    return [compare_accumulation(model, [short, other], pad_id=tokenizer.pad_id or 0) for other in longer]
