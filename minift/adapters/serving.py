"""Serving many adapters at once: each row of a batch has its own.

    with adapters_of_rows(model, ["ada", "bob", None, "ada"]):      None: the model without an adapter
        generate_batch(model, tokenizer, conversations)             four conversations, side by side

A hundred customers have a hundred adapters of one model. The base's weight takes gigabytes and each adapter megabytes
(study/lora.py counts them), so all are in memory at once; but a customer asks rarely, and a batch of one row wastes the
GPU: for one token it reads the whole weight, and for eight it reads it once, too. So the questions of several customers
have to be one batch, and only the small products differ from row to row:

    y = x W^T for all rows                          one product
    y[rows of ada] += s_ada x[rows of ada] A_ada^T B_ada^T
    y[rows of bob] += s_bob x[rows of bob] A_bob^T B_bob^T       one pair of thin products an adapter, not a row

The rows of an adapter are gathered, go through the same products as they would in a batch of their own, and are put
back. Adapters may differ in rank, layers and kind. (With equal ranks all A could be stacked to one batched product;
engines for thousands of adapters have kernels that gather and multiply in one go: Punica, arXiv 2310.18547; S-LoRA,
arXiv 2311.03285.)

What equals what: given x and the base's output, the rows of an adapter are, bit for bit, what they are in a batch of
their own. A matrix product over more rows may add in another order, though, so the base's output, and with it the
logits, agree with those of separate calls only to rounding. If all rows name the same adapter, or none does, they are
those of `set_adapter` and `disabled` to the bit.

A row is a row of the batch: generate_batch's prompts with padding on the left are fine. In a flat batch all texts share
one row and so cannot differ; in a packed one, all documents of a row get its adapter.

Left out: training (with gradient checkpointing the backward pass computes layers again, perhaps after the block was
left, and would silently take other adapters), and more than one adapter a row (`combine` makes one of several).

Peer: PEFT's `model(..., adapter_names=["ada", "bob", "__base__", "ada"])`, inference only, too, and without DoRA.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minift.adapters.lora import LowRank
from minift.adapters.many import check_names, disabled
from minift.adapters.switched import switched


@contextmanager
def adapters_of_rows(model: nn.Module, adapters: Sequence[str | None]) -> Iterator[None]:
    """Within it each row of every batch is computed with the adapter named for it, whichever adapters are active.

    Args:
        model: in eval mode, with LoRA adapters.
        adapters: a name for each row, or None for the base model alone. Every batch must have as many rows.

    Raises:
        ValueError: there is no adapter of that name, or it has more than low-rank changes; no name at all; the model is
            being trained; within the block, a batch with another number of rows.
    """
    if isinstance(adapters, str):
        raise ValueError(f"adapters must be a list with one name a row, got the string {adapters!r}")
    if not adapters:
        raise ValueError("adapters must name at least one row's adapter, or None for the base model")
    if model.training:
        raise ValueError("rows with adapters of their own cannot be trained; call model.eval() first")
    check_names(model, [name for name in adapters if name is not None])
    route = RowRoute(adapters)
    for path, place in switched(model).items():
        own = [name for name in place.configs if name in route.groups]
        if own and not isinstance(place, LowRank):
            raise ValueError(f"adapter {own[0]!r} has its own {path}, which cannot differ from row to row")
    with disabled(model):  # it also puts back what was there before
        for place in switched(model).values():
            place.route = route
        yield


class RowRoute:
    """Adds to each row of a layer's output what the adapter named for it makes of the row.

    Args:
        adapters: a name or None for each row.
    """

    def __init__(self, adapters: Sequence[str | None]):
        self.rows = len(adapters)
        self.groups: dict[str, list[int]] = {}
        for row, name in enumerate(adapters):
            if name is not None:
                self.groups.setdefault(name, []).append(row)
        self.indices: dict[torch.device, dict[str, Tensor]] = {}

    def __call__(self, layer: LowRank, x: Tensor, base_y: Tensor) -> Tensor:
        """The layer's output [b, ..., out].

        Args:
            x: the layer's input [b, ..., in].
            base_y: the base layer's output for it; overwritten.

        Raises:
            ValueError: another number of rows than of names.
        """
        if x.shape[0] != self.rows:
            raise ValueError(
                f"adapters are named for {self.rows} rows, but this batch has {x.shape[0]}; give one name a row (the "
                "texts of a flat batch are one row)"
            )
        for name, rows_n in self.indices_on(x.device).items():
            if name in layer.configs:
                part = base_y[rows_n]
                base_y[rows_n] = layer.changed(name, x[rows_n], part, part)
        return base_y

    def indices_on(self, device: torch.device) -> dict[str, Tensor]:
        """The numbers of each adapter's rows, int64; copied to a device once, not in every layer."""
        if device not in self.indices:
            self.indices[device] = {name: torch.tensor(rows, device=device) for name, rows in self.groups.items()}
        return self.indices[device]
