"""The training run: which rows a step sees, what is refused, what a run leaves behind (against TRL: test_trl.py)."""

import json
import threading
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import peers
import pytest
import torch

import minift
from minift.data.encode import encode
from minift.train.config import TrainConfig
from minift.train.loop import Plan, TrainResult, examine_rows, prepare, train

ROWS = peers.demo_rows(13)  # batches of 2: the last of an epoch holds one row, and the last step one batch
STEPS = 10  # two and a half epochs


def config(output: Path, **settings: Any) -> TrainConfig:
    chosen: dict[str, Any] = {"optimizer": "adamw", "shuffle": False, "max_steps": STEPS, "lr": 1e-3, "batch_size": 2}
    return TrainConfig(**chosen | settings, output_dir=str(output))


def run(model: Any, folder: Path, rows: Sequence[Any], settings: TrainConfig) -> TrainResult:
    return train(model, minift.load_tokenizer(folder), rows, settings)


def test_a_first_step_at_rate_zero_moves_nothing(tiny: Path, tmp_path: Path, make_model: Any):
    model = make_model(tiny)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, tiny, ROWS, config(tmp_path, max_steps=1, warmup_steps=3))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_rows_with_dropout_share_nothing(tiny: Path, tmp_path: Path, make_model: Any):
    """Rows that share a prefix would share which of its numbers are dropped: less noise than was asked for."""
    curves = []
    for share in (True, False):
        result = run(make_model(tiny, dropout=0.3), tiny, ROWS, config(tmp_path, share_prefix=share))
        curves.append([(record.loss, record.grad_norm, record.tokens) for record in result.steps])
    assert curves[0] == curves[1]
    still = run(make_model(tiny), tiny, ROWS, config(tmp_path)).steps
    assert abs(still[-1].loss - curves[0][-1][0]) > 1e-4  # the dropout was on


# --- which rows a step sees


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"row {number}"} for number in range(count)]


def plan_of(tiny: Path, rows: Sequence[Any], **settings: Any) -> Plan:
    tokenizer, chosen = minift.load_tokenizer(tiny), TrainConfig(**settings)
    examples = examine_rows(tokenizer, rows, chosen).examples
    return Plan(prepare(examples, tokenizer, chosen), tokenizer.pad_id or 0, chosen, share=False)


def micro_batches(plan: Plan, step: int) -> list[list[list[int]]]:
    """Token ids of every row, without padding."""
    return [
        [ids[documents >= 0].tolist() for ids, documents in zip(batch.input_ids_bs, batch.documents_bs, strict=True)]
        for batch in plan.micro_batches(step)
    ]


SIZES = [
    (1, 1, 1, 1, 0), (5, 2, 1, 1, 0), (5, 2, 2, 3, 0), (7, 3, 2, 2, 0), (8, 2, 2, 1, 0), (9, 4, 1, 2, 0),
    (13, 2, 2, 2, 0), (13, 2, 4, 2, 7), (13, 3, 5, 1, 4), (5, 5, 3, 2, 0), (6, 1, 4, 2, 5), (11, 2, 3, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(("count", "size", "accumulation", "epochs", "max_steps"), SIZES)
def test_step_counts_and_rows_equal_transformers(
    tiny: Path, tmp_path: Path, count: int, size: int, accumulation: int, epochs: int, max_steps: int
):
    trainer = peers._data_trainer(
        tiny, texts(count), str(tmp_path), per_device_train_batch_size=size, num_train_epochs=epochs,
        gradient_accumulation_steps=accumulation, max_steps=max_steps or -1, max_length=None,
    )  # fmt: skip
    loader = trainer.get_train_dataloader()
    values = trainer.set_initial_training_values(trainer.args, loader)
    ours = plan_of(
        tiny, texts(count), shuffle=False, batch_size=size, epochs=epochs, gradient_accumulation=accumulation,
        max_steps=max_steps,
    )  # fmt: skip
    assert (ours.steps_per_epoch, ours.total_steps) == (values[1], values[-1])

    theirs = [
        [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        for batch in loader
    ]
    for step in range(ours.total_steps):
        first = step % ours.steps_per_epoch * accumulation
        assert micro_batches(ours, step) == theirs[first : first + accumulation]


def test_shuffling_is_a_new_order_each_epoch_fixed_by_the_seed(tiny: Path):
    settings: dict[str, Any] = {"batch_size": 3, "gradient_accumulation": 2, "epochs": 3}
    plans = [plan_of(tiny, texts(20), seed=seed, **settings) for seed in (0, 0, 7)]

    def epochs(plan: Plan) -> list[list[list[int]]]:
        steps = [[row for batch in micro_batches(plan, step) for row in batch] for step in range(plan.total_steps)]
        size = plan.steps_per_epoch
        return [list(chain.from_iterable(steps[first : first + size])) for first in range(0, len(steps), size)]

    first, again, other = map(epochs, plans)
    assert first == again != other
    everything = sorted(map(tuple, plan_rows(tiny, texts(20))))
    assert len(everything) == 20
    for epoch in [*first, *other]:
        assert sorted(map(tuple, epoch)) == everything
    assert len({str(epoch) for epoch in [*first, *other]}) == 6


def plan_rows(tiny: Path, rows: Sequence[Any]) -> list[list[int]]:
    tokenizer = minift.load_tokenizer(tiny)
    return [encode(tokenizer, row).input_ids for row in rows]


def test_a_step_depends_on_its_number_only(tiny: Path):
    """So going on from a checkpoint needs no replay."""
    plan = plan_of(tiny, texts(20), batch_size=3)
    late = micro_batches(plan, 5)
    torch.rand(7)
    for step in (6, 2, 5):
        micro_batches(plan, step)
    assert micro_batches(plan_of(tiny, texts(20), batch_size=3), 5) == late


def test_rows_of_similar_length_share_a_batch(tiny: Path):
    """Less padding, every row once an epoch, and still a pure function of the step."""
    rows = [{"text": " ".join(["sea"] * (1 + 7 * n % 40))} for n in range(40)]
    settings = {"batch_size": 4, "epochs": 2, "share_prefix": False}
    mixed, alike = (plan_of(tiny, rows, group_by_length=group, **settings) for group in (False, True))
    everything = sorted(map(tuple, plan_rows(tiny, rows)))

    def padding(plan: Plan) -> int:
        batches = [batch for step in range(plan.total_steps) for batch in plan.micro_batches(step)]
        return sum(int((batch.documents_bs < 0).sum()) for batch in batches)

    assert mixed.total_steps == alike.total_steps == 20
    assert padding(alike) < 0.4 * padding(mixed)
    for epoch in range(2):
        batches = [batch for step in range(10) for batch in alike.micro_batches(10 * epoch + step)]
        drawn = [
            tuple(ids[own].tolist())
            for b in batches
            for ids, own in zip(b.input_ids_bs, b.documents_bs >= 0, strict=True)
        ]
        assert sorted(drawn) == everything
    late = micro_batches(alike, 13)
    micro_batches(alike, 2)
    assert micro_batches(alike, 13) == late


def test_split_documents_are_trained_whole(tiny: Path):
    rows = [{"text": " ".join(["sea"] * 300)}, *texts(5)]
    total = sum(map(len, plan_rows(tiny, rows)))
    tokens = {
        packing: sum(row.tokens for row in plan_of(tiny, rows, packing=packing, max_length=50, batch_size=1).rows)
        for packing in ("bfd", "bfd_split")
    }
    assert tokens["bfd_split"] == total > tokens["bfd"]


def test_wrapped_rows_without_a_label_are_left_out(tiny: Path):
    """A long prompt may fill a whole row; a step of nothing but such rows would divide by zero."""
    question = " ".join(["sea"] * 300)
    long = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]}
    plan = plan_of(tiny, [long, *peers.as_messages(ROWS[:3])], packing="wrapped", max_length=50, batch_size=1)
    assert all(row.trained_tokens for row in plan.rows)
    whole = plan_of(tiny, [long, *peers.as_messages(ROWS[:3])], batch_size=1)
    assert sum(row.tokens for row in plan.rows) < sum(row.tokens for row in whole.rows) - 200


# --- refusals and results


def test_nothing_to_train_is_refused(tiny: Path, tmp_path: Path, make_model: Any):
    model = make_model(tiny, r=0).requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train.*add_lora"):
        run(model, tiny, ROWS, config(tmp_path))


@pytest.mark.parametrize(
    ("rows", "settings", "fault"),
    [
        pytest.param([], {}, "no rows", id="no-rows"),
        pytest.param(ROWS[:3], {"batch_size": 4}, "3 rows, fewer than one batch of 4", id="few-rows"),
        pytest.param(ROWS[:3], {"packing": "bfd"}, "1 packed rows, fewer than one batch of 2", id="few-packs"),
        pytest.param(
            [*ROWS[:2], {"text": ""}], {}, r"1 of 3 rows cannot be trained on \(row 3: ", id="nothing-to-learn"
        ),
        pytest.param([*ROWS[:2], {"txt": "a"}], {}, r"1 of 3 rows cannot be trained on \(row 3: ", id="malformed"),
        pytest.param(ROWS, {"max_length": 4}, "all 13 rows are refused[^$]*row 1: .*max_length 4", id="cut"),
        pytest.param(
            ROWS,
            {"max_length": 4, "packing": "bfd"},
            "all 13 rows are refused[^$]*row 1: .*max_length 4",
            id="cut-packed",
        ),
    ],
)
def test_bad_rows_are_refused_before_anything_is_written(
    tiny: Path, tmp_path: Path, make_model: Any, rows: Any, settings: dict[str, Any], fault: str
):
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=fault):
        run(make_model(tiny), tiny, rows, config(output, **settings))
    assert not output.exists()


def test_rows_that_cannot_be_trained_on_are_left_out_when_told_so(tiny: Path, tmp_path: Path, make_model: Any):
    """And what the data will train is said before the first step."""
    said: list[str] = []
    rows = [*ROWS[:4], {"text": ""}]
    settings = config(tmp_path, problems="drop", max_steps=1)
    train(make_model(tiny), minift.load_tokenizer(tiny), rows, settings, said.append)
    assert len(said) == 2 and "5, 1 of them dropped" in said[0] and "<|im_end|>" in said[0]
    assert said[1].startswith("part ")


def test_cached_rows_train_as_fresh_ones(tiny: Path, tmp_path: Path, make_model: Any):
    """The second run reads what the first one encoded; none of the three differs by a bit."""
    said: list[str] = []
    losses = []
    for cache in ("", str(tmp_path / "tokens"), str(tmp_path / "tokens")):
        settings = config(tmp_path / "run", cache=cache, max_steps=3)
        result = train(make_model(tiny), minift.load_tokenizer(tiny), ROWS, settings, said.append)
        losses.append([record.loss for record in result.steps])
    assert losses[0] == losses[1] == losses[2]
    (store,) = (tmp_path / "tokens").iterdir()
    assert ["answers end with" in text for text in said[::2]] == [True, True, False]  # a report, or the store's name
    assert said[4].endswith(str(store))


def test_the_cache_refuses_what_a_run_without_it_refuses(tiny: Path, tmp_path: Path, make_model: Any):
    rows = [*ROWS[:4], {"text": ""}]
    with pytest.raises(ValueError, match=r"1 of 5 rows cannot be trained on \(row 5: "):
        run(make_model(tiny), tiny, rows, config(tmp_path / "run", cache=str(tmp_path / "tokens")))
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_in_the_mode_it_came_in(tiny: Path, tmp_path: Path, make_model: Any, training: bool):
    model = make_model(tiny).train(training)
    run(model, tiny, ROWS, config(tmp_path, max_steps=1))
    assert model.training is training


def test_a_failed_run_leaves_the_mode_alone_too(tiny: Path, tmp_path: Path, make_model: Any):
    """A model that stays in training mode goes on dropping numbers when it is asked to generate."""
    model = make_model(tiny).eval()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError):
        run(model, tiny, ROWS, config(tmp_path, max_steps=1))
    assert model.training is False


def test_the_log_holds_every_nth_step_and_the_last(tiny: Path, tmp_path: Path, make_model: Any):
    model = make_model(tiny)
    result = run(model, tiny, ROWS, config(tmp_path, max_steps=8, log_every=3))
    log = json.loads((tmp_path / "log.json").read_text(encoding="utf-8"))
    assert [record["step"] for record in log["steps"]] == [3, 6, 8]
    assert [record["loss"] for record in log["steps"]] == [result.steps[i].loss for i in (2, 5, 7)]
    assert log["model"] == model.name
    assert TrainConfig(**log["config"]) == config(tmp_path, max_steps=8, log_every=3)
    assert result.finished and result.output_dir == tmp_path and result.adapter == tmp_path / "adapter"
    assert all(record.seconds > 0 for record in result.steps)


def test_output_dir_may_be_a_path(tiny: Path, tmp_path: Path, make_model: Any):
    """Whoever gives one should not learn at the end of the run that it cannot be written to the log."""
    settings: dict[str, Any] = {"output_dir": tmp_path / "run", "max_steps": 2, "batch_size": 2}
    result = run(make_model(tiny), tiny, ROWS, TrainConfig(**settings))
    assert result.adapter == tmp_path / "run" / "adapter"
    assert (tmp_path / "run" / "log.json").is_file()


def test_training_works_outside_the_main_thread(tiny: Path, tmp_path: Path, make_model: Any):
    """Signals reach the main thread only; a notebook or a server may train in another one."""
    results: list[TrainResult] = []
    model = make_model(tiny)
    thread = threading.Thread(target=lambda: results.append(run(model, tiny, ROWS, config(tmp_path, max_steps=2))))
    thread.start()
    thread.join()
    assert results and results[0].finished


# --- what could be trained, but not as meant


def test_a_quantized_model_without_an_adapter_is_refused(tiny: Path, tmp_path: Path):
    model = minift.load_model(tiny, quantize="nf4")
    with pytest.raises(ValueError, match=r"layers\.0\..*is quantized.*no adapter.*add_lora"):
        run(model, tiny, ROWS, config(tmp_path))
    assert [*tmp_path.iterdir()] == []


def test_a_token_without_an_embedding_is_refused_before_the_first_step(tiny: Path, tmp_path: Path):
    tokenizer, model = minift.load_tokenizer(tiny), minift.load_model(tiny)
    (new,) = tokenizer.add_tokens(["<|yoda|>"], special=False)
    minift.add_lora(model, minift.LoraConfig())
    rows = [{"text": "plain"}, {"text": "a <|yoda|> b"}]
    known = model.config.vocab_size
    assert new >= known
    settings = config(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=rf"token {new} \('<\|yoda\|>'\).*{known}: call resize_embeddings"):
        train(model, tokenizer, rows, settings)
    assert [*tmp_path.iterdir()] == []
    model = minift.load_model(tiny)
    minift.resize_embeddings(model, len(tokenizer))
    minift.add_lora(model, minift.LoraConfig())
    assert train(model, tokenizer, rows, settings).finished
