"""One adapter, trained on the same base in several formats and merged in each way that there is: what is lost?

    way                        the base           the merged weight
    fp32                       fp32               fp32
    bf16                       bf16               bf16
    nf4, kept in bf16          NF4                bf16: four times the memory, what was trained
    nf4, quantized again       NF4                NF4: as small as before, and a model that nobody has trained

The adapter is trained for each base anew, because in use it would be: one that was trained on an NF4 base has made up
for some of its errors.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minift.adapters.config import LoraConfig
from minift.adapters.inject import add_lora
from minift.adapters.merge import MergeReport, merge_lora
from minift.data.collate import Batch
from minift.model.decoder import CausalLM
from minift.quant.model import quantize_model
from minift.study.methods import mean_loss

WAYS = {
    "fp32": (torch.float32, False, False),
    "bf16": (torch.bfloat16, False, False),
    "nf4, kept in bf16": (torch.bfloat16, True, False),
    "nf4, quantized again": (torch.bfloat16, True, True),
}


@dataclass(frozen=True)
class MergeWay:
    """What one way of merging did.

    Attributes:
        report: of the merge, with the drift of the logits.
        base, adapted, merged: loss on the text: of the base alone, with the adapter beside it, and after the merge.
        nbytes: of the merged model.
    """

    report: MergeReport
    base: float
    adapted: float
    merged: float
    nbytes: int


def merge_ways(
    model: CausalLM, train: Callable[[CausalLM], object], text: Batch, config: LoraConfig | None = None, seed: int = 0
) -> dict[str, MergeWay]:
    """Train and merge an adapter in each of WAYS; the model itself is left as it is.

    Args:
        model: in fp32, without adapters.
        train: trains the adapter of the model that it is given.
        text: to measure losses and drift on.
        seed: of the first values of A.
    """
    found = {}
    for name, (dtype, quantized, again) in WAYS.items():
        copied = copy.deepcopy(model).to(dtype)
        if quantized:
            quantize_model(copied, "nf4")
        base = mean_loss(copied, [text])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            add_lora(copied, config)
        train(copied)
        adapted = mean_loss(copied, [text])
        report = merge_lora(copied, requantize=again, token_ids=text.input_ids_bs)
        held = {id(t): t.nbytes for t in (*copied.parameters(), *copied.buffers())}
        found[name] = MergeWay(report, base, adapted, mean_loss(copied, [text]), sum(held.values()))
    return found


def format_ways(ways: dict[str, MergeWay]) -> str:
    """A row for each way."""
    lines = [f"{'merged':<24}{'bytes':>9}{'rounding':>11}{'base':>9}{'adapter':>9}{'merged':>9}{'same word':>11}"]
    for name, way in ways.items():
        same = way.report.drift.same_argmax if way.report.drift else float("nan")
        lines.append(
            f"{name:<24}{way.nbytes:>9,}{way.report.rounding:>11.1e}{way.base:>9.3f}{way.adapted:>9.3f}"
            f"{way.merged:>9.3f}{same:>11.1%}"
        )
    return "\n".join(lines)
