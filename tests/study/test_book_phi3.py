"""Chapter 0's numbers: the formula, the model on the meta device, and transformers' own shapes agree with the book."""

import pytest
import torch
from book_models import PHI3, on_meta

from minift.adapters.inject import count_parameters
from minift.adapters.lora import LoraConfig
from minift.study.book_phi3 import BOOK_LOADED, BOOK_PREPARED, PHI3_MINI, ROTARY, phi3, phi3_parts
from minift.study.memory import footprint, module_table


def test_the_shapes_are_those_of_the_hub():
    ours, theirs = phi3(), on_meta(PHI3)
    assert PHI3_MINI.vocab_size == theirs.config.vocab_size
    assert {n: p.shape for n, p in theirs.named_parameters() if "norm" in n or "embed" in n or "head" in n} == {
        n: p.shape for n, p in ours.named_parameters()
    }
    total = sum(p.numel() for p in theirs.parameters())
    assert total == phi3_parts().linears + phi3_parts().others


def test_both_footprints_by_formula_and_by_table():
    parts = phi3_parts()
    assert (parts.linears, parts.others, parts.lora) == (3_623_878_656, 197_200_896, 12_582_912)
    assert parts.loaded == BOOK_LOADED == 2_206_347_264
    assert parts.prepared == BOOK_PREPARED == 2_651_080_704
    for model, size in ((phi3(), BOOK_LOADED), (phi3(LoraConfig(r=8)), BOOK_PREPARED)):
        assert footprint(module_table(model), quant_state=False) + ROTARY == size
    assert parts.state == footprint(module_table(phi3())) + ROTARY - BOOK_LOADED == pytest.approx(57.5e6, abs=5e4)


def test_what_is_kept_in_16_bits_is_smaller_and_the_counts_are_the_books():
    kept = phi3(LoraConfig(r=8), "keep")
    assert kept.decoder.embed_tokens.weight.dtype is torch.bfloat16
    assert footprint(module_table(kept), quant_state=False) + ROTARY == BOOK_PREPARED - 2 * 197_200_896
    assert count_parameters(kept) == (12_582_912, 3_833_662_464)
