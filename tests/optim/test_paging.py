"""The page pool against a plain copy of the tensors and a textbook LRU list; AdamW8bit with pages against without.

The pool is told nothing of what its pages mean: random walks use, change and prefetch pages, and at the end the host
tensors must hold what a program without pages would have written. The counters are those of a list kept by hand.
"""

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.optim.adamw8bit import AdamW8bit
from minift.optim.paging import PagePool

BLOCK_BYTES = 2 * 256 + 2 * 4  # state of 256 values: two codes each, two scales
WIDE = (256, torch.uint8), (1, torch.float32)


def host_tensors(rows: int) -> list[Tensor]:
    return [torch.randint(0, 100, (rows, width)).to(dtype) for width, dtype in WIDE]


class Lru:
    """The counters, from a list of resident pages, the least recently used first."""

    def __init__(self, slots: int, page_bytes: list[int]):
        self.slots, self.page_bytes, self.pages = slots, page_bytes, []
        self.ahead: set[int] = set()
        self.dirty: set[int] = set()
        self.counts = dict.fromkeys(["hits", "prefetched", "faults", "evictions", "bytes_in", "bytes_out"], 0)

    def fetch(self, page: int) -> None:
        if len(self.pages) == self.slots:
            gone = self.pages.pop(0)
            self.counts["evictions"] += 1
            if gone in self.dirty:
                self.counts["bytes_out"] += self.page_bytes[gone]
                self.dirty.remove(gone)
            self.ahead.discard(gone)
        self.pages.append(page)
        self.counts["bytes_in"] += self.page_bytes[page]

    def use(self, page: int) -> None:
        if page not in self.pages:
            self.counts["faults"] += 1
            self.fetch(page)
        else:
            self.counts["prefetched" if page in self.ahead else "hits"] += 1
        self.pages.remove(page)
        self.pages.append(page)
        self.ahead.discard(page)
        self.dirty.add(page)

    def prefetch(self, page: int) -> None:
        if page not in self.pages and (self.slots > 1 or not self.pages):
            self.fetch(page)
            self.ahead.add(page)


@settings(deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40), rows_a_page=st.integers(1, 12), slots=st.integers(1, 8), extra=st.integers(0, 259),
    walk=st.lists(st.tuples(st.sampled_from(["use", "use", "prefetch", "flush"]), st.integers(0, 1000)), max_size=40),
)  # fmt: skip
def test_random_walks(rows: int, rows_a_page: int, slots: int, extra: int, walk: list[tuple[str, int]]):
    """Every change arrives, at the latest with a flush; counters and bytes are those of the list."""
    page_bytes = rows_a_page * 260 + extra
    pool = PagePool(slots * page_bytes + min(extra, page_bytes - 1), page_bytes, "cpu")
    tensors = host_tensors(rows)
    wanted = [tensor.clone() for tensor in tensors]
    pages = pool.add(*tensors)
    assert [(p.start, p.stop) for p in pages] == [(i, min(i + rows_a_page, rows)) for i in range(0, rows, rows_a_page)]
    lru = Lru(slots, [260 * (p.stop - p.start) for p in pages])
    for number, (what, which) in enumerate(walk):
        index = which % len(pages)
        page = pages[index]
        if what == "use":
            lru.use(index)
            for part, full in zip(pool.use(page), wanted, strict=True):
                here = full[page.start : page.stop]
                assert torch.equal(part, here)
                part += number % 3
                here += number % 3
        elif what == "prefetch":
            lru.prefetch(index)
            pool.prefetch(page)
        else:
            lru.counts["bytes_out"] += sum(lru.page_bytes[page] for page in lru.dirty)
            lru.dirty.clear()
            pool.flush()
            assert all(map(torch.equal, tensors, wanted))
        assert pool.resident_bytes() <= slots * page_bytes
    assert vars(pool.counters) == lru.counts
    pool.flush()
    assert all(map(torch.equal, tensors, wanted))


def test_pages_wait_in_the_slots_until_they_are_evicted():
    """The host tensors are behind until then: written back on eviction, not on every use."""
    pool, tensors = PagePool(2 * 260, 260, "cpu"), host_tensors(3)
    before = tensors[0].clone()
    pages = pool.add(*tensors)
    for page in pages[:2]:
        pool.use(page)[0].add_(1)
    assert torch.equal(tensors[0], before) and pool.counters.bytes_out == 0
    pool.use(pages[2])
    assert torch.equal(tensors[0][0], before[0] + 1) and torch.equal(tensors[0][1:], before[1:])
    assert pool.counters.bytes_out == 260


def test_several_tensors_share_the_slots():
    """Pages of another `add` push those of the first one out, and come back unharmed."""
    pool = PagePool(260 * 2, 260, "cpu")
    first, second = host_tensors(2), host_tensors(4)
    copies = [t.clone() for t in (*first, *second)]
    for page in (*pool.add(*first), *pool.add(*second)):
        for part in pool.use(page):
            part += 1
    pool.flush()
    assert all(torch.equal(t, c + 1) for t, c in zip((*first, *second), copies, strict=True))
    assert pool.counters.evictions == 4


def test_clear_forgets():
    pool, tensors = PagePool(260, 260, "cpu"), host_tensors(1)
    (page,) = pool.add(*tensors)
    before = tensors[0].clone()
    pool.use(page)[0].add_(1)
    pool.clear()
    pool.flush()
    assert torch.equal(tensors[0], before) and torch.equal(pool.use(page)[0], before)
    assert pool.resident_bytes() == 260 and pool.counters.faults == 2


def test_a_copy_is_an_empty_pool_of_the_same_size():
    pool = PagePool(1000, 300, "cpu")
    other = copy.deepcopy(pool)
    assert (other.slots, other.page_bytes, other.device) == (3, 300, torch.device("cpu"))
    assert other.resident_bytes() == 0


def test_table_of_counters():
    pool, tensors = PagePool(260, 260, "cpu"), host_tensors(2)
    for page in pool.add(*tensors):
        pool.use(page)
    lines = dict(line.rsplit(maxsplit=1) for line in pool.counters.format().splitlines())
    assert {k.strip(): v for k, v in lines.items()} == {
        "pages used": "2", "hits": "0", "prefetched": "0", "faults": "2", "evictions": "1", "MB in": "0.001",
        "MB out": "0.000",
    }  # fmt: skip
    pool.counters.reset()
    assert not any(vars(pool.counters).values())


@pytest.mark.parametrize(
    ("budget", "page", "said"), [(999, 1000, "budget_bytes"), (0, 1, "budget_bytes"), (10, 0, "page_bytes")]
)
def test_budget_that_holds_no_page_is_refused(budget: int, page: int, said: str):
    with pytest.raises(ValueError, match=said):
        PagePool(budget, page, "cpu")


def test_tensors_that_do_not_fit_are_refused():
    pool = PagePool(1000, 259, "cpu")
    with pytest.raises(ValueError, match="259 bytes holds no row of 260"):
        pool.add(*host_tensors(3))
    with pytest.raises(ValueError, match="wider elements first"):
        PagePool(1000, 1000, "cpu").add(torch.zeros(4, 3, dtype=torch.uint8), torch.zeros(4, 1))


# --- the optimizer ----------------------------------------------------------------------------------------------------


def pair(sizes: list[int], dtype: torch.dtype, budget: int, page: int, **chosen: Any) -> tuple[AdamW8bit, AdamW8bit]:
    """Paged and unpaged optimizers of equal parameters."""
    ours = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
    theirs = copy.deepcopy(ours)
    half = len(sizes) // 2 or 1
    grouped = [[{"params": p[:half]}, {"params": p[half:], "lr": 3e-3}][: 1 + (len(p) > 1)] for p in (ours, theirs)]
    paging = {"paged": True, "page_bytes": page, "budget_bytes": budget}
    return AdamW8bit(grouped[0], **chosen, **paging), AdamW8bit(grouped[1], **chosen)


def parameters(optimizer: AdamW8bit) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(*optimizers: AdamW8bit, steps: int = 1) -> None:
    for _ in range(steps):
        for same in zip(*map(parameters, optimizers), strict=True):
            gradient = torch.randn(same[0].shape).to(same[0].dtype)
            for p in same:
                p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()


def assert_same(ours: AdamW8bit, theirs: AdamW8bit) -> None:
    assert all(map(torch.equal, parameters(ours), parameters(theirs)))
    ours_state, theirs_state = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert ours_state.keys() == theirs_state.keys()
    for group, entries in theirs_state.items():
        assert ours_state[group].keys() == entries.keys()
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(ours_state[group][name]), torch.as_tensor(value)), (group, name)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    sizes=st.lists(st.sampled_from([1, 300, 4095, 4096, 4097, 5000, 9000]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), blocks=st.integers(1, 40), slots=st.integers(1, 50),
    stochastic=st.booleans(), extra=st.integers(0, BLOCK_BYTES - 1),
)  # fmt: skip
def test_paged_equals_unpaged_under_any_budget(
    sizes: list[int], dtype: torch.dtype, blocks: int, slots: int, stochastic: bool, extra: int
):
    """Parameters and state, to the bit, from one page of one block to more than all; random words belong to places."""
    page = blocks * BLOCK_BYTES + extra
    ours, theirs = pair(sizes, dtype, slots * page, page, lr=1e-2, weight_decay=0.1, stochastic_rounding=stochastic)
    step(ours, theirs, steps=3)
    assert_same(ours, theirs)
    assert ours.pool is not None and ours.pool.resident_bytes() <= slots * page


def test_counters_of_a_run():
    """20 pages, 5 slots: the pages at the turn stay, so 3 of 4 are fetched; each but the first ahead of time."""
    ours, theirs = pair([40 * 256], torch.float32, 5 * 2 * BLOCK_BYTES, 2 * BLOCK_BYTES)
    step(ours, theirs)
    counters = ours.pool.counters  # pyright: ignore[reportOptionalMemberAccess]
    assert (counters.faults, counters.prefetched, counters.hits, counters.evictions) == (1, 19, 0, 15)
    assert (counters.bytes_in, counters.bytes_out) == (40 * BLOCK_BYTES, 30 * BLOCK_BYTES)
    counters.reset()
    step(ours, theirs)
    assert (counters.faults, counters.prefetched, counters.hits, counters.evictions) == (0, 15, 5, 15)
    assert counters.bytes_in == counters.bytes_out == 30 * BLOCK_BYTES
    assert_same(ours, theirs)


def test_one_page_faults_every_time_but_at_the_turn():
    ours, theirs = pair([20 * 256], torch.float32, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES)
    step(ours, theirs, steps=3)
    counters = ours.pool.counters  # pyright: ignore[reportOptionalMemberAccess]
    assert (counters.faults, counters.prefetched, counters.hits) == (28, 0, 2)
    assert_same(ours, theirs)


@pytest.mark.parametrize(("saved_paged", "loaded_paged"), [(True, True), (True, False), (False, True)])
def test_state_survives_saving_and_loading(saved_paged: bool, loaded_paged: bool):
    """Through a file, into an optimizer that has already made steps of its own; then both go on alike."""
    first = pair([4096, 10_000, 300], torch.float32, 4 * BLOCK_BYTES, 2 * BLOCK_BYTES)
    source, witness = first if saved_paged else first[::-1]
    step(source, witness, steps=3)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    second = pair([4096, 10_000, 300], torch.float32, 10 * BLOCK_BYTES, 3 * BLOCK_BYTES)
    resumed = second[0] if loaded_paged else second[1]
    step(resumed, steps=2)
    with torch.no_grad():
        for p, trained in zip(parameters(resumed), parameters(source), strict=True):
            p.copy_(trained)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert (resumed.pool is not None) == loaded_paged
    assert_same(resumed, witness)
    step(resumed, witness, source, steps=3)
    assert_same(resumed, witness)
    assert_same(source, witness)


def test_a_copy_of_a_paged_optimizer_goes_on_alike():
    """What lies in the slots is written back first; the copy has a pool of its own."""
    ours, theirs = pair([4096, 9000], torch.float32, 4 * BLOCK_BYTES, 2 * BLOCK_BYTES)
    step(ours, theirs, steps=2)
    twin = copy.deepcopy(ours)
    assert twin.pool is not None and twin.pool is not ours.pool
    step(twin, ours, theirs, steps=2)
    assert_same(twin, theirs)
    assert_same(ours, theirs)


def test_small_tensors_are_not_paged():
    ours, _ = pair([4095, 300], torch.float32, BLOCK_BYTES, BLOCK_BYTES)
    step(ours, steps=2)
    assert ours.pool is not None and ours.pool.resident_bytes() == 0 and not any(vars(ours.pool.counters).values())
