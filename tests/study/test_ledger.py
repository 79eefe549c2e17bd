"""The predicted memory of a training step against what the step held, and against what autograd saved.

Measured by `LiveBytes` (tests/study/test_live.py), which watches every operation, and by torch's saved-tensor hooks.
"""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import checkpoints
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minift.adapters.inject import add_lora
from minift.adapters.lora import LoraConfig
from minift.data.collate import Batch, share_prefix
from minift.model.attention import Visible
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.layers import Block
from minift.model.rope import rotation
from minift.optim.adamw import AdamW
from minift.optim.adamw8bit import AdamW8bit
from minift.quant.config import QuantConfig
from minift.quant.model import quantize_model
from minift.study.kept import block_keeps, evaluate
from minift.study.ledger import (
    Ledger,
    advice,
    find_batch_size,
    format_fit,
    largest,
    parse_bytes,
    predict,
    predict_for,
)
from minift.study.measure import Measured, held_bytes, held_parts, measure_step
from minift.study.setting import Setting, setting_of_batch, symbols_of
from minift.train.config import TrainConfig

FP32, BF16 = torch.float32, torch.bfloat16
LORA = LoraConfig(r=8)


def config(**changes: Any) -> ModelConfig:
    """A small Llama, in which activations, gradients, weights and logits are of one size."""
    base = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return ModelConfig.from_dict(base | changes)


SMALL = config()
WIDE = config(hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=1000, tie_word_embeddings=False)


def make(setting: Setting) -> CausalLM:
    model = CausalLM(setting.config, setting.attention).to(setting.dtype)
    if setting.quantize:
        quantize_model(model, setting.quantize)
    if setting.lora:
        add_lora(model, setting.lora)
    return model.to(setting.device).train()


def make_batch(setting: Setting) -> Batch:
    ids = torch.randint(3, setting.config.vocab_size, (setting.batch, setting.length))
    positions = torch.arange(setting.length).expand_as(ids).contiguous()
    documents = torch.zeros_like(ids)
    if setting.packed:
        documents[:, setting.length // 2 :] = 1
    labels = ids.clone()
    if setting.trained:
        labels.view(-1)[: labels.numel() - setting.trained] = -100
    return Batch(ids, labels, positions, documents).to(setting.device)


def measure(setting: Setting) -> Measured:
    model = make(setting)
    kind = {"adamw": AdamW, "adamw8bit": AdamW8bit}[setting.optimizer]
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return measure_step(model, [make_batch(setting)], optimizer, setting.checkpointing)  # pyright: ignore[reportArgumentType]


def assert_close(setting: Setting, kept: float, peak: float) -> tuple[Ledger, Measured]:
    ledger, measured = predict(setting), measure(setting)
    assert ledger.before == measured.before
    assert ledger.kept == pytest.approx(measured.kept, rel=kept)
    assert ledger.peak_of_tensors == pytest.approx(measured.peak, rel=peak), ledger.format()
    return ledger, measured


# --- predicted and measured -------------------------------------------------------------------------------------------

GRID = list(itertools.product((SMALL, WIDE), (False, True), (LORA, None), ("eager", "sdpa"), (48, 160)))


@pytest.mark.parametrize(
    ("shape", "checkpointing", "lora", "attention", "length"),
    GRID,
    ids=[f"{c.hidden_size}-{'ckpt' if k else 'all'}-{'lora' if x else 'full'}-{a}-{s}" for c, k, x, a, s in GRID],
)
def test_a_step_takes_what_was_predicted(
    shape: ModelConfig, checkpointing: bool, lora: LoraConfig | None, attention: str, length: int
):
    """32 settings. 10 % are allowed; nothing that is left out (masks of attention while they are made, sums of the
    gradient norm, labels) reaches 2 %. The dtype changes along, so that both meet everything."""
    dtype = FP32 if (length == 48) == checkpointing else BF16
    setting = Setting(shape, 4, length, dtype, None, lora, checkpointing, attention, "adamw")
    assert_close(setting, kept=0.005, peak=0.02)


OTHERS: dict[str, Setting] = {
    "nf4": Setting(SMALL, 4, 128, BF16, QuantConfig(), LORA),
    "nf4, without double quantization": Setting(SMALL, 4, 128, FP32, QuantConfig(double_quant=False), LORA, True),
    "int8": Setting(SMALL, 4, 128, BF16, QuantConfig("int8"), LORA),
    "int8, computed again": Setting(SMALL, 4, 128, BF16, QuantConfig("int8"), LORA, True),
    "8-bit states, larger than all else": Setting(SMALL, 1, 16, FP32, optimizer="adamw8bit"),
    "8-bit states of adapters": Setting(SMALL, 4, 128, FP32, None, LoraConfig(r=64), True),
    "Adam, the update": Setting(SMALL, 1, 16, BF16, optimizer="adamw"),
    "packed": Setting(SMALL, 4, 128, FP32, None, LORA, packed=True),
    "packed, eager": Setting(SMALL, 4, 128, BF16, None, LORA, attention="eager", packed=True),
    "flash": Setting(SMALL, 4, 128, BF16, None, LORA, attention="flash", packed=True),
    "two targets": Setting(SMALL, 4, 128, BF16, None, LoraConfig(r=8, target_modules=("q_proj", "v_proj"))),
    "upper layers": Setting(SMALL, 4, 128, FP32, None, LoraConfig(target_modules=r".*layers\.[23]\..*")),
    "few labels": Setting(config(vocab_size=8000), 4, 128, FP32, None, LORA, trained=20),
    "a large vocabulary": Setting(config(vocab_size=8000, hidden_size=64), 4, 128, BF16, None, LORA, True),
    "a large trained head": Setting(config(vocab_size=8000, tie_word_embeddings=False), 1, 16, FP32),
    "logits in pieces": Setting(config(vocab_size=60_000, hidden_size=32), 2, 128, FP32, None, LORA, True),
    "long rows, scores": Setting(config(hidden_size=64), 1, 512, BF16, None, LORA, True, "eager"),
    "selective": Setting(SMALL, 4, 128, BF16, None, LORA, "selective"),
    "selective, all trained": Setting(SMALL, 4, 128, FP32, None, None, "selective"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings(name: str):
    assert_close(OTHERS[name], kept=0.01, peak=0.02)


def test_dropout_is_counted():
    """Each adapter keeps an input of its own. The first layer's q, k and v share none either, so 10 % must do."""
    dropped = Setting(SMALL, 4, 128, FP32, None, LoraConfig(r=8, dropout=0.1))
    assert_close(dropped, kept=0.05, peak=0.1)
    assert predict(dropped).kept > 1.2 * predict(replace(dropped, lora=LORA)).kept


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_gradients_of_earlier_micro_batches_are_there(lora: LoraConfig | None, checkpointing: Any):
    """2 %: sums of a norm's gradient are not predicted. One micro-batch alone would take less by all gradients."""
    setting = Setting(SMALL, 2, 64, FP32, None, lora, checkpointing, "sdpa", "adamw", accumulation=3)
    ledger, model = predict(setting), make(setting)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    found = measure_step(model, [make_batch(setting) for _ in range(3)], optimizer, checkpointing)
    two_more = 2 * (4 * 8 * 2 * 64)  # ids, labels, positions, documents of 2 x 64 tokens
    assert ledger.before + 2 * 4 * 8 * 2 * 64 == found.before and two_more < 0.02 * found.peak
    assert ledger.peak_of_tensors + 2 * 4 * 8 * 2 * 64 == pytest.approx(found.peak, rel=0.02)
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert ledger.moments[0].categories()["gradients"] == trained


def shared_rows(prefix: int, rows: tuple[int, ...]) -> Batch:
    """Right-padded rows that begin alike, laid out as training does."""
    length = prefix + max(rows)
    ids = torch.randint(3, 300, (len(rows), length))
    ids[:, :prefix], ids[:, prefix] = ids[0, :prefix].clone(), torch.arange(len(rows)) + 3
    documents = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        documents[number, prefix + row :] = -1
    labels = ids.masked_fill(documents < 0, -100)
    labels[:, : prefix + 1] = -100
    batch = share_prefix(Batch(ids, labels, torch.arange(length).repeat(len(rows), 1), documents))
    assert batch.shared_prefix == (prefix, rows)
    return batch


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash"])
@pytest.mark.parametrize("rows", [(100, 60, 90, 95), (200, 20, 150)])
def test_a_shared_prefix(rows: tuple[int, ...], attention: str, checkpointing: str):
    """3 %: small tensors of `after_prefix` while it lays out rows are not predicted."""
    batch = shared_rows(150, rows)
    model = make(Setting(SMALL, 1, 150 + sum(rows), FP32, None, LORA, attention=attention))
    settings = TrainConfig(optimizer="adamw", gradient_checkpointing=checkpointing)
    setting = setting_of_batch(model, batch, settings)
    assert setting.shared == (150, rows) and setting.attention == attention and setting.rows == len(rows)
    ledger = predict_for(setting, model)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    found = measure_step(model, [batch], optimizer, checkpointing == "on")
    assert ledger.before == found.before
    assert ledger.kept == pytest.approx(found.kept, rel=0.005)
    assert ledger.peak_of_tensors == pytest.approx(found.peak, rel=0.03)


def test_the_setting_of_a_step_is_read_off_the_model():
    for name, other in OTHERS.items():
        if other.attention == "flash" or other.trained:
            continue
        batch = make_batch(other)
        settings = TrainConfig(optimizer=other.optimizer, gradient_checkpointing=other.checkpointing)  # pyright: ignore[reportArgumentType]
        found = setting_of_batch(make(other), batch, settings)
        expected = replace(other, attention=found.attention, trained=other.batch * (other.length - 1))
        assert replace(found, lora=other.lora) == expected, name
        assert predict(found).peak == predict(expected).peak


def test_paged_states_are_counted_where_they_are():
    """On a GPU only the pages; on a CPU, where the mechanism can be studied, pages and state."""
    whole = Setting(WIDE, 1, 16, FP32, device="cuda")
    paged = replace(whole, pages=300_000)
    small = predict(whole).categories["optimizer"] - 2 * eight_bit(WIDE) - 8 * eight_bit(WIDE) // 256
    assert predict(paged).categories["optimizer"] == 300_000 + small
    assert predict(replace(paged, pages=10**9)).categories["optimizer"] == predict(whole).categories["optimizer"]
    assert predict(replace(paged, device="cpu")).categories["optimizer"] == (
        predict(whole).categories["optimizer"] + 300_000
    )


def eight_bit(shape: ModelConfig) -> int:
    """Parameters with 8-bit state: all matrices of this model, each of whole blocks."""
    with torch.device("meta"):
        sizes = [p.numel() for p in CausalLM(shape).parameters()]
    assert all(size % 256 == 0 for size in sizes)
    return sum(size for size in sizes if size >= 4096)


def test_magnitudes_of_dora_are_no_weights():
    model = make(Setting(SMALL, lora=LORA))
    plain = held_parts(model, [], AdamW([torch.zeros(1, requires_grad=True)]))
    model = make(Setting(SMALL))
    add_lora(model, replace(LORA, use_dora=True))
    found = held_parts(model, [], AdamW([torch.zeros(1, requires_grad=True)]))
    outputs = 4 * (128 + 64 + 64 + 128 + 352 + 352 + 128)  # of the seven layers in each of four blocks, one number each
    assert found["weights"] == plain["weights"] and found["adapters"] == plain["adapters"] + 4 * outputs


FAMILY_SHAPES = {
    name: {"pad_token_id": None} | checkpoints.BASE | changes for name, changes in checkpoints.FAMILY_NAMES.items()
}


def family_config(name: str) -> ModelConfig:
    changes = dict(FAMILY_SHAPES[name])
    made = transformers.AutoConfig.for_model(changes.pop("model_type", "llama"), **changes)
    return ModelConfig.from_dict(made.to_dict())


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("name", FAMILY_SHAPES)
def test_every_family(name: str, lora: LoraConfig | None):
    """Within 10 %: in these tiny models the temporaries of norms count, which are not predicted."""
    assert_close(Setting(family_config(name), 4, 64, FP32, None, lora, optimizer="adamw"), kept=0.02, peak=0.1)
    assert_close(Setting(family_config(name), 4, 64, BF16, None, lora, True, optimizer="adamw"), kept=0.02, peak=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantize", [None, QuantConfig()])
def test_on_a_gpu(quantize: QuantConfig | None, checkpointing: bool):
    """Within 5 % of the allocator's own count; the first step lets cuBLAS take its workspace."""
    shape = config(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, vocab_size=32000)
    setting = Setting(shape, 8, 512, BF16, quantize, LORA, checkpointing, "sdpa", device="cuda")
    assert predict(setting).peak == pytest.approx(measure(setting).peak, rel=0.05)


# --- what autograd saves ----------------------------------------------------------------------------------------------


def saved_bytes(block: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, known: list[Tensor]) -> int:
    """Bytes that autograd saves while a block runs, each storage once, parameters and `known` left out."""
    known_storages = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers(), *known)}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known_storages:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(x)
    assert out.requires_grad
    return sum(size for size, _ in saved.values())


SOME = LoraConfig(r=4, target_modules=r".*(q_proj|qkv_proj|c_attn|down_proj|fc2)")


@pytest.mark.parametrize("lora", [LORA, SOME, None], ids=["all", "some", "full"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", FAMILY_SHAPES)
def test_a_block_keeps_what_the_list_says(name: str, dtype: torch.dtype, lora: LoraConfig | None):
    """To the byte, for every attention and every family."""
    shape, b, s = family_config(name), 3, 11
    for attention in ("eager", "sdpa", "flash"):
        if attention == "sdpa" and shape.attention_softcap:
            continue
        setting = Setting(replace(shape, windows=(None,) * shape.num_hidden_layers), b, s, dtype, None, lora,
                          attention=attention)  # fmt: skip
        model = make(setting)
        block = model.decoder.layers[1]
        x = torch.randn(b, s, shape.hidden_size, dtype=dtype).requires_grad_()
        positions = torch.arange(s).expand(b, s)
        turns = rotation(shape.rope, shape.head_dim, positions, dtype)
        attend = model._attend(None, torch.zeros(b, s, dtype=torch.long), 0, None, None)
        found = saved_bytes(block, partial(block, rotation=turns, attend=attend), x, list(turns))
        assert isinstance(block, Block)
        kept = [keep for keep in block_keeps(block, attention, True) if keep.role != "graph"]
        expected = sum(evaluate(keep.formula, symbols_of(setting)) for keep in kept)
        if shape.family.norm == "layer" and dtype == BF16:
            # Their mean and deviation are in the dtype of x on a CPU, in fp32 on a GPU.
            assert found <= expected <= found + 4 * b * s * 2
        else:
            assert found == expected, attention


def test_a_mask_is_saved_as_numbers():
    setting = Setting(SMALL, 2, 16, FP32, None, LORA, packed=True)
    model, batch = make(setting), make_batch(setting)
    block = model.decoder.layers[1]
    attend = model._attend(None, batch.input_ids_bs, 0, batch.documents_bs, None)
    turns = rotation(SMALL.rope, SMALL.head_dim, batch.positions_bs, FP32)
    x = torch.randn(2, 16, 128).requires_grad_()
    found = saved_bytes(block, partial(block, rotation=turns, attend=attend), x, list(turns))
    assert isinstance(block, Block)
    kept = block_keeps(block, "sdpa", True, "b s s")
    assert found == sum(evaluate(keep.formula, symbols_of(setting)) for keep in kept)
    assert Visible.of_documents(batch.documents_bs, 16).mask.numel() == 2 * 16 * 16


# --- formulas and the table -------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.lists(st.sampled_from(["a", "n", "d", "2", "17"]), min_size=1, max_size=4), min_size=1, max_size=4))
def test_formulas_are_sums_of_products(terms: list[list[str]]):
    symbols = {"a": 2, "n": 35, "d": 7}
    expected = eval(" + ".join("*".join(term) for term in terms), {}, symbols)
    assert evaluate(" + ".join(" ".join(term) for term in terms), symbols) == expected


@pytest.mark.parametrize(
    "setting", [Setting(SMALL, quantize=QuantConfig(), lora=LORA), Setting(WIDE, attention="eager")]
)
def test_the_table_adds_up(setting: Setting):
    ledger = predict(setting)
    for moment in ledger.moments:
        assert moment.total == sum(moment.categories().values())
        for line in moment.lines:
            assert line.bytes == line.count * evaluate(line.formula, ledger.symbols) >= 0
    assert ledger.peak == max(moment.total for moment in ledger.moments) == sum(ledger.categories.values())
    text = ledger.format()
    assert ledger.at_peak.name in text and f"total {ledger.peak / 1e6:,.2f} MB" in text
    sizes = [
        float(size.replace(",", "")) for size in re.findall(r"([\d,.]+) MB$", text.split("total")[0], re.MULTILINE)
    ]
    assert len(sizes) == sum(line.bytes > 0 for line in ledger.at_peak.lines)
    assert sum(sizes) == pytest.approx(ledger.peak / 1e6, abs=0.005 * len(sizes) + 0.001)  # each rounded to 0.01
    table = text.split("\n")[1 : 2 + len(sizes)]
    assert len({len(line) for line in table}) == 1


def test_what_each_technique_saves():
    full = Setting(SMALL, 4, 256, BF16, attention="eager", optimizer="adamw")
    lora, flash = replace(full, lora=LORA), replace(full, attention="sdpa")
    again, small = replace(full, checkpointing=True), replace(full, optimizer="adamw8bit")
    base = predict(full).categories
    parameters = sum(p.numel() for p in make(full).parameters())
    assert base["optimizer"] == 8 * parameters and predict(full).before >= 2 * parameters + 8 * parameters
    assert predict(small).categories["optimizer"] < 0.3 * base["optimizer"]
    assert predict(lora).categories["optimizer"] < 0.1 * base["optimizer"]
    assert predict(flash).categories["attention scores"] < 0.05 * base["attention scores"]
    assert predict(again).categories["activations"] < 0.5 * base["activations"]
    nf4 = predict(replace(lora, quantize=QuantConfig())).categories
    assert nf4["weights"] < 0.5 * base["weights"]


def test_weights_are_those_of_the_model():
    for setting in (OTHERS["nf4"], OTHERS["int8"], Setting(WIDE, lora=LORA), Setting(SMALL)):
        model = make(setting)
        held = held_bytes(model, [], AdamW([p for p in model.parameters() if p.requires_grad]))
        found = predict(setting).categories
        assert found["weights"] + found["adapters"] == held


# --- what fits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("what", ["batch", "length"])
@pytest.mark.parametrize("budget", [4_321_000, 29_876_543, 10**8])
def test_the_largest_fits_and_the_next_does_not(budget: int, what: str, again: bool):
    setting = Setting(SMALL, 2, 64, BF16, None, LORA, again)
    size = largest(setting, budget, what)
    assert predict(replace(setting, **{what: size})).peak <= budget
    if not (what == "length" and size == SMALL.max_position_embeddings):
        assert predict(replace(setting, **{what: size + 1})).peak > budget


def test_nothing_fits():
    with pytest.raises(MemoryError, match=r"a batch of 1 takes .* MB, more than 0.10 MB: .*saves .* MB; .*saves .* MB"):
        largest(Setting(SMALL), 100_000)
    assert "no batch fits" in format_fit(Setting(SMALL), 100_000) and "no length" in format_fit(Setting(SMALL), 100_000)
    assert "largest batch" in format_fit(Setting(SMALL), 10**9)
    with pytest.raises(ValueError, match="'batch' or 'length'"):
        largest(Setting(SMALL), 10**9, "rank")


# What each piece of advice stands for, as the fields of the setting that it changes.
MEANT: dict[str, dict[str, Any]] = {
    "gradient checkpointing": {"checkpointing": True}, "adamw8bit": {"optimizer": "adamw8bit"},
    "LoRA": {"lora": LoraConfig()}, "nf4": {"quantize": QuantConfig()}, "bfloat16": {"dtype": BF16},
    "sdpa": {"attention": "sdpa"},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_three_things_to_change_and_what_each_saves(name: str):
    """Each saves what it says, computed by making the change here; the largest come first, none is done already."""
    setting = OTHERS[name]
    found = advice(setting)
    assert 2 <= len(found) <= 3 and [x.saves for x in found] == sorted((x.saves for x in found), reverse=True)
    for change in found:
        (changes,) = [meant for word, meant in MEANT.items() if word in change.what] or [{}]
        if "rows at a time" in change.what:
            changes = {"batch": setting.batch // 2, "accumulation": 2}
            assert f"{setting.batch // 2} rows at a time instead of {setting.batch}," in change.what
        elif "tokens instead of" in change.what:
            changes = {"length": setting.length // 2}
            assert f"rows of {setting.length // 2} tokens instead of {setting.length}" in change.what
        if changes.keys() & {"batch", "length"} and setting.trained:
            changes |= {"trained": setting.trained // 2}
        assert changes and any(getattr(setting, key) != value for key, value in changes.items())
        assert change.saves == predict(setting).peak - predict(replace(setting, **changes)).peak > 0
        assert str(change).endswith(f"saves {change.saves / 1e6:,.2f} MB")


def test_the_best_advice_is_what_fills_memory():
    """Parameters and their optimizer state, scores, activations: each setting is made of one of them."""
    state = Setting(WIDE, 1, 16, optimizer="adamw")
    scores = Setting(config(hidden_size=64), 1, 1024, FP32, None, LORA, attention="eager")
    layers = Setting(config(num_hidden_layers=12), 4, 256, BF16, None, LORA)
    assert ["LoRA" in advice(state)[0].what, "sdpa" in advice(scores)[0].what or "checkp" in advice(scores)[0].what,
            "checkp" in advice(layers)[0].what] == [True, True, True]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GB", 24 * 10**9), ("500 MB", 5 * 10**8), ("1.5GiB", 3 << 29), ("16gib", 1 << 34), ("12", 12),
        ("3 kB", 3000), ("7B", 7),
    ],
)  # fmt: skip
def test_amounts_of_memory(text: str, expected: int):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "24 apples", "24GBs", "1e9", "1.GB"])
def test_no_amounts_of_memory(text: str):
    with pytest.raises(ValueError, match="24GB"):
        parse_bytes(text)


def tried(error: Callable[[], Exception], fits: int, start: int) -> tuple[int, list[int]]:
    sizes: list[int] = []

    def step(size: int) -> None:
        sizes.append(size)
        if size > fits:
            raise error()

    return find_batch_size(step, start), sizes


def real_shortage() -> Exception:
    """What torch really raises on a CPU."""
    try:
        torch.empty(1 << 55, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has 2^55 bytes")


@pytest.mark.parametrize("error", [MemoryError, lambda: torch.OutOfMemoryError("CUDA out of memory"), real_shortage])
def test_the_batch_is_halved_until_it_fits(error: Callable[[], Exception]):
    assert tried(error, fits=7, start=50) == (6, [50, 25, 12, 6])
    assert tried(error, fits=50, start=50) == (50, [50])
    assert tried(error, fits=1, start=3) == (1, [3, 1])
    with pytest.raises(MemoryError, match="one row"):
        tried(error, fits=0, start=4)


def test_other_errors_pass_through():
    for error in (RuntimeError("shapes do not fit"), ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            tried(lambda error=error: error, fits=1, start=4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at least 1"):
        find_batch_size(print, 0)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 0}, "at least 1 row"),
        ({"length": 1}, "2 tokens"),
        ({"quantize": QuantConfig()}, "cannot be trained"),
        ({"optimizer": "sgd"}, "adamw8bit"),
        ({"checkpointing": "some"}, "selective"),
        ({"attention": "linear"}, "eager"),
        ({"device": "tpu"}, "cpu, cuda"),
        ({"trained": 10**6}, "1 to 511"),
        ({"trained": 0}, "1 to 511"),
        ({"lora": LoraConfig(use_dora=True)}, "DoRA"),
        ({"accumulation": 0}, "at least 1 micro-batch"),
        ({"shared": (10, (2, 3))}, "1 row of that many tokens"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        Setting(SMALL, **changes)


def test_targets_that_no_layer_has():
    with pytest.raises(ValueError, match="no_such"):
        predict(Setting(SMALL, lora=LoraConfig(target_modules=("no_such",))))


def test_predicting_makes_nothing_and_draws_nothing():
    before = torch.get_rng_state()
    huge = config(hidden_size=8192, intermediate_size=28672, num_hidden_layers=8, num_attention_heads=64)
    ledger = predict(Setting(huge, 8, 4096, lora=LoraConfig(r=64), quantize=QuantConfig(), device="cuda"))
    assert ledger.peak > 4 * 10**9 and math.isfinite(ledger.peak)
    assert torch.equal(before, torch.get_rng_state())


def test_measuring():
    setting = Setting(SMALL, 2, 32, FP32, None, LORA, optimizer="adamw")
    measured = measure(setting)
    assert measured.before < measured.kept < measured.peak
    table = measured.beside(predict(setting)).splitlines()
    names = ["weights", "adapters", "optimizer", "batch", "gradients", "kept activations", "logits"]
    assert [line[:26].strip() for line in table[1:8]] == names and table[7].endswith(" MB")
    assert [line[:4] for line in table[8:]] == ["held", "kept", "peak"]
    compared = [line for line in table[1:] if not line.startswith("logits")]
    assert [float(line.split()[-1]) for line in compared] == pytest.approx([1] * 9, abs=0.03)
    assert sum(measured.parts.values()) > measured.kept and measured.parts["optimizer"] == 8 * sum(
        p.numel() for p in make(setting).parameters() if p.requires_grad
    )
    with pytest.raises(ValueError, match="at least 1"):
        measure_step(make(setting), [make_batch(setting)], AdamW([torch.zeros(1)]), steps=0)
