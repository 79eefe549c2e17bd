"""What attention moves between memory and the chip that computes: counted, for one head of n tokens and width d.

Written out, attention is three steps, and each reads what it needs from memory and writes its result back:

    S = Q K^T         loads Q and K      2 n d     writes S   n^2
    P = softmax(S)    loads S              n^2     writes P   n^2
    O = P V           loads P and V   n^2 + n d    writes O   n d          together 4 n^2 + 4 n d

Five tokens of width 3: 100 + 60 = 160 numbers. A fused kernel keeps S and P on the chip: it loads Q, K and V and writes
O, 4 n d = 60 numbers. That is so only while all keys and values fit on the chip beside the queries. For longer rows a
kernel takes a tile of r queries at a time and reads K and V again for each tile, n / r times:

    loads n d + 2 n d (n / r)    writes n d          2 r / d times less than 4 n^2: 4 times for 128 queries, d = 64

and what is read again mostly comes from a cache between memory and chip. The arithmetic is the same in all of them. A
GPU can multiply more than a hundred pairs of numbers in the time that it takes to read one number, so what is moved
decides how long attention takes.

Left out: scaling and mask as steps of their own, each of which would load and write n^2 once more; the half of the
tiles that a causal kernel skips; the backward pass.

Source: FlashAttention, arXiv 2205.14135.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One step: a formula, and how many numbers it loads and writes, by matrix."""

    formula: str
    loads: dict[str, int]
    writes: dict[str, int]

    @property
    def moved(self) -> int:
        return sum(self.loads.values()) + sum(self.writes.values())


def eager_traffic(n: int, d: int) -> tuple[Step, Step, Step]:
    """The three steps of attention written out.

    Raises:
        ValueError: no tokens or no width.
    """
    _check(n, d)
    return (
        Step("S = Q Kᵀ", {"Q": n * d, "K": n * d}, {"S": n * n}),
        Step("P = softmax(S)", {"S": n * n}, {"P": n * n}),
        Step("O = P V", {"P": n * n, "V": n * d}, {"O": n * d}),
    )


def fused_traffic(n: int, d: int, rows: int | None = None) -> Step:
    """The one step of a fused kernel.

    Args:
        rows: queries of a tile; K and V are read once for each. None: all queries are on the chip at a time.

    Raises:
        ValueError: no tokens, no width, or tiles without rows.
    """
    _check(n, d)
    if rows is not None and rows < 1:
        raise ValueError(f"a tile of {rows} queries: give at least 1, or None for all of them")
    tiles = 1 if rows is None else -(-n // rows)
    return Step("O = softmax(Q Kᵀ) V", {"Q": n * d, "K": n * d * tiles, "V": n * d * tiles}, {"O": n * d})


def moved(steps: Iterable[Step]) -> int:
    """Numbers loaded and written by all steps."""
    return sum(step.moved for step in steps)


def _check(n: int, d: int) -> None:
    if n < 1 or d < 1:
        raise ValueError(f"{n} tokens of width {d}: give at least 1 of each")
