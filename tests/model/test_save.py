"""Quantized folders go both ways: what transformers + bitsandbytes saved loads here with equal bytes, and the reverse.

Logits of 4-bit models are compared with the peer in training mode: in evaluation mode bitsandbytes repacks the weights
on a CPU and rounds the scales. Those of int8 models are compared in evaluation mode, where it multiplies integers (its
CPU training mode decodes), and with its constant for 1/127^2 instead of the right one (test_int8.py): int8 amplifies a
last bit that moves an activation across the middle between two codes. Of SmolLM2 in bf16, whose logits reach 27, the
1.8e-5 in that constant moves some by 3.75; with the same constant they are equal to the bit.

Both sides do the same arithmetic in the same order up to the sums inside a matrix product, so in fp32 logits of about 3
may differ by some 1e-6, and in bf16, which keeps 8 bits, by one rounding of an activation here and there.
"""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import minift
from minift.model.load import build_model
from minift.quant import Linear4bit, Linear8bit, QuantConfig, QuantizedLinear, int8

BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "nf4 in bf16 computing in bf16": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
    "int8 without outliers": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "int8, threshold 1, one block skipped": {
        "load_in_8bit": True, "llm_int8_threshold": 1.0, "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"],
    },
}  # fmt: skip
OURS = {
    "nf4": QuantConfig(double_quant=False),
    "nf4 nested": QuantConfig(),
    "nf4 nested, blocks of 32": QuantConfig(blocksize=32),  # larger ones than a row are decoded wrongly there
    "fp4 nested": QuantConfig("fp4"),
    "nf4 as fp32": QuantConfig(quant_storage=torch.float32, double_quant=False),
    "nf4, some skipped": QuantConfig(skip=("lm_head", "model.layers.0", "down_proj")),
    "int8": QuantConfig("int8"),
    "int8, threshold 0.5": QuantConfig("int8", threshold=0.5),
}


def load_theirs(folder: Path, **options: Any) -> Any:
    quantization = {"quantization_config": transformers.BitsAndBytesConfig(**options)} if options else {}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "cpu"}, dtype="auto", **quantization
    )


def their_logits(model: Any, ids: Tensor) -> Tensor:
    """4-bit models in training mode, int8 in evaluation mode (see above)."""
    model.train(not getattr(model, "is_loaded_in_8bit", False))
    with torch.no_grad():
        return model(ids).logits


def assert_same_logits(ours: minift.CausalLM, theirs: Any) -> None:
    ids = torch.randint(0, ours.config.vocab_size, (2, 20))
    with torch.no_grad(), mock.patch.object(int8, "PRODUCT_UNIT", 6.200124e-05):
        ours_logits, theirs_logits = ours(ids), their_logits(theirs, ids)
    bf16 = any(m.compute_dtype == torch.bfloat16 for m in ours.modules() if isinstance(m, QuantizedLinear))
    bound = 0.05 if bf16 else 1e-5
    assert theirs_logits.abs().max() > 1
    assert (ours_logits - theirs_logits).abs().max() <= bound
    assert (ours_logits - theirs_logits).abs().mean() <= bound / 10


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits (torch.equal would take -0.0 for 0.0 and never finds NaN equal)."""
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and a.contiguous().numpy(force=True).tobytes() == b.contiguous().numpy(force=True).tobytes()


def as_integers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """numpy knows no bf16."""
    return {name: t.view(torch.int16) if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}


def assert_same_file(ours: Path, theirs: Path) -> None:
    ours_tensors, theirs_tensors = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert ours_tensors.keys() == theirs_tensors.keys()
    for name, tensor in as_integers(ours_tensors).items():
        their = as_integers(theirs_tensors)[name]
        if name.endswith("quant_map"):
            assert torch.equal(tensor, their), name  # the entry 0 may be signed: FP4's code 8
        else:
            assert same_bytes(tensor, their), name


@pytest.fixture(scope="module", params=BITSANDBYTES)
def theirs_folder(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, quantized and saved by transformers + bitsandbytes."""
    folder = tmp_path_factory.mktemp("theirs")
    load_theirs(tiny, **BITSANDBYTES[request.param]).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny / name, folder / name)
    return folder


def test_their_folder_loads_here(theirs_folder: Path, tmp_path: Path):
    """Equal bytes (shown by writing them again), equal logits."""
    ours = minift.load_model(theirs_folder)
    assert any(isinstance(module, QuantizedLinear) for module in ours.modules())
    assert_same_logits(ours, load_theirs(theirs_folder))
    minift.save_model(ours, tmp_path / "again")
    assert_same_file(tmp_path / "again", theirs_folder)
    ours_json, theirs_json = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", theirs_folder)
    )
    ours_quant, theirs_quant = ours_json.pop("quantization_config"), theirs_json.pop("quantization_config")
    assert ours_json == theirs_json
    # What they do not say, they leave to their defaults; the names of skipped layers are whole paths here. (In int8
    # bitsandbytes has no compute dtype, and the 4-bit settings mean nothing.)
    silent = {"_load_in_4bit", "_load_in_8bit", "llm_int8_skip_modules"} | (
        {"bnb_4bit_compute_dtype"} if theirs_quant["load_in_8bit"] else set()
    )
    assert {k: v for k, v in theirs_quant.items() if k not in silent} == {
        k: v for k, v in ours_quant.items() if k not in silent
    }


@pytest.mark.parametrize("config", OURS)
def test_our_folder_loads_there(config: str, tiny: Path, tmp_path: Path):
    """The same bytes in memory there as here, and the same logits."""
    ours = minift.load_model(tiny, OURS[config])
    assert minift.save_model(ours, tmp_path / "ours") == tmp_path / "ours"
    theirs = load_theirs(tmp_path / "ours")
    quantized = {path: m for path, m in ours.named_modules() if isinstance(m, QuantizedLinear)}
    assert {path for path, m in theirs.named_modules() if "bit" in type(m).__name__} == set(quantized)
    for path, layer in quantized.items():
        weight = theirs.get_submodule(path).weight
        assert same_bytes(*as_integers({"a": weight.data, "b": layer.weight}).values()), path
        if isinstance(layer, Linear4bit):
            state = weight.quant_state
            assert (state.blocksize, state.quant_type) == (layer.config.blocksize, layer.config.quant_type)
            assert torch.equal(state.absmax, layer.absmax)
            if layer.nested_absmax is not None and layer.nested_offset is not None:
                assert torch.equal(state.state2.absmax, layer.nested_absmax)
                assert torch.equal(state.offset, layer.nested_offset)
        elif isinstance(layer, Linear8bit):
            assert torch.equal(weight.SCB, layer.absmax)
    assert_same_logits(ours, theirs)
    again = minift.load_model(tmp_path / "ours")
    ids = torch.randint(0, ours.config.vocab_size, (2, 20))
    assert torch.equal(again(ids), ours(ids))


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_an_odd_model_survives(tiny_odd: Path, tmp_path: Path, quantize: str | None):
    """Odd sizes and a head of its own; plain checkpoints are written, too."""
    ours = minift.load_model(tiny_odd, quantize, dtype=torch.bfloat16)
    minift.save_model(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"
    again = minift.load_model(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    ours_state, again_state = as_integers(ours.state_dict()), as_integers(again.state_dict())
    assert ours_state.keys() == again_state.keys()
    assert all(same_bytes(tensor, again_state[name]) for name, tensor in ours_state.items())
    if quantize is None:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert theirs.dtype == torch.bfloat16


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("mistral", {}),
    ],
)
def test_biases_and_head_norms_go_both_ways(tmp_path: Path, family: str, settings: dict[str, Any], quantize: str):
    """They are not quantized, and not lost."""
    config = transformers.AutoConfig.for_model(
        family, vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, **settings,
    )  # fmt: skip
    plain: Any = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (1.0 if name.endswith("bias") else 0.4))
    plain.save_pretrained(tmp_path / "plain")
    ours = minift.load_model(tmp_path / "plain", QuantConfig(quantize, double_quant=False))
    minift.save_model(ours, tmp_path / "ours")
    assert_same_logits(ours, load_theirs(tmp_path / "ours"))
    options = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}[quantize]
    theirs = load_theirs(tmp_path / "plain", **options)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_logits(minift.load_model(tmp_path / "theirs"), theirs)
    assert_same_file(tmp_path / "ours", tmp_path / "theirs")


def test_the_folder_is_complete(tiny: Path, tmp_path: Path):
    """Tokenizer and generation settings come along, and nothing else lies in the folder."""
    minift.save_model(minift.load_model(tiny, "nf4"), tmp_path / "ours")
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert names <= {path.name for path in tiny.iterdir()}
    rows = minift.load_tokenizer(tmp_path / "ours")
    assert rows.encode("Hello") == minift.load_tokenizer(tiny).encode("Hello")


def test_a_quantized_folder_can_be_trained_and_asked(tiny: Path, tmp_path: Path):
    """load, add LoRA, one gradient: as with weights that were quantized while loading, to the bit."""
    minift.save_model(minift.load_model(tiny, "nf4"), tmp_path / "ours")
    gradients = []
    for folder, quantize in ((tiny, "nf4"), (tmp_path / "ours", None), (tmp_path / "ours", "nf4")):
        model = minift.load_model(folder, quantize)
        torch.manual_seed(0)
        minift.add_lora(model)
        ids = torch.arange(20).view(2, 10)
        model(ids).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert gradients[0] and all(g is not None for g in gradients[0])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_a_given_dtype_goes_for_the_arithmetic_too(tiny: Path, tmp_path: Path):
    """The folder says bf16; whoever asks for fp32 gets fp32 throughout, also after decoding or merging."""
    folder = minift.save_model(minift.load_model(tiny, "nf4", torch.bfloat16), tmp_path / "ours")
    stored = minift.load_model(folder)
    assert {m.compute_dtype for m in stored.modules() if isinstance(m, QuantizedLinear)} == {torch.bfloat16}
    given = minift.load_model(folder, dtype=torch.float32)
    assert {m.compute_dtype for m in given.modules() if isinstance(m, QuantizedLinear)} == {torch.float32}
    ids = torch.arange(10)[None]
    before = given(ids)
    minift.add_lora(given)
    minift.merge_lora(given)
    assert torch.equal(given(ids), before)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_merging_into_a_model_that_computes_in_another_dtype(tiny: Path, compute: torch.dtype):
    model = minift.load_model(tiny, QuantConfig(compute_dtype=compute), torch.bfloat16)
    minift.add_lora(model)
    minift.merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.arange(10)[None]).isfinite().all()


def test_the_size_is_known_without_loading(tmp_path: Path, tiny: Path):
    """Block size and format of a quantized folder are read from its files."""
    for config in (QuantConfig(blocksize=256), QuantConfig("int8"), QuantConfig(double_quant=False)):
        minift.save_model(minift.load_model(tiny, config), tmp_path / "ours")
        sizes = [
            {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
            for model in (build_model(tmp_path / "ours", None, None), minift.load_model(tmp_path / "ours"))
        ]
        assert sizes[0] == sizes[1]


# --- what is refused --------------------------------------------------------------------------------------------------

LAYER = "model.layers.1.self_attn.q_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture
def nested(tiny: Path, tmp_path: Path) -> Path:
    return minift.save_model(minift.load_model(tiny, "nf4"), tmp_path / "nested")


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as error:
        minift.load_model(folder, **options)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def record(**changes: object) -> Tensor:
    content = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64], "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": 0.25,
    } | changes  # fmt: skip
    text = json.dumps({key: value for key, value in content.items() if value != "gone"}).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@pytest.mark.parametrize(
    "key", ["weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"]
)
def test_a_missing_tensor_is_named(nested: Path, key: str):
    edit(nested, lambda tensors: tensors.pop(f"{LAYER}.{key}"))
    assert f"{LAYER}.{key}" in refusal(nested)


def test_a_missing_state_is_named(nested: Path):
    edit(nested, lambda tensors: tensors.pop(STATE))
    assert f"{LAYER} needs one tensor weight.quant_state.bitsandbytes__nf4" in refusal(nested)


@pytest.mark.parametrize("key", ["weight.extra", "SCB", "weight.nested_code"])
def test_a_surplus_tensor_is_named(nested: Path, key: str):
    edit(nested, lambda tensors: tensors.update({f"{LAYER}.{key}": torch.zeros(3)}))
    assert f"{LAYER}.{key} is in the checkpoint" in refusal(nested)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blocksize": 48}, "blocksize 48"),
        ({"blocksize": 128}, "absmax holds"),
        ({"blocksize": "gone"}, "blocksize is None"),
        ({"quant_type": "int4"}, "'int4'"),
        ({"quant_type": "fp4"}, "says 'fp4' inside"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"shape": [64, 32]}, "shape (64, 32)"),
        ({"shape": "gone"}, "shape is None"),
        ({"nested_blocksize": 512}, "nested_blocksize is 512"),
        ({"nested_offset": "gone", "nested_blocksize": "gone", "nested_dtype": "gone"}, "nested_"),
    ],
)
def test_an_odd_record_is_named(nested: Path, changes: dict[str, object], words: str):
    edit(nested, lambda tensors: tensors.update({STATE: record(**changes)}))
    message = refusal(nested)
    assert LAYER in message and words in message


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_broken_record_is_named(nested: Path, text: bytes):
    data = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)[: len(text)]
    edit(nested, lambda tensors: tensors.update({STATE: data.clone()}))
    assert STATE in refusal(nested)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("weight", lambda t: t[:-1]),
        ("weight.absmax", lambda t: t.float()),
        ("weight.absmax", lambda t: t[:-1]),
        ("weight.nested_absmax", lambda t: torch.cat([t, t])),
        ("weight.quant_map", lambda t: t * 1.001),
        ("weight.nested_quant_map", lambda t: t.flip(0)),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(nested: Path, key: str, change: Any):
    name = f"{LAYER}.{key}"
    edit(nested, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))
    message = refusal(nested)
    assert LAYER in message and key.rpartition(".")[2] in message


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("SCB", None),
        ("SCB", torch.ones(63)),
        ("SCB", torch.ones(64, dtype=torch.float16)),
        ("weight", torch.ones(64, 64)),
        ("weight", torch.ones(64, 32, dtype=torch.int8)),
        ("weight_format", torch.tensor(1, dtype=torch.uint8)),
    ],
)
def test_odd_int8_tensors_are_named(tiny: Path, tmp_path: Path, key: str, tensor: Tensor | None):
    folder = minift.save_model(minift.load_model(tiny, "int8"), tmp_path / "int8")
    name = f"{LAYER}.{key}"
    edit(folder, lambda tensors: tensors.pop(name) if tensor is None else tensors.update({name: tensor}))
    assert name in refusal(folder)


def test_an_int8_file_without_a_layout_is_read(tiny: Path, tmp_path: Path):
    """Older files have no weight_format; row-major is the only one there ever was in int8 bytes."""
    folder = minift.save_model(minift.load_model(tiny, "int8"), tmp_path / "int8")
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("weight_format")])
    assert isinstance(minift.load_model(folder).get_submodule(LAYER), Linear8bit)


def test_another_format_than_the_files_is_refused(nested: Path):
    for quantize in ("int8", "fp4", QuantConfig("fp4")):
        message = refusal(nested, quantize=quantize)
        assert str(nested) in message and "quantized already, in nf4" in message


def test_quantized_tensors_without_a_config_are_refused(nested: Path):
    raw = json.loads((nested / "config.json").read_text())
    del raw["quantization_config"]
    (nested / "config.json").write_text(json.dumps(raw))
    assert "config.json" in refusal(nested)


def test_a_config_without_quantized_tensors_is_refused(tiny: Path, nested: Path):
    shutil.copyfile(tiny / "model.safetensors", nested / "model.safetensors")
    message = refusal(nested)
    assert "quantization state" in message and "config.json" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"load_in_8bit": True}, "exactly one"),
        ({"bnb_4bit_quant_type": "int4"}, "'int4'"),
        ({"bnb_4bit_compute_dtype": "float8"}, "'float8'"),
        ({"bnb_4bit_quant_storage": "complex64"}, "'complex64'"),
        ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
        ({"llm_int8_threshold": -1}, "threshold"),
    ],
)
def test_odd_settings_are_named(nested: Path, changes: dict[str, object], words: str):
    raw = json.loads((nested / "config.json").read_text())
    raw["quantization_config"] |= changes
    (nested / "config.json").write_text(json.dumps(raw))
    message = refusal(nested)
    assert str(nested / "config.json") in message and words in message


def test_adapters_are_not_written_into_a_checkpoint(tiny: Path, tmp_path: Path):
    model = minift.load_model(tiny, "nf4")
    minift.add_lora(model)
    with pytest.raises(ValueError, match="merge the adapters first") as error:
        minift.save_model(model, tmp_path / "ours")
    assert "lora_A" in str(error.value) or "base" in str(error.value)
    assert not list(tmp_path.iterdir())
    minift.merge_lora(model)
    minift.save_model(model, tmp_path / "ours")
    again = minift.load_model(tmp_path / "ours")
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids), model(ids))


def test_two_formats_do_not_fit_one_config(tiny: Path, tmp_path: Path):
    model = minift.load_model(tiny, "nf4")
    linear = minift.load_model(tiny).get_submodule(LAYER)
    assert isinstance(linear, torch.nn.Linear)
    model.set_submodule(LAYER, Linear8bit.from_linear(linear))
    with pytest.raises(ValueError, match="int8 and nf4"):
        minift.save_model(model, tmp_path / "ours")
    assert not list(tmp_path.iterdir())
