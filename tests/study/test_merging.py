"""Four ways of merging: what each stores, counted by hand, and losses that are those of the parts."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from minift.adapters.config import LoraConfig
from minift.study.claims import fit, languages, speaker
from minift.study.merging import WAYS, format_ways, merge_ways


def test_ways_of_merging():
    old, new = languages(vocabulary=8)
    model = speaker(old, width=64, samples=512)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    text = new.sample(64, torch.Generator().manual_seed(9))
    lessons = new.sample(128, torch.Generator().manual_seed(0))
    ways = merge_ways(model, lambda learner: fit(learner, lessons, 8, 2e-2), text, LoraConfig(r=4))
    assert list(ways) == list(WAYS)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with torch.no_grad():
        logits = model(text.input_ids_bs)[:, 1:-1].flatten(0, 1)
    alone = cross_entropy(logits, text.input_ids_bs[:, 2:].flatten()).item()
    assert ways["fp32"].base == pytest.approx(alone, abs=1e-5)  # the same sum of 896 terms of fp32 in another order

    linear = 4 * 64 * 64 + 3 * 64 * 256
    other = 2 * 8 * 64 + 3 * 64
    nf4 = linear // 2 + linear // 64 + 7 * (4 + 4)  # codes, a byte of scale a block; at most 256 blocks a layer
    sizes = {"fp32": 4 * (linear + other), "bf16": 2 * (linear + other), "nf4, kept in bf16": 2 * (linear + other),
             "nf4, quantized again": nf4 + 2 * other}  # fmt: skip
    for name, way in ways.items():
        assert way.nbytes == sizes[name]
        assert way.adapted < way.base - 0.05  # it has learned something
        assert way.report.drift is not None and way.report.drift.tokens == 64 * 16
        stored = {layer.stored for layer in way.report.layers}
        assert len(stored) == 1 and ("nf4" in stored.pop()) == (name == "nf4, quantized again")
    assert ways["fp32"].merged == pytest.approx(ways["fp32"].adapted, abs=1e-5)
    # NF4's levels lie up to 0.15 of a block's largest weight apart; 8 significant bits lose 2^-9 at most.
    assert ways["fp32"].report.rounding == 0 < ways["bf16"].report.rounding < 2**-9
    assert 0.03 < ways["nf4, quantized again"].report.rounding < 0.3
    assert ways["nf4, kept in bf16"].report.rounding < 2**-9

    lines = format_ways(ways).split("\n")
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    assert lines[-1].startswith("nf4, quantized again") and f"{sizes['nf4, quantized again']:,}" in lines[-1]
