"""Traffic counted by a machine that moves every number itself; the book's figure; what a tiled kernel reads again."""

import pytest

from minift.study.traffic import eager_traffic, fused_traffic, moved


def test_the_books_figure():
    """Figure 5.13: 5 tokens of width 3."""
    loads = [sum(step.loads.values()) for step in eager_traffic(5, 3)]
    writes = [sum(step.writes.values()) for step in eager_traffic(5, 3)]
    assert (loads, writes) == ([30, 25, 40], [25, 25, 15])
    assert moved(eager_traffic(5, 3)) == 160
    fused = fused_traffic(5, 3)
    assert (sum(fused.loads.values()), sum(fused.writes.values()), fused.moved) == (45, 15, 60)


class Memory:
    """Matrices of zeros whose cells are counted when they are read or written."""

    def __init__(self, **shapes: tuple[int, int]):
        self.cells = {name: [[0] * columns for _ in range(rows)] for name, (rows, columns) in shapes.items()}
        self.count = 0

    def load(self, name: str, rows: slice = slice(None)) -> list[list[int]]:
        found = [row[:] for row in self.cells[name][rows]]
        self.count += sum(map(len, found))
        return found

    def store(self, name: str, rows: list[list[int]]) -> None:
        self.cells[name] = rows
        self.count += sum(map(len, rows))


@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 3), (4, 7)])
def test_every_number_is_moved_by_hand(n: int, d: int):
    memory = Memory(Q=(n, d), K=(n, d), V=(n, d))
    q, k = memory.load("Q"), memory.load("K")
    memory.store("S", [[sum(a * b for a, b in zip(x, y, strict=True)) for y in k] for x in q])
    memory.store("P", memory.load("S"))
    p, v = memory.load("P"), memory.load("V")
    memory.store("O", [[sum(row[j] * v[j][i] for j in range(n)) for i in range(d)] for row in p])
    assert memory.count == moved(eager_traffic(n, d)) == 4 * n * n + 4 * n * d


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
def test_keys_are_read_again_for_each_tile(rows: int):
    n, d = 5, 3
    memory = Memory(Q=(n, d), K=(n, d), V=(n, d))
    for start in range(0, n, rows):
        tile = memory.load("Q", slice(start, start + rows))
        memory.load("K")
        memory.load("V")
        memory.store(f"O{start}", tile)
    assert memory.count == fused_traffic(n, d, rows).moved
    assert fused_traffic(n, d, 5) == fused_traffic(n, d)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="0 tokens of width 3: give at least 1 of each"):
        eager_traffic(0, 3)
    with pytest.raises(ValueError, match="5 tokens of width 0"):
        fused_traffic(5, 0)
    with pytest.raises(ValueError, match="a tile of 0 queries: give at least 1, or None"):
        fused_traffic(5, 3, rows=0)
