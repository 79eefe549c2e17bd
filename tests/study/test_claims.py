"""The experiment's language by counting, its floor by enumeration, and what it says of runs whose losses are given."""

import math
import statistics

import pytest
import torch
from torch.nn.functional import cross_entropy

from minift.adapters.config import LoraConfig
from minift.adapters.own import FullConfig
from minift.data.encode import IGNORE
from minift.optim.schedule import lr_factor
from minift.study.claims import (
    Language,
    Trial,
    at_edge,
    best,
    fit,
    format_trials,
    gaps,
    languages,
    mean_and_spread,
    means,
    rate_ratios,
    run_trials,
    speaker,
)
from minift.train.evaluate import evaluate


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_samples_follow_the_probabilities():
    """A token in a hundred thousand: a share p is off by more than 6 sqrt(p / n) once in 10^8."""
    old, _ = languages(vocabulary=3)
    batch = old.sample(20_000, generator(), length=7)
    counts = torch.zeros(3, 3, 3)
    for row in batch.input_ids_bs:
        for at in range(2, 7):
            counts[row[at - 2], row[at - 1], row[at]] += 1
    seen = counts.sum(-1, keepdim=True)
    p = old.log_p_vvv.exp()
    assert ((counts / seen - p).abs() <= 6 * (p / seen).sqrt() + 1e-9).all()
    assert torch.equal(batch.labels_bs[:, :2], torch.full((20_000, 2), IGNORE))
    assert torch.equal(batch.labels_bs[:, 2:], batch.input_ids_bs[:, 2:])
    assert batch.trained_tokens == 20_000 * 5


def test_the_floor_is_the_cross_entropy_of_the_true_probabilities():
    """And on samples it is near its expectation, from the probabilities of all pairs at every place."""
    old, _ = languages(vocabulary=3)
    batch = old.sample(20_000, generator(), length=40)
    ids = batch.input_ids_bs
    logits = old.log_p_vvv[ids[:, :-2], ids[:, 1:-1]].flatten(0, 1).double()
    # The probabilities add up to 1 only to fp32's rounding, which cross_entropy takes out again.
    assert old.loss(batch) == pytest.approx(cross_entropy(logits, ids[:, 2:].flatten()).item(), abs=1e-7)
    p, log_p = old.log_p_vvv.double().exp(), old.log_p_vvv.double()
    pairs, surprise = torch.full((3, 3), 1 / 9, dtype=torch.float64), 0.0
    for _ in range(38):
        surprise -= torch.einsum("ab,abc,abc->", pairs, p, log_p).item()
        pairs = torch.einsum("ab,abc->bc", pairs, p)
    # 20,000 texts, whose means deviate by less than 0.4: 6 standard errors.
    assert old.loss(batch) == pytest.approx(surprise / 38, abs=6 * 0.4 / 20_000**0.5)


def test_languages_are_turned():
    same = languages(turn=0.0)
    assert torch.equal(same[0].log_p_vvv, same[1].log_p_vvv)
    old, near, other = languages(new=2, turn=0.4)
    (old_again, far) = languages(turn=math.pi / 2)
    assert torch.equal(old.log_p_vvv, old_again.log_p_vvv) and not torch.equal(near.log_p_vvv, other.log_p_vvv)

    def likeness(one: Language, two: Language) -> float:  # of logits, up to a constant for each pair of tokens
        rows = [x.log_p_vvv - x.log_p_vvv.mean(-1, keepdim=True) for x in (one, two)]
        return torch.corrcoef(torch.stack([row.flatten() for row in rows]))[0, 1].item()

    # 2 * 32 * 32 independent numbers: a correlation is known to about 1 / sqrt(2048) = 0.022.
    assert likeness(old, near) == pytest.approx(math.cos(0.4), abs=0.07)
    assert likeness(near, other) == pytest.approx(math.cos(0.4) ** 2, abs=0.07)
    assert likeness(old, far) == pytest.approx(0, abs=0.07)


def test_fit_is_a_plain_loop():
    """torch's AdamW, gradients clipped to 1, cosine; three steps of fp32, in other orders of summing."""
    old, _ = languages(vocabulary=5)
    model, twin = (speaker(old, width=16, samples=64) for _ in range(2))
    drawn = old.sample(24, generator())
    model.requires_grad_(True)
    fit(model, drawn, batch_size=8, lr=1e-2)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * lr_factor("cosine", step, 3)
        ids = drawn.input_ids_bs[8 * step : 8 * step + 8]
        logits = twin(ids)[:, 1:-1]
        optimizer.zero_grad()
        cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        # Adam moves a parameter whose gradient is rounding alone by up to the rate: 1e-2 * 3. Of most, by far less.
        assert (mine - other).abs().median() <= 1e-5


def test_a_speaker_knows_its_language_and_trials_learn_another():
    old, new = languages(vocabulary=6)
    model = speaker(old, width=16, samples=4096)
    text = old.sample(200, generator(5))
    assert evaluate(model, [text]).loss < old.loss(text) + 0.5 < math.log(6) - 0.1
    before = {name: p.clone() for name, p in model.state_dict().items()}
    methods = {"lora": LoraConfig(r=2), "full": FullConfig()}
    told: list[Trial] = []
    trials = run_trials(model, new, methods, (1e-2, 1e-30), (8, 64), samples=128, seeds=(0, 3), say=told.append)
    assert told == trials and len(trials) == 2 * 2 * 2 * 2
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    heldout = new.sample(512, generator(-1))
    unmoved = evaluate(model, [heldout]).loss - new.loss(heldout)
    for trial in trials:
        if trial.lr == 1e-30:
            assert trial.excess == pytest.approx(unmoved, abs=1e-5)
        else:
            assert 0 < trial.excess < unmoved
    again = run_trials(model, new, methods, (1e-2,), (8,), samples=128, seeds=(3,))
    assert again == [t for t in trials if (t.lr, t.batch_size, t.seed) == (1e-2, 8, 3)]
    with pytest.raises(ValueError, match="whole batches of 48"):
        run_trials(model, new, methods, batch_sizes=(48,), samples=128)


def test_a_run_that_diverges_is_infinitely_bad():
    old, new = languages(vocabulary=4)
    model = speaker(old, width=16, samples=64)
    (trial,) = run_trials(model, new, {"full": FullConfig()}, (1e30,), (8,), samples=64, seeds=(0,))
    assert trial.excess == math.inf


# Two seeds, two methods, two batch sizes, three rates; the best ones are known.
GIVEN = [
    Trial(method, size, lr, seed, excess + 0.01 * seed)
    for (method, size), losses in {
        ("lora", 8): (0.5, 0.3, 0.4), ("full", 8): (0.2, 0.25, 0.9),
        ("lora", 64): (0.9, 0.8, 0.7), ("full", 64): (0.4, 0.3, 0.6),
    }.items()
    for lr, excess in zip((1e-3, 1e-2, 1e-1), losses, strict=True)
    for seed in (0, 1)
]  # fmt: skip


def test_what_is_said_of_given_losses():
    assert best(GIVEN, "lora", 8, 1) == Trial("lora", 8, 1e-2, 1, 0.31)
    assert not at_edge(GIVEN, best(GIVEN, "lora", 8, 1)) and at_edge(GIVEN, best(GIVEN, "lora", 64, 0))
    assert rate_ratios(GIVEN, 8) == pytest.approx([10, 10])
    assert rate_ratios(GIVEN, 64, "full", "lora") == pytest.approx([0.1, 0.1])
    assert gaps(GIVEN, 8) == pytest.approx([0.1, 0.1]) and gaps(GIVEN, 64) == pytest.approx([0.4, 0.4])
    assert means(GIVEN)["full", 8] == pytest.approx({1e-3: 0.205, 1e-2: 0.255, 1e-1: 0.905})
    values = [0.3, 0.1, 0.7]
    assert mean_and_spread(values) == pytest.approx((sum(values) / 3, statistics.stdev(values) / 3**0.5))
    with pytest.raises(ValueError, match="no trial of 'ia3' with batches of 8 and seed 0"):
        best(GIVEN, "ia3", 8, 0)


def test_the_table():
    lines = format_trials(GIVEN).split("\n")
    assert lines[0].split() == ["method", "batch", "0.001", "0.01", "0.1"]
    assert [line.split() for line in lines[1:3]] == [
        ["lora", "8", "0.505", "0.305*", "0.405"],
        ["full", "8", "0.205*", "0.255", "0.905"],
    ]
