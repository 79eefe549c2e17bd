"""AdamW whose state takes two bytes a parameter instead of eight.

The two running means are stored as blockwise 8-bit codes (quant/blockwise.py): m with the signed dynamic map, v, which
cannot be negative, with the unsigned one, a scale for each 256 values. A step decodes, updates and encodes again:

    codes -> m, v (fp32)  ->  AdamW  ->  new m, v (fp32)  ->  update p with them, then back to codes

The parameter is updated with the *unrounded* means; rounding only affects what the next step remembers. Tensors with
fewer than 4096 elements keep fp32 state, as in bitsandbytes: there is nothing to save there.

All parameters are treated as one flat buffer, each padded to whole blocks:

    | p0 p0 p0 .  | p1 p1 p1 p1 | p2 p2 . .  |      padding has gradient 0, so it stays 0 and no block mixes tensors

so a step (update8bit.py) costs the same few operations for one tensor or for the 420 of a LoRA, instead of that many
times the overhead; on a GPU it is one launch of a kernel for all parameters of a dtype. The arithmetic is a fixed
sequence of single roundings, nothing fused, so CPU and GPU give the same bits:

    m <- b1 m + (1 - b1) g        v <- b2 v + ((1 - b2) g) g        u = (lr c2 / c1) m / (sqrt(v) + c2 eps)
    p <- p (1 - lr wd) - u        with c1 = 1 - b1^t, c2 = sqrt(1 - b2^t): the two corrections of adamw.py, moved

**Order of decay.** torch decays before the update, as above. bitsandbytes' CUDA kernel decays after it, so that the
update shrinks as well: p <- (p - u)(1 - lr wd), `order="bnb"`. Its CPU code decays before. The difference is a factor
of 1 - lr wd on u; without weight decay there is none.

**16-bit parameters** are read as fp32, and rounded once at the end of a step: to nearest, or with
`stochastic_rounding` by chance, so that updates too small for the parameter's precision are not lost but happen now and
then (numerics/rounding.py). The random number of an element depends on the seed, the step and its place alone.

**Paged** state lives in host memory and comes to the device page by page (paging.py), with the same results to the bit.

A gradient that is NaN or infinite reaches its parameter and the scales of its block, where it is seen; bitsandbytes
skips such elements silently.

Peer: bitsandbytes AdamW8bit. Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from minift.numerics.dtypes import DTYPES
from minift.optim.adamw import Optimizer, check_hyperparameters
from minift.optim.paging import Page, PagePool
from minift.optim.update8bit import BLOCK, Pieces, Recipe, factors, pieces_of

MIN_8BIT_SIZE = 4096
ORDERS = ("torch", "bnb")
BLOCK_BYTES = 2 * (BLOCK + 4)  # of state: two codes for each value, two scales
PAGED = {"m_codes": (torch.uint8, BLOCK), "v_codes": (torch.uint8, BLOCK),
         "m_absmax": (torch.float32, 1), "v_absmax": (torch.float32, 1)}  # fmt: skip


class AdamW8bit(Optimizer):
    """AdamW with 8-bit state.

    Args:
        params: parameters or groups of them, fp32, bf16 or fp16, all on one device. All of them need a gradient at
            every step.
        lr, betas, eps, weight_decay: as AdamW.
        order: "torch" decays weights before the update, "bnb" after it.
        stochastic_rounding: round 16-bit parameters by chance instead of to nearest.
        seed: of that chance, 32 bits.
        paged: keep 8-bit state in host memory. The fp32 state of small tensors stays on the device.
        page_bytes: size of a page; 520 bytes are the state of one block of 256 values.
        budget_bytes: device memory for pages, at least one page.

    Attributes:
        pool: the PagePool, with its counters, once the first step has been taken; None if not paged.

    Raises:
        ValueError: a setting out of range, or a parameter of another dtype.
    """

    pool: PagePool | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        order: str = "torch",
        stochastic_rounding: bool = False,
        seed: int = 0,
        paged: bool = False,
        page_bytes: int = 1 << 21,
        budget_bytes: int = 1 << 26,
    ):
        if paged and page_bytes < BLOCK_BYTES:
            raise ValueError(f"a page of {page_bytes} bytes is smaller than the {BLOCK_BYTES} of one block's state")
        defaults = check_hyperparameters(lr, betas, eps, weight_decay)
        super().__init__(params, defaults | {"order": order, "stochastic_rounding": stochastic_rounding, "seed": seed})
        self._pages: dict[int, list[tuple[Page, Pieces]]] = {}
        if paged:
            self.pool = PagePool(budget_bytes, page_bytes, self.param_groups[0]["params"][0].device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; ValueError for one out of range."""
        order = (self.defaults | param_group)["order"]
        if order not in ORDERS:
            raise ValueError(f"unknown order {order!r} of decay and update: choose 'torch' or 'bnb'")
        super().add_param_group(param_group)
        other = {p.dtype for p in self.param_groups[-1]["params"]} - set(DTYPES.values())
        if other:
            raise ValueError(f"cannot train {', '.join(map(str, other))}: parameters must be {', '.join(DTYPES)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        missing = sum(p.grad is None for p in params)
        if missing:
            raise ValueError(
                f"{missing} of {len(params)} parameters have no gradient; give AdamW8bit only trained ones"
            )
        for index, group in enumerate(self.param_groups):
            large = [p for p in group["params"] if p.numel() >= MIN_8BIT_SIZE]
            small = [p for p in group["params"] if p.numel() < MIN_8BIT_SIZE]
            # Keyed by group, not by parameter: torch's state_dict passes such entries through as they are.
            state = self.state[f"group{index}"]  # pyright: ignore[reportArgumentType]
            if not state:
                state.update(self._new_state(large, small))
            state["step"] += 1
            streams = 2 * len(self.param_groups)  # of random numbers, in each step
            for stream, tensors in ((2 * index, large), (2 * index + 1, small)):
                if tensors:
                    key = (group["seed"] & 0xFFFFFFFF) << 32 | (state["step"] * streams + stream) & 0xFFFFFFFF
                    recipe = Recipe(factors(group, state["step"]), group["stochastic_rounding"], _signed(key))
                    update = self._update_small if tensors is small else self._update_large
                    _with_dense(update, tensors, index, recipe)
        # Neither the views that the operator writes through nor the kernel tell autograd.
        for p in params:
            torch.autograd.graph.increment_version(p)
        return loss

    def _new_state(self, large: list[Tensor], small: list[Tensor]) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0}
        if large:
            blocks = sum(map(_padded, large)) // BLOCK
            for name, (dtype, width) in PAGED.items():
                device = self.state_device(name, large[0])
                state[name] = self._empty(name, blocks * width, dtype, device).zero_()
            state["m_codes"].fill_(127)  # the code of 0.0 in the signed map; in the unsigned one it is 0
        if small:
            n, device = sum(map(_padded, small)), small[0].device
            state["m_fp32"], state["v_fp32"] = (torch.zeros(n, device=device) for _ in range(2))
        return state

    def _empty(self, name: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.pool is not None and name in PAGED:
            return self.pool.empty((n,), dtype)
        return torch.empty(n, dtype=dtype, device=device)

    def _update_small(self, params: list[Tensor], grads: list[Tensor], index: int, recipe: Recipe) -> None:
        state = self.state[f"group{index}"]  # pyright: ignore[reportArgumentType]
        torch.ops.minift.adamw8bit_(params, grads, state["m_fp32"], state["v_fp32"], None, None, *recipe, 0)

    def _update_large(self, params: list[Tensor], grads: list[Tensor], index: int, recipe: Recipe) -> None:
        state = self.state[f"group{index}"]  # pyright: ignore[reportArgumentType]
        if self.pool is None:
            torch.ops.minift.adamw8bit_(params, grads, *(state[name] for name in PAGED), *recipe, 0)
            return
        if index not in self._pages:
            pages = self.pool.add(*(state[name].view(-1, PAGED[name][1]) for name in PAGED))
            pieces = pieces_of(tuple(p.numel() for p in params), pages[0].stop * BLOCK)
            self._pages[index] = list(zip(pages, pieces, strict=True))
        # Forwards and backwards in turn: the last pages of the step before are still on the device.
        walk = self._pages[index][:: 1 if state["step"] % 2 else -1]
        for number, (page, pieces) in enumerate(walk):
            m, v, m_absmax, v_absmax = (part.view(-1) for part in self.pool.use(page))
            if number + 1 < len(walk):
                self.pool.prefetch(walk[number + 1][0])
            cut = [[tensors[i].view(-1)[start:stop] for i, start, stop, _ in pieces] for tensors in (params, grads)]
            torch.ops.minift.adamw8bit_(*cut, m, v, m_absmax, v_absmax, *recipe, page.start * BLOCK)

    def state_device(self, name: str, p: Tensor) -> torch.device:
        """Paged state stays on the host, also when it is loaded."""
        return torch.device("cpu") if self.pool is not None and name in PAGED else p.device

    def state_dict(self) -> dict[str, Any]:
        """As torch's. The same for paged state, which is written back first, so each loads into the other."""
        if self.pool is not None:
            self.pool.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy; settings that an older version did not save keep their values."""
        super().load_state_dict(state_dict)
        if self.pool is not None:
            for state in self.state.values():
                for name in PAGED.keys() & state.keys():
                    state[name] = self.pool.empty(state[name].shape, state[name].dtype).copy_(state[name])

    def __getstate__(self) -> dict[str, Any]:
        if self.pool is not None:
            self.pool.flush()
        return super().__getstate__() | {"pool": self.pool}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What torch calls for a copy, and with the state and the groups that load_state_dict was given."""
        super().__setstate__(state)
        self._pages = {}
        if self.pool is not None:
            self.pool.clear()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)


def _padded(p: Tensor) -> int:
    return -(-p.numel() // BLOCK) * BLOCK


def _signed(key: int) -> int:
    """64 bits as the operator takes them."""
    return key - (1 << 64) if key >= 1 << 63 else key


def _with_dense(update: Callable, params: list[Tensor], *arguments: Any) -> None:
    """Call `update` with row-major parameters and gradients, copies where need be."""
    grads = [p.grad for p in params if p.grad is not None]  # all of them: step has looked
    dense = [p.contiguous() for p in params]
    update(dense, [g.contiguous() for g in grads], *arguments)
    for p, copy in zip(params, dense, strict=True):
        if copy is not p:
            p.copy_(copy)
