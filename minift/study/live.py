"""The most bytes of tensors that exist at one time while something runs, on any device.

On a GPU the allocator keeps count (`torch.cuda.max_memory_allocated`). A CPU's does not, and the memory of the whole
process (`peak_memory` in memory.py) only ever tells of the largest thing that happened in it. So here every operation
is watched: the storage of each tensor it returns is counted once, from when it first appears until it is freed.

    with LiveBytes() as live:
        loss = model(ids).sum()
        loss.backward()
    live.peak            bytes, of tensors made within the block

What a kernel allocates for itself while it runs is not seen; PyTorch's fused attention on a CPU keeps a tile of scores
for each thread, for instance. Tensors that were there before do not count.
"""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        now: bytes of the tensors made so far that still exist.
        peak: the most there have been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for old in tree_iter((args, kwargs)):  # its storage is nothing new, whoever returns it
            if isinstance(old, Tensor) and id(old.untyped_storage()) not in self._known:
                self._watch(old, counted=False)
        result = func(*args, **(kwargs or {}))
        for new in tree_iter(result):
            if isinstance(new, Tensor) and id(new.untyped_storage()) not in self._known:
                self._watch(new, counted=True)
        return result

    def _watch(self, tensor: Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes() if counted else 0
        self._known.add(id(storage))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, id(storage), size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
