"""Optimizer state in host memory, fetched page by page into a small budget of device memory.

A GPU that has no room for the state of the optimizer can still hold a part of it. The state is cut into *pages*, each
a range of rows of the tensors it consists of. All pages live in host memory; a few *slots* on the device hold those in
use:

    host    | page 0 | page 1 | page 2 | page 3 | page 4 |       pinned, so that copies run beside the computation
                 \\                |        /
    device        | slot 0: page 0 | slot 1: page 3 |            budget_bytes // page_bytes slots, never more

A page that is asked for is a *hit* if it is still in a slot, was *prefetched* if it has been asked for ahead of time,
and otherwise is a *fault*: the computation waits for the copy. If no slot is free, the page that has not been used for
the longest time is *evicted*, and written back if it was changed.

That rule (least recently used) is at its worst when pages are used in a circle: the next one is always the one that
has just gone. An optimizer uses all its pages in every step, so AdamW8bit walks through them forwards and backwards in
turn; what lies in the slots at the end of one step is then where the next one begins. And since the order is known, the
next page is fetched on a second stream while the current one is being computed with.

bitsandbytes leaves all of this to the driver: its paged optimizers allocate `cudaMallocManaged` memory, which migrates
in pieces when the GPU touches it. That takes few lines, but nothing in it can be seen or bounded: there is no budget
(pages stay on the device until something else needs the room), no counter, no support on a CPU or on Windows, tensors
below 100,000 elements are never paged, and a state that was loaded from a checkpoint is ordinary GPU memory. Here
everything is an ordinary allocation, and the pages are the same after a checkpoint.

On a CPU the slots are ordinary memory as well: nothing is saved there, but the mechanism can be watched.

Left out: pages on disk, and pages of parameters or gradients.
Source: QLoRA, arXiv 2305.14314, section 3; bitsandbytes `optim/optimizer.py`, `functional.get_paged`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Counters:
    """What a pool has done since it was made, or since `reset`. Bytes are those of whole pages.

    Attributes:
        hits: pages asked for that had stayed on the device.
        prefetched: pages asked for that had been fetched ahead of time.
        faults: pages asked for that had to be waited for.
        evictions: pages that made room for another one.
        bytes_in: copied from host to device.
        bytes_out: written back from device to host.
    """

    hits: int = 0
    prefetched: int = 0
    faults: int = 0
    evictions: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def reset(self) -> None:
        for field in fields(self):
            setattr(self, field.name, 0)

    def format(self) -> str:
        """A table of two columns."""
        rows = {"pages used": f"{self.hits + self.prefetched + self.faults:,}"}
        rows |= {f"  {name}": f"{getattr(self, name):,}" for name in ("hits", "prefetched", "faults")}
        rows |= {"evictions": f"{self.evictions:,}"}
        rows |= {f"MB {way}": f"{getattr(self, f'bytes_{way}') / 1e6:,.3f}" for way in ("in", "out")}
        return "\n".join(f"{name:<14}{value:>14}" for name, value in rows.items())


class _Slot:
    """Room for one page on the device."""

    def __init__(self, memory: Tensor):
        self.memory, self.dirty, self.ahead = memory, False, False
        self.arrived: torch.cuda.Event | None = None


@dataclass(frozen=True, eq=False)
class Page:
    """Rows [start, stop) of the tensors of one `PagePool.add`."""

    tensors: tuple[Tensor, ...]
    start: int
    stop: int

    def host(self) -> list[Tensor]:
        """Its part of each tensor, in host memory: one row for each row."""
        return [tensor[self.start : self.stop] for tensor in self.tensors]


class PagePool:
    """Pages of host tensors in a bounded number of slots on a device.

    Args:
        budget_bytes: device memory for pages, in bytes; what does not fill a whole page is not used.
        page_bytes: size of a page in bytes.
        device: where pages are used.

    Raises:
        ValueError: the budget is smaller than one page.
    """

    def __init__(self, budget_bytes: int, page_bytes: int, device: torch.device | str):
        if page_bytes < 1:
            raise ValueError(f"page_bytes must be positive, got {page_bytes}")
        if budget_bytes < page_bytes:
            raise ValueError(
                f"a budget of {budget_bytes} bytes cannot hold one page of {page_bytes}: "
                "raise budget_bytes or lower page_bytes"
            )
        self.page_bytes, self.slots, self.device = page_bytes, budget_bytes // page_bytes, torch.device(device)
        self.counters = Counters()
        self._resident: OrderedDict[Page, _Slot] = OrderedDict()  # the least recently used first
        self._free: list[_Slot] = []
        self._made = 0
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor in host memory, pinned if the device is a GPU."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self._stream is not None)

    def add(self, *tensors: Tensor) -> list[Page]:
        """Cut tensors into pages of whole rows.

        Args:
            tensors: on the host, contiguous, [rows, anything]; a page holds the same rows of each, one tensor after
                the other.

        Raises:
            ValueError: one row of all tensors does not fit into a page, or a tensor would not be aligned there.
        """
        before = 0
        for tensor in tensors:
            if before % tensor.element_size():
                raise ValueError(f"{tensor.dtype} cannot follow rows of {before} bytes: put wider elements first")
            before += tensor[:1].nbytes
        row_bytes = sum(tensor[:1].nbytes for tensor in tensors)
        rows = self.page_bytes // row_bytes if row_bytes else 0
        if not rows:
            raise ValueError(f"a page of {self.page_bytes} bytes holds no row of {row_bytes}: raise page_bytes")
        count = len(tensors[0])
        return [Page(tensors, start, min(start + rows, count)) for start in range(0, count, rows)]

    def use(self, page: Page) -> list[Tensor]:
        """The page on the device, one tensor for each of its host tensors; it counts as changed.

        The tensors may be used, in the current stream, until the next call of `use`.
        """
        slot = self._resident.get(page)
        if slot is None:
            self.counters.faults += 1
            slot = self._fetch(page)
        elif slot.ahead:
            self.counters.prefetched += 1
        else:
            self.counters.hits += 1
        self._resident.move_to_end(page)
        slot.dirty, slot.ahead = True, False
        if slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        return self._parts(slot, page)

    def prefetch(self, page: Page) -> None:
        """Begin to fetch a page that will be used soon, unless the only slot is taken by the one in use.

        Call it after `use` of the current page and before the work on it is queued, so that both run side by side.
        """
        if page not in self._resident and (self.slots > 1 or not self._resident):
            self._fetch(page).ahead = True

    def flush(self) -> None:
        """Write all changed pages back, so that the host tensors are up to date. The pages stay on the device."""
        for page, slot in self._resident.items():
            self._write_back(page, slot)
        if self._stream is not None:
            self._stream.synchronize()

    def clear(self) -> None:
        """Forget all pages, changed or not: the tensors of the pages are no longer used."""
        if self._stream is not None:
            self._stream.synchronize()
        self._free += self._resident.values()
        self._resident.clear()

    def __reduce__(self):
        """A copy is an empty pool of the same size."""
        return PagePool, (self.slots * self.page_bytes, self.page_bytes, self.device)

    def resident_bytes(self) -> int:
        """Device memory that is held, at most the budget."""
        return self._made * self.page_bytes

    def _fetch(self, page: Page) -> _Slot:
        slot = self._take_slot()
        # The stream has waited for all that was queued so far, so also for the work on the page that lay here before.
        with self._copying():
            for part, host in zip(self._parts(slot, page), page.host(), strict=True):
                part.copy_(host, non_blocking=True)
                self.counters.bytes_in += host.nbytes
            if self._stream is not None:
                slot.arrived = self._stream.record_event()  # pyright: ignore[reportAttributeAccessIssue]
        slot.dirty, slot.ahead = False, False
        self._resident[page] = slot
        return slot

    def _take_slot(self) -> _Slot:
        if self._free:
            return self._free.pop()
        if self._made < self.slots:
            self._made += 1
            return _Slot(torch.empty(self.page_bytes, dtype=torch.uint8, device=self.device))
        page, slot = self._resident.popitem(last=False)
        self.counters.evictions += 1
        self._write_back(page, slot)
        return slot

    def _write_back(self, page: Page, slot: _Slot) -> None:
        if not slot.dirty:
            return
        with self._copying():
            for part, host in zip(self._parts(slot, page), page.host(), strict=True):
                host.copy_(part, non_blocking=True)
                self.counters.bytes_out += host.nbytes
        slot.dirty = False

    def _copying(self):
        """The stream of copies, after all that is queued in the current one."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    @staticmethod
    def _parts(slot: _Slot, page: Page) -> list[Tensor]:
        parts, start = [], 0
        for host in page.host():
            parts.append(slot.memory[start : start + host.nbytes].view(host.dtype).view(host.shape))
            start += host.nbytes
        return parts
