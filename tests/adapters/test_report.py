"""The report says of every method what is trained, what is not, and how much that is; counts are PEFT's or by hand."""

import re
import warnings
from pathlib import Path
from typing import Any

import peers
import pytest
import torch

import minift
from minift.adapters.bottleneck import HoulsbyConfig, ParallelConfig
from minift.adapters.ia3 import IA3Config
from minift.adapters.inject import linear_layers
from minift.adapters.method import Method
from minift.adapters.own import BitFitConfig, FullConfig, NormConfig
from minift.adapters.report import report, untrained_linears, without_gradient
from minift.adapters.verbs import METHODS, add_adapter, load_adapter, save_adapter

BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The tiny model: 2 blocks, d 64, k and v of 32, MLP 128, vocabulary 384, tied.
TOTAL = 384 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64) + 64


def short(paths: tuple[str, ...]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(
    ("config", "trained", "added", "untouched"),
    [
        (IA3Config(), 2 * (32 + 32 + 128), True, {"q_proj", "o_proj", "gate_proj", "up_proj", "lm_head"}),
        (HoulsbyConfig(), 4 * (2 * 4 * 64 + 64 + 4), True, {*BLOCK, "lm_head"} - {"o_proj", "down_proj"}),
        (ParallelConfig(), 2 * (2 * 32 * 64 + 64 + 32), True, {*BLOCK, "lm_head"} - {"down_proj"}),
        (BitFitConfig(), 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64), True, {"lm_head"}),
        (NormConfig(), 5 * 64, False, {*BLOCK, "lm_head"}),
        (FullConfig(), TOTAL, False, set()),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_numbers(tiny: Path, quantize: str | None, config: Method, trained: int, added: bool, untouched: set[str]):
    """A quantized weight counts as the values it stands for."""
    if quantize and isinstance(config, FullConfig):
        pytest.skip("full fine-tuning refuses quantized models")
    ours = minift.load_model(tiny, quantize)
    add_adapter(ours, config)
    found = report(ours)
    assert (found.method, found.trained, found.total) == (config.name, trained, TOTAL + added * trained)
    assert found.share == trained / found.total
    assert short(found.unmatched) == untouched
    assert len(found.unmatched) == 2 * len(untouched - {"lm_head"}) + ("lm_head" in untouched)
    assert sum(layer.trained for layer in found.matched) == trained
    assert {layer.r for layer in found.matched} == {None}
    parameters = dict(ours.named_parameters())
    assert all(tuple(parameters[layer.path].shape) == layer.shape for layer in found.matched)


@pytest.mark.parametrize("settings", ["IA3Config", "LNTuningConfig"])
def test_counts_equal_pefts(tiny: Path, settings: str):
    peft = pytest.importorskip("peft")
    ours = minift.load_model(tiny)
    add_adapter(ours, {"IA3Config": IA3Config(), "LNTuningConfig": NormConfig()}[settings])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, settings)(task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(peers.peer_base(tiny, nf4=False), config)
    trained, total = theirs.get_nb_trainable_parameters()
    # PEFT counts a trained norm beside its original; here it is the model's own.
    copies = trained if settings == "LNTuningConfig" else 0
    assert (report(ours).trained, report(ours).total) == (trained, total - copies)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_format(tiny: Path, method: type[Method]):
    """A row for alike tensors of all blocks, aligned, and the sum in the last line."""
    ours = minift.load_model(tiny)
    add_adapter(ours, method())
    found = report(ours)
    *rows, left, share = found.format().split("\n")
    parsed = [re.fullmatch(r"(\S+) +(\d+) x +\[([\d, ]+)\] +([\d,]+) trained", row) for row in rows]
    assert all(parsed) and len({len(row) for row in rows}) == 1
    sizes = []
    for match in parsed:
        assert match is not None
        n = int(match[2])
        for size in match[3].split(", "):
            n *= int(size)
        assert n == int(match[4].replace(",", ""))
        sizes.append(n)
    assert sum(sizes) == found.trained
    assert left.startswith("not adapted: ")
    assert share == (
        f"{found.trained:,} of {found.total:,} parameters are trained ({100 * found.trained / found.total:.4g} %)"
    )


def test_format_of_biases_in_full(tiny: Path):
    ours = minift.load_model(tiny)
    add_adapter(ours, BitFitConfig())
    lines = report(ours).format().split("\n")
    assert lines[0] == "model.layers.*.self_attn.q_proj.bias     2 x            [64]            128 trained"
    assert lines[-2:] == ["not adapted: lm_head", "1,024 of 99,648 parameters are trained (1.028 %)"]
    add_full = minift.load_model(tiny)
    add_adapter(add_full, FullConfig())
    assert report(add_full).format().endswith("not adapted: none\n98,624 of 98,624 parameters are trained (100 %)")


def test_what_lora_trains_besides(tiny_odd: Path):
    """A copy of the head and two rows of the embedding, beside two ranks."""
    ours = minift.load_model(tiny_odd)
    config = minift.LoraConfig(
        r=4, target_modules=("q_proj", "v_proj"), rank_pattern={"v_proj": 12}, modules_to_save=("lm_head",),
        trainable_token_indices=(3, 5),
    )  # fmt: skip
    minift.add_lora(ours, config)
    found = report(ours)
    assert sum(layer.trained for layer in found.matched) == found.trained
    by_rank: dict[Any, int] = {}
    for layer in found.matched:
        by_rank[layer.r] = by_rank.get(layer.r, 0) + layer.trained
    # q: [80, 65] (5 heads of 16), v: [16, 65]; the head [384, 65].
    assert by_rank == {4: 2 * 4 * (80 + 65), 12: 2 * 12 * (16 + 65), None: 384 * 65 + 2 * 65}
    assert short(found.unmatched) == set(BLOCK) - {"q_proj", "v_proj"}
    lines = found.format().split("\n")
    assert len({len(line) for line in lines[:-2]}) == 1 and found.method == "lora"
    assert any(re.search(r"q_proj +2 x +\[80, 65\] +rank 4 +1,160 trained", line) for line in lines)
    assert any(re.search(r"lm_head\.\S+ +1 x +\[384, 65\] +24,960 trained", line) for line in lines)


def test_a_frozen_second_lora_is_not_adapted(tiny: Path, tmp_path: Path):
    ours = minift.load_model(tiny)
    minift.add_lora(ours, minift.LoraConfig(r=2, target_modules=("k_proj",)))
    save_adapter(ours, tmp_path / "saved")
    ours = minift.load_model(tiny)
    minift.add_lora(ours, minift.LoraConfig(r=3, target_modules=("q_proj",)))
    load_adapter(ours, tmp_path / "saved", "frozen")
    assert short(report(ours).unmatched) == {*BLOCK, "lm_head"} - {"q_proj"}
    assert short(tuple(layer.path for layer in report(ours).matched)) == {"q_proj"}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_nothing_trained_is_refused(tiny: Path, tmp_path: Path, method: type[Method]):
    ours = minift.load_model(tiny)
    with pytest.raises(ValueError, match="no adapter 'default'; call add_lora or add_adapter first"):
        report(ours)
    add_adapter(ours, method())
    save_adapter(ours, tmp_path / "saved")
    again = minift.load_model(tiny)
    load_adapter(again, tmp_path / "saved")
    with pytest.raises(ValueError, match=f"nothing to train: {method.name} is frozen; load it with trainable=True"):
        report(again)


def test_every_linear_of_a_frozen_model(tiny: Path):
    ours = minift.load_model(tiny).requires_grad_(False)
    assert untrained_linears(ours) == list(linear_layers(ours))


def test_a_tensor_that_no_token_reaches(tiny_odd: Path):
    """An embedding's row that no id names does get a gradient (of zero), a head that is not run does not."""
    ours = minift.load_model(tiny_odd)
    add_adapter(ours, FullConfig())
    assert len(without_gradient(ours)) == len(list(ours.parameters()))
    ours.hidden(torch.arange(3, 12).unsqueeze(0)).sum().backward()
    assert without_gradient(ours) == ["lm_head.weight"]
