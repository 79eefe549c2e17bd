"""The textbook's heads against PyTorch's, the study of scaling against autograd, and the trace of a model against what
transformers gives for `output_attentions`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILY_NAMES, checkpoint, load_theirs, random_ids
from torch import Tensor, nn

import minift
from minift.adapters.lora import LoraConfig
from minift.model.attention import ATTENTION
from minift.study.attention import (
    ScoreStudy,
    element_counts,
    multi_head_attention,
    scaling_study,
    study_scores,
    trace_attention,
)

# --- the textbook's heads ---------------------------------------------------------------------------------------------


def theirs_and_weights(d: int, heads: int) -> tuple[nn.MultiheadAttention, list[Tensor]]:
    theirs = nn.MultiheadAttention(d, heads, bias=False, batch_first=True, dtype=torch.float64)
    return theirs, [*theirs.in_proj_weight.detach().chunk(3), theirs.out_proj.weight.detach()]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("d", "heads"), [(8, 1), (8, 8), (12, 3), (64, 4)])
def test_heads_equal_those_of_pytorch(d: int, heads: int, scaled: bool, mask: bool):
    theirs, weights = theirs_and_weights(d, heads)
    x = torch.randn(2, 5, d, dtype=torch.float64)
    ours = multi_head_attention(x, *weights, heads, scaled, mask)  # pyright: ignore[reportCallIssue]
    if not scaled:  # theirs always divides: queries that are larger by as much undo it
        with torch.no_grad():
            theirs.in_proj_weight[:d] *= (d / heads) ** 0.5
    hidden = torch.ones(5, 5).triu(1).bool() if mask else None
    out, probabilities = theirs(x, x, x, attn_mask=hidden, average_attn_weights=False)
    assert (ours.out_bsd - out).abs().max() <= 1e-12
    assert (ours.probabilities_bhst - probabilities).abs().max() <= 1e-12


def test_every_tensor_is_what_its_name_says():
    """Head by head, from the rows of the weights that belong to it."""
    _, (w_q, w_k, w_v, w_o) = theirs_and_weights(12, 3)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    ours = multi_head_attention(x, w_q, w_k, w_v, w_o, 3)
    for h in range(3):
        rows = slice(4 * h, 4 * h + 4)
        q, k, v = (torch.einsum("bsd,ed->bse", x, w[rows]) for w in (w_q, w_k, w_v))
        for mine, expected in zip((ours.q_bhse, ours.k_bhte, ours.v_bhte), (q, k, v), strict=True):
            assert (mine[:, h] - expected).abs().max() <= 1e-12
        assert (ours.scores_bhst[:, h] - torch.einsum("bse,bte->bst", q, k) / 2).abs().max() <= 1e-12
        context = torch.einsum("bst,bte->bse", ours.probabilities_bhst[:, h], v)
        assert (ours.context_bsd[:, :, rows] - context).abs().max() <= 1e-12
    later = torch.ones(5, 5).triu(1).bool().expand(2, 3, 5, 5)
    assert (ours.masked_bhst[later] == -torch.inf).all() and (ours.probabilities_bhst[later] == 0).all()
    assert torch.equal(ours.masked_bhst[~later], ours.scores_bhst[~later])
    assert (ours.probabilities_bhst.sum(-1) - 1).abs().max() <= 1e-12


def test_scores_are_cosines_times_lengths():
    _, weights = theirs_and_weights(12, 3)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    ours = multi_head_attention(x, *weights, 3, scaled=False)  # pyright: ignore[reportCallIssue]
    q, k = ours.q_bhse[:, :, :, None], ours.k_bhte[:, :, None]
    lengths = q.norm(dim=-1) * k.norm(dim=-1)
    cosines = torch.nn.functional.cosine_similarity(q, k, dim=-1)
    assert (ours.scores_bhst - cosines * lengths).abs().max() <= 1e-12


def test_the_books_counts():
    """One row of 256 tokens, width 1024, 16 heads: counted, and of the tensors themselves."""
    counts = element_counts(1, 256, 1024, 16)
    large = {"scores_bhst", "masked_bhst", "probabilities_bhst"}
    assert counts == {name: 1_048_576 if name in large else 262_144 for name in counts}
    assert len(counts) == 8
    x, weight = torch.empty(1, 256, 1024, device="meta"), torch.empty(1024, 1024, device="meta")
    ours = multi_head_attention(x, weight, weight, weight, weight, 16)
    assert {name: value.numel() for name, value in ours._asdict().items()} == counts


@pytest.mark.parametrize("shape", [(1, 1, 6, 1), (3, 5, 6, 2), (2, 7, 6, 6)])
def test_counts_are_those_of_the_tensors(shape: tuple[int, int, int, int]):
    b, s, d, heads = shape
    weight = torch.randn(d, d)
    ours = multi_head_attention(torch.randn(b, s, d), weight, weight, weight, weight, heads)
    assert {name: value.numel() for name, value in ours._asdict().items()} == element_counts(*shape)


@pytest.mark.parametrize("heads", [0, 5, 24])
def test_heads_that_do_not_divide_the_width_are_refused(heads: int):
    weight = torch.randn(12, 12)
    with pytest.raises(ValueError, match=f"a width of 12 cannot be cut into {heads} heads; choose a divisor of 12"):
        multi_head_attention(torch.randn(1, 2, 12), weight, weight, weight, weight, heads)
    with pytest.raises(ValueError, match="choose a divisor of 12"):
        element_counts(1, 2, 12, heads)


# --- why scores are scaled --------------------------------------------------------------------------------------------


def test_study_of_scores_equals_autograd_and_torchs_entropy():
    scores = 2 * torch.randn(7, 5, dtype=torch.float64)
    ours = study_scores(scores)
    sizes = [torch.autograd.functional.jacobian(lambda row: row.softmax(0), row).norm().item() for row in scores]  # pyright: ignore[reportAttributeAccessIssue]
    entropy = torch.distributions.Categorical(logits=scores).entropy().mean().item()
    expected = ScoreStudy(scores.std().item(), entropy, sum(sizes) / 7, sorted(sizes)[3])
    assert ours == pytest.approx(expected, abs=1e-12)


def test_study_at_both_ends():
    """All keys alike: entropy log t, derivative I/t - 1/t^2 of norm sqrt(t - 1)/t. One key far ahead: nothing."""
    alike = study_scores(torch.full((3, 16), 7.0))
    assert alike == pytest.approx(
        ScoreStudy(0.0, torch.tensor(16.0).log().item(), 15**0.5 / 16, 15**0.5 / 16), abs=1e-6
    )
    one = study_scores(torch.eye(16) * 1000)
    assert one[1:] == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("d_k", [16, 64, 1024])
def test_unscaled_scores_spread_like_the_root_of_their_width(d_k: int):
    """Of n = 512 x 64 products the variance is d_k, off by sqrt(2/n + 2/d_k (1/512 + 1/64)) of it (scores of one query
    share its length), the standard deviation by half of that; 5 of these are never exceeded."""
    raw, scaled = scaling_study(d_k)
    off = 0.5 * (2 / (512 * 64) + 2 / d_k * (1 / 512 + 1 / 64)) ** 0.5
    assert raw.std == pytest.approx(d_k**0.5, rel=5 * off)
    assert scaled.std == pytest.approx(raw.std / d_k**0.5, rel=1e-12)


def test_without_scaling_the_softmax_is_one_hot_and_does_not_learn():
    """The table in the module docstring, to the digits that it shows; another seed tells the same."""
    raw, scaled = scaling_study(1024)
    assert (round(raw.std, 1), round(raw.entropy, 2), round(raw.gradient, 2)) == (32.1, 0.11, 0.06)
    assert round(raw.median_gradient, 4) == 0.0001
    assert (round(scaled.std, 1), round(scaled.entropy, 2), round(scaled.gradient, 2)) == (1.0, 3.68, 0.18)
    assert round(scaled.median_gradient, 2) == 0.18
    other_raw, other_scaled = scaling_study(1024, seed=1)
    assert other_raw != raw
    assert other_raw.entropy < 0.1 * other_scaled.entropy
    assert other_raw.median_gradient < 0.01 * other_scaled.median_gradient


def test_studies_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    assert scaling_study(8, queries=4, keys=3) == scaling_study(8, queries=4, keys=3)
    assert torch.equal(torch.get_rng_state(), before)


# --- the trace of a model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    return {"llama": tiny} | {
        name: checkpoint(tmp_path_factory.mktemp(name), **FAMILY_NAMES[name]) for name in ("mistral", "gemma2")
    }


FAMILIES = ["llama", "mistral", "gemma2"]


def their_attentions(folder: Path, **inputs: Any) -> tuple[list[Tensor], float]:
    """The probabilities of every layer in fp32, and how far off rounding they are from those in fp64."""
    models = [load_theirs(folder, "eager", dtype) for dtype in (torch.float32, torch.float64)]
    with torch.no_grad():
        found = [model(**inputs, output_attentions=True, use_cache=False).attentions for model in models]
    rounding = max((fp32 - fp64).abs().max().item() for fp32, fp64 in zip(*found, strict=True))
    assert 0 < rounding < 1e-5  # the reference is sound
    return found[0], rounding


@pytest.mark.parametrize("attention", ["eager", "flash"])
@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_equal_transformers(folders: dict[str, Path], family: str, attention: str):
    """Both in fp32: two errors like theirs may add up, and theirs is one sample, so 4 times that (see checkpoints.py).
    20 tokens are more than the windows of Mistral and Gemma 2 here, and Gemma 2's caps change every score."""
    model = minift.load_model(folders[family], attention=attention)
    ids = random_ids(model.config, 2, 20)
    expected, rounding = their_attentions(folders[family], input_ids=ids)
    before = model(ids)
    steps = trace_attention(model, ids)
    assert torch.equal(model(ids), before) and model.attention is ATTENTION[attention]
    assert len(steps) == len(expected) == model.config.num_hidden_layers
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours.probabilities_bhst.shape == theirs.shape
        assert (ours.probabilities_bhst - theirs).abs().max().item() <= 4 * rounding
        assert not any(step.requires_grad for step in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_transformers(folders: dict[str, Path], family: str):
    """transformers finds the documents where position_ids restart."""
    model = minift.load_model(folders[family], attention="eager")
    positions = torch.tensor([[*range(9), *range(3), *range(8)]])
    documents = torch.tensor([[0] * 9 + [1] * 3 + [2] * 8])
    ids = random_ids(model.config, 1, 20)
    expected, rounding = their_attentions(folders[family], input_ids=ids, position_ids=positions)
    for given in (positions, None):
        # Without positions those of the row are taken: distances within a document are the same, but the angles of
        # later positions, up to 19, are rounded as many times more coarsely as they are larger.
        allowed = 4 * rounding * (1 if given is not None else 20)
        for ours, theirs in zip(trace_attention(model, ids, documents, given), expected, strict=True):
            assert (ours.probabilities_bhst - theirs).abs().max().item() <= allowed
            other = documents[0][:, None] != documents[0]
            assert (ours.probabilities_bhst[:, :, other] == 0).all()


def test_caps_and_windows_show(folders: dict[str, Path]):
    model = minift.load_model(folders["gemma2"])
    steps = trace_attention(model, random_ids(model.config, 1, 20))
    assert [layer.mask.sum(-1).max().item() for layer in steps] == [7, 20]
    assert all(1 < layer.scores_bhst.abs().max() <= 2.0 for layer in steps)


def test_sdpa_models_and_adapters_are_traced(folders: dict[str, Path]):
    model = minift.load_model(folders["llama"], "nf4", attention="sdpa")
    ids = random_ids(model.config, 2, 9)
    before = trace_attention(model, ids)
    minift.add_lora(model, LoraConfig(r=2))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_()
    after = trace_attention(model, ids)
    assert model.attention is ATTENTION["sdpa"]
    assert all((a.scores_bhst - b.scores_bhst).abs().max() > 0.01 for a, b in zip(before, after, strict=True))


def test_the_models_attention_comes_back_after_an_error(folders: dict[str, Path]):
    model = minift.load_model(folders["llama"], attention="sdpa")
    with pytest.raises(IndexError):
        trace_attention(model, torch.tensor([[model.config.vocab_size]]))
    assert model.attention is ATTENTION["sdpa"]
