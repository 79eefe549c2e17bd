"""Failures are named: where a number stopped being finite, which parameter got no gradient, what to change when memory
runs out, and more accumulation than there is data. The faults are planted, so that what must be named is known."""

from importlib import import_module
from pathlib import Path
from typing import Any

import peers
import pytest
import torch

import minift
from minift.adapters.ia3 import IA3Config
from minift.adapters.own import NormConfig
from minift.adapters.verbs import add_adapter
from minift.data.collate import collate
from minift.data.encode import encode
from minift.train.config import TrainConfig
from minift.train.faults import is_out_of_memory, memory_advice
from minift.train.loop import train
from minift.train.policy import format_precision, precision_table
from minift.train.step import train_step

loop = import_module("minift.train.loop")
ROWS = peers.demo_rows(6)


def batches(tiny: Path) -> list[Any]:
    tokenizer = minift.load_tokenizer(tiny)
    examples = [encode(tokenizer, row) for row in ROWS]
    return [collate(examples[:2], 0), collate(examples[2:], 0)]


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)


PLACES = ["model.embed_tokens", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.gate_proj", "model.norm"]


@pytest.mark.parametrize("place", PLACES)
def test_the_first_module_is_named_and_its_weight_blamed(tiny: Path, make_model: Any, place: str):
    """Everything behind it is not finite either."""
    model = make_model(tiny, r=0)
    with torch.no_grad():
        model.get_submodule(place).weight.flatten()[::2] = float("inf")
    with pytest.raises(FloatingPointError, match=f"that of {place}, whose weight is not finite; check the weights"):
        train_step(model, batches(tiny), sgd(model))


def test_an_overflow_is_told_from_a_bad_weight(tiny: Path, make_model: Any):
    model = make_model(tiny, dtype=torch.float16)
    with torch.no_grad():
        for name in ("layers.1.mlp.up_proj", "layers.1.mlp.gate_proj"):
            model.model.get_submodule(name).base.weight.mul_(6e4)
    place = r"model\.layers\.1\.mlp"
    with pytest.raises(FloatingPointError, match=rf"that of {place}\S*, which got finite .* overflowed in float16"):
        train_step(model, batches(tiny), sgd(model))


def test_a_bad_gradient_is_named_where_it_began(tiny: Path, make_model: Any):
    """Gradients flow from the last layer to the first: all before it are bad, too."""
    model = make_model(tiny, r=0)
    model.model.layers[1].input_layernorm.register_full_backward_hook(
        lambda module, grads_in, grads_out: tuple(g * float("nan") for g in grads_in)
    )
    with pytest.raises(FloatingPointError, match=r"the gradient of model\.layers\.0\.\S+ is not finite, and no output"):
        train_step(model, batches(tiny), sgd(model))


def test_looking_for_the_fault_leaves_no_hook_and_draws_nothing(tiny: Path, make_model: Any):
    model = make_model(tiny, dropout=0.5, warm=True)
    given = batches(tiny)
    random: list[torch.Tensor] = []
    model.model.norm.weight.data[0] = float("nan")
    look = import_module("minift.train.faults").where_not_finite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            import_module("minift.train.step"), "where_not_finite",
            lambda *args: (random.append(torch.get_rng_state()), look(*args))[1],
        )  # fmt: skip
        with pytest.raises(FloatingPointError):
            train_step(model.train(), given, sgd(model))
    assert torch.equal(random[0], torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_run_says_which_step(tiny: Path, tmp_path: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch):
    model, real, taken = make_model(tiny), loop.train_step, []

    def spoiling(*args: Any) -> Any:
        taken.append(1)
        if len(taken) == 3:
            model.model.norm.weight.data[0] = float("nan")
        return real(*args)

    monkeypatch.setattr(loop, "train_step", spoiling)
    with pytest.raises(FloatingPointError, match=r"^step 3: loss nan, .* that of model\.norm, whose weight"):
        run(model, tiny, tmp_path, max_steps=5, save_every=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def run(model: Any, folder: Path, output: Path, **settings: Any) -> Any:
    given: dict[str, Any] = {"batch_size": 2, "output_dir": str(output)} | settings
    return train(model, minift.load_tokenizer(folder), ROWS, TrainConfig(**given))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_parameter_that_the_loss_does_not_reach_is_refused_by_name(
    tiny: Path, tmp_path: Path, make_model: Any, optimizer: str
):
    model = make_model(tiny)
    model.model.layers[1].register_parameter("spare", torch.nn.Parameter(torch.ones(3)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"1 trained parameters got no gradient, the first is model\.layers\.1\.spare:"
    ):
        run(model, tiny, tmp_path, optimizer=optimizer)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize(("batch_size", "accumulation", "fine"), [(2, 3, True), (2, 4, False), (6, 2, False)])
def test_more_accumulation_than_data_is_refused(
    tiny: Path, tmp_path: Path, make_model: Any, batch_size: int, accumulation: int, fine: bool
):
    settings = {"batch_size": batch_size, "gradient_accumulation": accumulation}
    if fine:
        assert len(run(make_model(tiny), tiny, tmp_path / "run", **settings).steps) == 1
        return
    with pytest.raises(
        ValueError, match=f"gradient_accumulation {accumulation} asks for more than the data holds: 6 rows"
    ):
        run(make_model(tiny), tiny, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


# --- memory


def test_a_machine_without_memory_is_recognized():
    """What PyTorch really raises on a CPU: 2^60 bytes are more than any machine has."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("size mismatch")) and not is_out_of_memory(ValueError("not enough memory"))


def test_out_of_memory_names_the_step_and_three_changes(
    tiny: Path, tmp_path: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch
):
    def greedy(*_: Any) -> Any:
        return torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(loop, "train_step", greedy)
    with pytest.raises(MemoryError) as caught:
        run(make_model(tiny), tiny, tmp_path, gradient_accumulation=3)
    text = str(caught.value)
    assert text.startswith(
        "out of memory in step 1. Change one of: (1) batch_size 1 with gradient_accumulation 6 (now 2 and 3)"
    )
    assert "(2) gradient_checkpointing on" in text and "(3) max_length 512 (now 1024)" in text and "(4)" not in text
    assert "`minift memory`" in text


def test_another_error_is_not_taken_for_it(
    tiny: Path, tmp_path: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(loop, "train_step", broken)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
        run(make_model(tiny), tiny, tmp_path)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 9])
@pytest.mark.parametrize("recomputed", ["off", "selective", "on"])
def test_advice_is_three_things_that_are_not_done_already(batch_size: int, recomputed: str):
    config = TrainConfig(batch_size=batch_size, gradient_accumulation=2, gradient_checkpointing=recomputed)
    advice = memory_advice(config)
    assert len(set(advice)) == 3
    assert any("gradient_checkpointing on:" in text for text in advice) == (recomputed != "on")
    if batch_size > 1:  # the same number of rows a step
        words = advice[0].split()
        assert int(words[1]) * int(words[4]) == 2 * batch_size and int(words[1]) < batch_size


# --- the precision policy


def test_the_precision_table_of_qlora(tiny: Path, make_model: Any):
    """r=64 gives 8-bit state to matrices of 4096 elements or more; counted here by hand from the shapes."""
    model = make_model(tiny, "nf4", r=64, dtype=torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    kinds = {p.dtype for p in trained}
    assert len(kinds) == 1
    adapter = str(kinds.pop()).removeprefix("torch.")
    large = sum(p.numel() >= 4096 for p in trained)
    optimizer = minift.AdamW8bit(trained)
    table = {part: (stored, how) for part, stored, how in precision_table(model, optimizer)}
    assert table["weights"][0].startswith("nf4") and table["weights"][0].endswith("(14)")
    assert table["weights"][1] == "bfloat16"
    assert table["adapters"] == (f"{adapter} (28)", "bfloat16")
    assert table["norms"] == ("bfloat16 (5)", "float32 inside, rounded to bfloat16")
    assert (table["embeddings"][0], table["head"][0]) == ("bfloat16 (1)", "as the embeddings")  # tied
    assert table["gradients"][0] == f"{adapter} (28)" and table["loss"][0] == "float32"
    small = f", float32 ({len(trained) - large})" if large < len(trained) else ""
    assert table["optimizer state"] == (f"8-bit codes, float32 scales ({large}){small}", "float32")
    paged = {part: stored for part, stored, _ in precision_table(model, minift.AdamW8bit(trained, paged=True))}
    assert paged["optimizer state"] == f"8-bit codes, float32 scales in pages of host memory ({large}){small}"
    lines = format_precision(precision_table(model, optimizer)).splitlines()
    assert lines[0].split() == ["part", "stored", "computed", "in"] and len(lines) == 9


def test_the_precision_table_of_full_fine_tuning(tiny: Path, make_model: Any):
    """What is stored is what the optimizer then has."""
    model = make_model(tiny, r=0)
    optimizer = minift.AdamW(model.parameters())
    before = precision_table(model, optimizer)
    train_step(model, batches(tiny), optimizer)
    assert precision_table(model, optimizer) == before
    table = {part: (stored, how) for part, stored, how in before}
    assert table["weights"] == ("float32 (14)", "float32")
    assert "none" in table["adapters"][0] and table["norms"] == ("float32 (5)", "float32")
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert {v.dtype for v in tensors} == {torch.float32}
    assert table["optimizer state"] == (f"float32 ({len(list(model.parameters()))})", "float32")


@pytest.mark.parametrize(("stochastic", "how"), [(True, "by chance"), (False, "to nearest")])
def test_the_precision_table_says_how_16_bit_weights_are_rounded(
    tiny_odd: Path, make_model: Any, stochastic: bool, how: str
):
    """Of a model with a head of its own; and a bias, wherever one comes from, is a part as well."""
    model = make_model(tiny_odd, r=0, dtype=torch.bfloat16)
    model.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(131))
    optimizer = minift.AdamW8bit(model.parameters(), stochastic_rounding=stochastic)
    table = {part: (stored, how) for part, stored, how in precision_table(model, optimizer)}
    assert table["optimizer state"][1] == f"float32, then rounded {how} to bfloat16"
    assert table["embeddings"] == table["head"] == ("bfloat16 (1)", "bfloat16")
    assert table["biases"] == ("float32 (1)", "bfloat16") and table["gradients"][0] == "bfloat16 (21), float32 (1)"


def test_the_precision_table_of_a_method(tiny: Path, make_model: Any):
    """What IA3 has put in is an adapter; norms that are trained stay norms."""
    tables = []
    for method in (IA3Config(), NormConfig()):
        model = make_model(tiny, r=0)
        add_adapter(model, method)
        trained = [p for p in model.parameters() if p.requires_grad]
        tables.append((len(trained), dict(row[:2] for row in precision_table(model, minift.AdamW8bit(trained)))))
    (ia3, factors), (norms, none) = tables
    assert ia3 == 2 * 3 and factors["adapters"] == f"float32 ({ia3})" and factors["norms"] == "float32 (5)"
    assert none["adapters"] == "none" and none["norms"] == "float32 (5)" and norms >= 4
