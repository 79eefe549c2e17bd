"""The table of modules against the bytes that a loaded model really holds, and the picture of a run.

The expected bytes are counted from the tensors themselves, or from the formulas of the 4-bit format.
"""

import struct
from collections.abc import Iterable
from pathlib import Path

import peers
import pytest
import torch
from torch import Tensor, nn

import minift
from minift.adapters.lora import LoraConfig
from minift.model.load import build_model
from minift.quant import Linear4bit, QuantConfig, dequantize_model
from minift.study.memory import (
    ModuleRow,
    adapter_table,
    folder_table,
    footprint,
    format_table,
    group_layers,
    module_table,
    peak_memory,
)
from minift.study.plots.runs import loss_curve
from minift.train.loop import StepRecord

FORMATS = [None, "nf4", "fp4", "int8", QuantConfig(double_quant=False), QuantConfig(blocksize=256)]


def held_bytes(model: nn.Module) -> int:
    """Bytes of all tensors, each block of memory once, however many names it has."""
    tensors: dict[int, Tensor] = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def total(rows: Iterable[ModuleRow]) -> tuple[int, int, int]:
    rows = list(rows)
    return tuple(sum(getattr(row, name) for row in rows) for name in ("count", "bytes", "trainable"))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", FORMATS, ids=str)
@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
def test_the_table_adds_up_to_the_bytes_in_memory(
    request: pytest.FixtureRequest, name: str, quantize: str | QuantConfig | None, dtype: torch.dtype
):
    folder = request.getfixturevalue(name)
    model = minift.load_model(folder, quantize, dtype=dtype)
    rows = module_table(model)
    assert total(rows)[1] == held_bytes(model)
    # The same before a byte was read, and for the command line.
    assert module_table(build_model(folder, quantize, dtype)) == rows == folder_table(folder, quantize, dtype)
    minift.add_lora(model, LoraConfig(r=3))
    assert total(module_table(model))[1] == held_bytes(model)


def test_every_module_with_a_weight_has_a_row(tiny_odd: Path):
    rows = {row.path: row for row in module_table(minift.load_model(tiny_odd, "nf4", torch.bfloat16))}
    assert len(rows) == 1 + 2 * (7 + 2) + 1 + 1
    assert rows["model.embed_tokens"] == ModuleRow(
        "model.embed_tokens", 1, (384, 65), "bfloat16", "bfloat16", 2 * 384 * 65, 384 * 65
    )
    assert rows["lm_head"].shape == (384, 65)
    head = rows["model.layers.1.self_attn.k_proj"]
    assert (head.shape, head.stored, head.compute, head.trainable) == ((16, 65), "nf4 + double quant", "bfloat16", 0)
    assert rows["model.norm"].bytes == 2 * 65
    plain = {row.path: row for row in module_table(minift.load_model(tiny_odd, QuantConfig("fp4", 64, False)))}
    assert plain["model.layers.0.mlp.up_proj"].stored == "fp4"


def test_a_tied_head_is_counted_once(tiny: Path):
    rows = module_table(minift.load_model(tiny))
    assert [row.path for row in rows if row.shape == (384, 64)] == ["model.embed_tokens"]


@pytest.mark.parametrize(("blocksize", "double_quant"), [(64, True), (64, False), (256, True), (32, False)])
@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
def test_bytes_of_a_4_bit_layer(request: pytest.FixtureRequest, name: str, blocksize: int, double_quant: bool):
    """Half a byte a weight; a scale for each block, of 1 byte and 4 more for 256 of them, or of 4 bytes; one offset."""
    folder = request.getfixturevalue(name)
    rows = module_table(build_model(folder, QuantConfig("nf4", blocksize, double_quant), None))
    quantized = [row for row in rows if row.stored.startswith("nf4")]
    assert len(quantized) == 14
    for row in quantized:
        n = row.shape[0] * row.shape[1]
        blocks = -(-n // blocksize)
        scales = blocks + 4 * -(-blocks // 256) + 4 if double_quant else 4 * blocks
        assert row.bytes == -(-n // 2) + scales


def test_the_formula_of_the_docstring(tmp_path: Path):
    """0.5 + 1/64 + 4/(64 * 256) bytes a weight: exactly, and 4 for the offset, where no block is short."""
    peers.tiny_llama(tmp_path, hidden=256, heads=4, kv_heads=4, layers=1, intermediate=512)
    rows = module_table(build_model(tmp_path, "nf4", torch.bfloat16))
    quantized = [row for row in rows if row.stored.startswith("nf4")]
    assert [row.shape for row in quantized] == [(256, 256)] * 4 + [(512, 256)] * 2 + [(256, 512)]
    for row in quantized:
        n = row.shape[0] * row.shape[1]
        assert n % (64 * 256) == 0
        assert row.bytes == n * (0.5 + 1 / 64 + 4 / (64 * 256)) + 4


def test_the_real_model_in_4_bits(real: Path):
    """The figures in the documentation: 106 M weights in linears, 28 M in the embedding."""
    rows = module_table(build_model(real, "nf4", torch.bfloat16))
    linears = [row for row in rows if row.stored == "nf4 + double quant"]
    weights = sum(row.shape[0] * row.shape[1] for row in linears)
    assert (len(linears), weights) == (210, 106_168_320)
    # A block of scales is short where 64 * 256 does not divide a layer: at most 4 bytes a layer more, and the offset.
    formula = weights * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert formula <= sum(row.bytes for row in linears) <= formula + 210 * 8
    (embedding,) = (row for row in rows if row.path == "model.embed_tokens")
    assert embedding.bytes == 2 * 49152 * 576
    assert len(group_layers(rows)) == 1 + 9 + 1


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
def test_grouping_loses_nothing(request: pytest.FixtureRequest, name: str, quantize: str | None, lora: bool):
    model = minift.load_model(request.getfixturevalue(name), quantize)
    if lora:
        minift.add_lora(model, LoraConfig(r=3, target_modules=("q_proj", "layers.0.mlp.up_proj")))
    rows = module_table(model)
    grouped = group_layers(rows)
    assert total(grouped) == total(rows)
    assert len(grouped) < len(rows)
    assert {row.count for row in grouped if "*" in row.path} == {2}
    assert all(row.count == 1 for row in grouped if "*" not in row.path)
    assert [row.path for row in grouped[:2]] == ["model.embed_tokens", grouped[1].path]  # the model's own order
    if lora:  # what is wrapped in one layer only stands alone
        assert {row.path for row in grouped} >= {"model.layers.0.mlp.up_proj.base", "model.layers.1.mlp.up_proj"}


def test_layers_that_differ_are_not_put_together(tiny: Path):
    model = minift.load_model(tiny, "nf4")
    layer = model.get_submodule("model.layers.1")
    assert dequantize_model(layer)
    grouped = {row.path: row for row in group_layers(module_table(model))}
    assert grouped["model.layers.0.mlp.up_proj"].stored == "nf4 + double quant"
    assert grouped["model.layers.1.mlp.up_proj"].stored == "float32"
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), Linear4bit)


def test_trainable_parameters_are_counted(tiny: Path):
    model = minift.load_model(tiny, "nf4")
    minift.add_lora(model, LoraConfig(r=3, target_modules=("k_proj",)))
    rows = module_table(model)
    assert total(rows)[2] == 2 * 3 * (64 + 32)
    assert {row.path.rpartition("lora_")[2] for row in rows if row.trainable} == {"A.default", "B.default"}


def test_the_table_of_an_adapter(tiny: Path, tmp_path: Path):
    model = minift.load_model(tiny)
    minift.add_lora(model, LoraConfig(r=3, target_modules=("k_proj",)))
    minift.save_adapter(model, tmp_path / "adapter")
    rows = adapter_table(tmp_path / "adapter")
    assert folder_table(tmp_path / "adapter", "nf4", None) == rows  # other settings do not apply
    assert {(row.path.rpartition(".layers.")[2], row.shape, row.stored, row.bytes, row.trainable) for row in rows} == {
        (f"{layer}.self_attn.k_proj.lora_{part}.weight", shape, "float32", 4 * 3 * (64 if part == "A" else 32), n)
        for layer in (0, 1)
        for part, shape, n in (("A", (3, 64), 192), ("B", (32, 3), 96))
    }
    grouped = group_layers(rows)
    assert [row.count for row in grouped] == [2, 2]
    assert total(grouped) == total(rows) == (4, 4 * 576, 576)


def test_a_table_as_text(tiny: Path):
    rows = module_table(minift.load_model(tiny, "nf4", torch.bfloat16))
    text = format_table(group_layers(rows))
    lines = text.splitlines()
    *lines, without = lines
    assert len(lines) == 1 + 1 + (1 + 9 + 1) + 1 + 1
    assert len({len(line.rstrip()) for line in lines}) == 1  # aligned: the last column ends all lines alike
    assert "get_memory_footprint" in without and f"{footprint(rows, quant_state=False):,} bytes" in without
    assert "get_memory_footprint" not in format_table(module_table(minift.load_model(tiny)))
    assert lines[0].split() == ["module", "count", "shape", "stored", "as", "computed", "in", "bytes", "trainable"]
    count, size, trainable = total(rows)
    assert lines[-1].split() == ["total", str(count), f"{size:,}", f"{trainable:,}"]
    (line,) = (line for line in lines if "model.layers.*.mlp.up_proj" in line)
    assert line.split("  ")[0] == "model.layers.*.mlp.up_proj"
    assert "128 x 64" in line and "nf4 + double quant" in line and line.endswith("no")


BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    None: {},
}


@pytest.mark.parametrize("quantize", BITSANDBYTES, ids=str)
@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
def test_footprint_is_that_of_transformers(request: pytest.FixtureRequest, name: str, quantize: str | None):
    """Without quantization state; theirs also counts the rotary tables (two of half a head in fp32), ours has none.

    The scales that theirs leaves out are those that the layers of bitsandbytes do hold.
    """
    transformers = pytest.importorskip("transformers")
    folder, settings = request.getfixturevalue(name), BITSANDBYTES[quantize]
    config = {"quantization_config": transformers.BitsAndBytesConfig(**settings)} if settings else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **config)
    rows = folder_table(folder, quantize, None)
    rotary = sum(b.nbytes for name, b in theirs.named_buffers() if "inv_freq" in name)
    assert rotary == 2 * 4 * theirs.config.head_dim // 2
    assert theirs.get_memory_footprint() == footprint(rows, quant_state=False) + rotary
    held = 0
    for module in theirs.modules():
        if "bit" in type(module).__name__ and quantize == "int8":
            held += module.weight.SCB.nbytes
        elif "bit" in type(module).__name__:
            state = module.weight.quant_state
            held += state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    assert footprint(rows) - footprint(rows, quant_state=False) == held
    assert (held > 0) == (quantize is not None)


def test_the_peak_does_not_fall():
    before = peak_memory()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    held = peak_memory()
    del block
    assert held >= before >= 50e6  # a process that has imported torch
    assert peak_memory() >= held


# --- the picture ------------------------------------------------------------------------------------------------------


def records(count: int) -> list[StepRecord]:
    return [StepRecord(i + 1, 2.0 / (i + 1), 1.0, 1e-3 * (1 - i / count), 10, 20, 0.1) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 50])
def test_the_loss_curve_is_a_png(tmp_path: Path, count: int):
    path = tmp_path / "pictures/loss.png"
    assert loss_curve(records(count), "a < b & $c").save(str(path)) == path
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (7 * 150, 4 * 150)
    assert len(content) > 10_000  # it is not empty
    assert [left.name for left in path.parent.iterdir()] == ["loss.png"]


def test_another_run_is_another_picture(tmp_path: Path):
    pictures = [loss_curve(records(n)).png for n in (5, 6)]
    assert pictures[0] != pictures[1]


def test_no_steps_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="the run has no steps"):
        loss_curve([])
    assert not list(tmp_path.iterdir())


def test_drawing_needs_no_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And leaves pyplot, with its global state, alone."""
    import sys

    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    loss_curve(records(3)).save(tmp_path / "loss.png")
