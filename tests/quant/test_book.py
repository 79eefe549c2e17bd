"""Numbers of Godoy's book (chapters 0, 2 and 3 and the seminar's notes) that follow from shapes and formats.

The models are the real configurations on the meta device: shapes and dtypes, no memory, no weights. Quantizing them
there gives the same bytes as quantizing the real ones.

`get_memory_footprint` counts parameters and buffers, without the quantization state; in the book's transformers 4 each
Phi-3 layer also held a rotary table of 48 fp32 numbers.
"""

import pytest
import torch
import transformers
from book_models import OPT, PHI3, on_meta
from torch import nn

import minift
from minift.adapters.inject import count_parameters
from minift.quant import QuantConfig, QuantizedLinear, codebook, quantize_4bit, swap_linears
from minift.study.memory import footprint, module_table

PHI3_LINEARS = 3_623_878_656
OPT_LINEARS = 303_038_464


def phi3(quantize: QuantConfig | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = on_meta(PHI3, dtype)
    if quantize:
        swap_linears(model, quantize)
    return model


def opt(quantize: QuantConfig | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = on_meta(OPT, dtype)
    if quantize:
        swap_linears(model, quantize)
    return model


def book_footprint(model: nn.Module) -> int:
    """What get_memory_footprint gives: no quantization state."""
    return footprint(module_table(model), quant_state=False)


# --- footprints -------------------------------------------------------------------------------------------------------


def test_phi3_nf4_is_2206_347264_mb():
    model = phi3(QuantConfig(), torch.bfloat16)
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert sum(m.in_features * m.out_features for m in quantized) == PHI3_LINEARS
    assert len(quantized) == 32 * 4
    assert book_footprint(model) + 32 * 48 * 4 == 2_206_347_264


def test_phi3_prepared_with_lora_is_2651_080704_mb():
    """After preparation everything unquantized is fp32, and LoRA's matrices are."""
    model = phi3(QuantConfig(), torch.float32)
    minift.add_lora(model, minift.LoraConfig(r=8))
    assert book_footprint(model) + 32 * 48 * 4 == 2_651_080_704
    assert round(2_651_080_704 / 2_206_347_264, 4) == 1.2016  # "20 % larger"


def test_phi3_lora_trains_12_58_million_of_3833_66_million():
    model = phi3(QuantConfig())
    minift.add_lora(model, minift.LoraConfig(r=8, target_modules=("o_proj", "qkv_proj", "gate_up_proj", "down_proj")))
    trained, total = count_parameters(model)
    assert (trained, total) == (12_582_912, 3_833_662_464)
    assert round(100 * trained / total, 2) == 0.33
    assert trained * 4 == 50_331_648  # the adapter's file: about 50 MB


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1_324_785_664), (torch.float16, 662_392_832)])
def test_opt_350m_is_1324_785664_mb_in_fp32_and_662_392832_in_fp16(dtype: torch.dtype, size: int):
    model = opt(dtype=dtype)
    assert sum(p.numel() for p in model.parameters()) == 331_196_416
    assert book_footprint(model) == size


@pytest.mark.parametrize(("rest", "size"), [(torch.float16, 359_354_368), (torch.float32, 415_670_272)])
def test_opt_350m_int8_is_359_354368_mb_or_415_670272(rest: torch.dtype, size: int):
    model = opt(QuantConfig("int8"), rest)
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(quantized) == 24 * 6 + 2 == 146  # project_in and project_out are quantized, the tied head is not
    assert sum(m.in_features * m.out_features for m in quantized) == OPT_LINEARS == 24 * 12 * 1024**2 + 2 * 512 * 1024
    assert book_footprint(model) == size


def test_opt_350m_nf4_is_264_15104_mb():
    model = opt(QuantConfig())
    assert book_footprint(model) == 264_151_040
    packed = [b for name, b in model.named_buffers() if name.endswith(".weight")]
    plain = {id(p) for p in model.parameters()}
    assert (len(packed), len(plain)) == (146, 388 - 146)


def test_opt_350m_nf4_really_takes_4_8_mb_more():
    """4.73 MB of absmax and 0.07 MB of nested absmax that get_memory_footprint leaves out, and 4 bytes a layer."""
    rows = module_table(opt(QuantConfig()))
    state = footprint(rows) - footprint(rows, quant_state=False)
    blocks = OPT_LINEARS // 64
    assert round(blocks / 1e6, 2) == 4.73 and round(4 * blocks / 256 / 1e6, 2) == 0.07
    assert state == blocks + 4 * blocks // 256 + 4 * 146


def test_opt_350m_lora_trains_786_432_parameters():
    model = opt(QuantConfig())
    assert len(minift.add_lora(model, minift.LoraConfig(r=8, target_modules=("q_proj", "v_proj")))) == 2 * 24
    trained, total = count_parameters(model)
    assert (trained, total) == (786_432, 331_982_848)
    assert round(100 * trained / total, 4) == 0.2369


def numel(model: nn.Module, *ends: str) -> int:
    """Parameters of the modules whose path ends so."""
    return sum(p.numel() for name, m in model.named_modules() if name.endswith(ends) for p in m.parameters())


def test_opt_350m_lora_with_trained_copies_of_modules():
    """PEFT's modules_to_save trains a full copy beside each module: of the layer norms, then of the embedding, too."""
    model = opt(QuantConfig())
    minift.add_lora(model, minift.LoraConfig(r=8, target_modules=("q_proj", "v_proj")))
    trained, total = count_parameters(model)
    norms, embedding = numel(model, "layer_norm"), numel(model, "embed_tokens")
    assert (trained + norms, total + norms) == (884_736, 332_081_152)
    assert round(100 * 884_736 / 332_081_152, 4) == 0.2664
    both = norms + embedding
    assert (trained + both, total + both) == (26_624_000, 357_820_416)
    assert round(100 * 26_624_000 / 357_820_416, 4) == 7.4406


def test_opt_350m_lora_on_the_embedding():
    """A is 8 x 50,272 and B 512 x 8; the total counts the copy that unties the head."""
    model = opt(QuantConfig())
    minift.add_lora(model, minift.LoraConfig(r=8, target_modules=("q_proj", "v_proj")))
    trained, total = count_parameters(model)
    low_rank = 8 * 50272 + 512 * 8
    embedding = numel(model, "embed_tokens")
    assert embedding == 50272 * 512
    assert (trained + low_rank, total + low_rank + embedding) == (1_192_704, 358_128_384)
    assert round(100 * 1_192_704 / 358_128_384, 4) == 0.3330


def test_tinyllama_qlora_trains_50_462_720_parameters():
    """The seminar's run: r = 64 on all seven projections."""
    tinyllama = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4,
    )  # fmt: skip
    model = on_meta(tinyllama)
    swap_linears(model, QuantConfig())
    minift.add_lora(model, minift.LoraConfig(r=64, alpha=32))
    assert count_parameters(model)[0] == 50_462_720


@pytest.mark.parametrize(("bits", "size"), [(32, 1440), (16, 720), (8, 360), (4, 180)])
def test_360_million_parameters_take_1440_720_360_180_mb(bits: int, size: int):
    stored = {32: torch.float32, 16: torch.bfloat16, 8: torch.int8}
    n = 360_000_000
    if bits == 4:
        packed, _ = quantize_4bit(torch.randn(1000))
        assert packed.nbytes / 1000 * n / 1e6 == size
    else:
        assert torch.empty(n, dtype=stored[bits], device="meta").nbytes / 1e6 == size


# --- formats ----------------------------------------------------------------------------------------------------------


def test_double_quantization_saves_0_373_bits_a_parameter():
    """0.5 bit of scales becomes 0.127; 3.0 GB on 65 billion parameters."""
    x = torch.randn(4096, 4096)  # a whole number of nested blocks
    bits = [
        8 * sum(t.nbytes for t in (s.absmax, s.nested_absmax) if t is not None) / x.numel()
        for s in (quantize_4bit(x, double_quant=nested)[1] for nested in (False, True))
    ]
    assert bits == [0.5, 0.126953125]
    assert round(bits[0] - bits[1], 3) == 0.373
    assert round((bits[0] - bits[1]) * 65e9 / 8 / 1e9, 1) == 3.0


def test_65_billion_parameters_take_130_gb_or_32_5_gb():
    packed, _ = quantize_4bit(torch.randn(1000))
    assert 65e9 * torch.bfloat16.itemsize == 130e9
    assert 65e9 * packed.nbytes / 1000 == 32.5e9


def test_nf4_table():
    """To four digits, as printed."""
    printed = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0,
               0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]  # fmt: skip
    assert [round(v, 4) for v in codebook("nf4").tolist()] == printed


def test_fp4_table():
    printed = [0, 0.0052, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25]
    values = [round(v, 4) for v in codebook("fp4").tolist()]
    assert values[:8] == printed and values[8:] == [-v for v in printed]
    assert len(set(values)) == 15  # two zeros


@pytest.mark.parametrize(
    ("shape", "packed", "absmax", "nested"), [((1024, 1024), 524_288, 16_384, 64), ((10, 10), 50, 2, 1)]
)
def test_shapes_of_the_stored_state(shape: tuple[int, int], packed: int, absmax: int, nested: int):
    codes, state = quantize_4bit(torch.randn(shape), double_quant=True)
    assert codes.shape == (packed, 1) and codes.dtype == torch.uint8
    assert state.absmax.shape == (absmax,) and state.absmax.dtype == torch.uint8
    assert state.nested_absmax is not None and state.nested_absmax.shape == (nested,)


# --- LoRA's arithmetic ------------------------------------------------------------------------------------------------


def lora_size(out_features: int, in_features: int, r: int) -> int:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
    minift.add_lora(model, minift.LoraConfig(r=r, target_modules=("0",)))
    return count_parameters(model)[0]


@pytest.mark.parametrize(
    ("size", "r", "full", "low"),
    [(12288, 8, 150_994_944, 196_608), (4096, 8, 16_777_216, 65_536), (1024, 8, 1_048_576, 2 * 8192), (10, 1, 100, 20)],
)
def test_low_rank_sizes(size: int, r: int, full: int, low: int):
    """GPT-3's matrix: 150 M -> 197 K; the seminar's: 16.8 M -> 65,536; chapter 3's and the 10 x 10 example."""
    assert size * size == full
    assert lora_size(size, size, r) == low


def test_one_hundred_customers():
    """Full copies of a 4096 x 4096 matrix for 100 customers, or one base and 100 adapters."""
    base, adapter = 4096**2, lora_size(4096, 4096, 8)
    assert (round(100 * base / 1e9, 2), round((base + 100 * adapter) / 1e6, 1)) == (1.68, 23.3)


def test_the_factor_of_nf4_is_roughly_8():
    """Against fp32, on the linears, scales included; of the whole OPT-350M it is 4.9, since the embedding stays."""
    before = footprint(module_table(opt()))
    rows = module_table(opt(QuantConfig()))
    quantized = [row for row in rows if row.stored.startswith("nf4")]
    biases = sum(4 * row.shape[0] for row in quantized)  # 146 layers, project_in and project_out without
    weights = sum(row.bytes for row in quantized) - biases + 4 * (1024 + 512)
    assert 7.5 < 4 * OPT_LINEARS / weights < 8
    assert round(before / footprint(rows), 1) == 4.9
