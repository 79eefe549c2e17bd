"""A tiny random Llama is written as GGUF, converted, and read back by transformers.

Q8_0 quantizes along a row, and the rotary permutation moves whole rows, so the two commute: the expected weights are
the original rows, quantized and dequantized by the `gguf` package and rounded to bf16 once. All must agree bit for bit.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers

from minift.sources.gguf import convert_gguf

HEADS, KEY_HEADS, HEAD_DIM, WIDTH, MLP_WIDTH, LAYERS = 4, 2, 8, 32, 64, 2  # grouped heads: q and k permute differently
F32, F16, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0
BF16 = gguf.GGMLQuantizationType.BF16
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "t h", "th e", "Ġ the", "Ċ Ċ", "1 2"]
TOKENS = [
    *CONTROL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
    "<think>",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": MLP_WIDTH,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KEY_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL) - 1) + [4],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": TEMPLATE,
}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order, spelled out: in each head, row i comes to 2i and row i + head_dim/2 to 2i + 1."""
    half = HEAD_DIM // 2
    order = [head * HEAD_DIM + i + partner * half for head in range(heads) for i in range(half) for partner in (0, 1)]
    return rows[order]


def make_model(bias: bool = False, head: bool = False) -> dict[str, tuple[str, np.ndarray, gguf.GGMLQuantizationType]]:
    """By GGUF name: Hugging Face's name, random fp32 values in Hugging Face's row order, how the file stores it."""
    generator = np.random.default_rng(7)

    def random(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    model = {
        "token_embd.weight": ("model.embed_tokens.weight", random(len(TOKENS), WIDTH), F16),
        "output_norm.weight": ("model.norm.weight", random(WIDTH), F32),
    }
    if head:
        model["output.weight"] = ("lm_head.weight", random(len(TOKENS), WIDTH), BF16)
    for layer in range(LAYERS):
        block, path = f"blk.{layer}.", f"model.layers.{layer}."
        model |= {
            f"{block}attn_norm.weight": (f"{path}input_layernorm.weight", random(WIDTH), F32),
            f"{block}ffn_norm.weight": (f"{path}post_attention_layernorm.weight", random(WIDTH), F32),
            f"{block}attn_q.weight": (f"{path}self_attn.q_proj.weight", random(HEADS * HEAD_DIM, WIDTH), Q8_0),
            f"{block}attn_k.weight": (f"{path}self_attn.k_proj.weight", random(KEY_HEADS * HEAD_DIM, WIDTH), Q8_0),
            f"{block}attn_v.weight": (f"{path}self_attn.v_proj.weight", random(KEY_HEADS * HEAD_DIM, WIDTH), F16),
            f"{block}attn_output.weight": (f"{path}self_attn.o_proj.weight", random(WIDTH, HEADS * HEAD_DIM), F32),
            f"{block}ffn_gate.weight": (f"{path}mlp.gate_proj.weight", random(MLP_WIDTH, WIDTH), Q8_0),
            f"{block}ffn_up.weight": (f"{path}mlp.up_proj.weight", random(MLP_WIDTH, WIDTH), Q8_0),
            f"{block}ffn_down.weight": (f"{path}mlp.down_proj.weight", random(WIDTH, MLP_WIDTH), Q8_0),
        }
        if bias:
            model |= {
                f"{block}attn_q.bias": (f"{path}self_attn.q_proj.bias", random(HEADS * HEAD_DIM), F32),
                f"{block}attn_k.bias": (f"{path}self_attn.k_proj.bias", random(KEY_HEADS * HEAD_DIM), F32),
                f"{block}attn_v.bias": (f"{path}self_attn.v_proj.bias", random(KEY_HEADS * HEAD_DIM), F32),
                f"{block}attn_output.bias": (f"{path}self_attn.o_proj.bias", random(WIDTH), F32),
            }
    return model


def write_gguf(
    path: Path, model: dict | None = None, metadata: dict | None = None, endian=gguf.GGUFEndian.LITTLE
) -> Path:
    """Writes a model as llama.cpp's converter would. `metadata` replaces entries of METADATA; None leaves one out."""
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.kv_data[0].clear()  # the writer adds the architecture by itself
    for key, value in (METADATA | (metadata or {})).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    for name, (_, values, kind) in (make_model() if model is None else model).items():
        if ".attn_q." in name or ".attn_k." in name:
            values = interleave(values, HEADS if ".attn_q." in name else KEY_HEADS)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def expected_weights(model: dict) -> dict[str, torch.Tensor]:
    stored = {
        name: gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind) for name, values, kind in model.values()
    }
    return {name: torch.from_numpy(np.array(values)).to(torch.bfloat16) for name, values in stored.items()}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == theirs[name].dtype == torch.bfloat16
        assert torch.equal(weight.view(torch.int16), theirs[name].view(torch.int16)), name


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds tiny.gguf and, in `model`, what we made of it."""
    folder = tmp_path_factory.mktemp("gguf")
    convert_gguf(write_gguf(folder / "tiny.gguf"), folder / "model")
    return folder


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_weights_are_those_written(tmp_path: Path, bias: bool, head: bool):
    model = make_model(bias=bias, head=head)
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", model), tmp_path / "model")
    assert_same_bits(load_file(tmp_path / "model/model.safetensors"), expected_weights(model))
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert (config["attention_bias"], config["tie_word_embeddings"]) == (bias, not head)


def test_transformers_reads_the_same_weights_from_folder_and_file(converted: Path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # transformers' GGUF reader wants it
    ours = transformers.AutoModelForCausalLM.from_pretrained(converted / "model", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(converted, gguf_file="tiny.gguf", dtype=torch.float32)
    rounded = {name: weight.to(torch.bfloat16) for name, weight in theirs.state_dict().items()}
    assert_same_bits({name: weight.to(torch.bfloat16) for name, weight in ours.state_dict().items()}, rounded)

    # The configurations mean the same model: with the same weights, the logits are the same bits.
    theirs.load_state_dict({name: weight.float() for name, weight in rounded.items()})
    input_ids_bs = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(ours(input_ids_bs).logits, theirs(input_ids_bs).logits)
    for name in (
        "rope_parameters",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "head_dim",
    ):
        assert getattr(ours.config, name) == getattr(theirs.config, name), name
    assert ours.config.rms_norm_eps == 1e-5  # theirs: 9.999999747378752e-06
    assert ours.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    "text", ["the  the\n\nthe", "Grüße, 你好 🦙", "<|im_start|>user\nthe<|im_end|>", "a <think> b", "it's we've  ", ""]
)
def test_tokenizer_equals_transformers(converted: Path, text: str):
    transformers = pytest.importorskip("transformers")
    ours = transformers.AutoTokenizer.from_pretrained(converted / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(converted, gguf_file="tiny.gguf")
    encoded = ours(text)
    assert encoded["input_ids"] == theirs(text)["input_ids"]
    assert set(encoded) == {"input_ids", "attention_mask"}  # no token_type_ids, which Llama does not take
    assert ours.decode(encoded["input_ids"]) == text
    assert (ours.bos_token, ours.eos_token, ours.pad_token, ours.unk_token) == (*CONTROL[1:], CONTROL[2], CONTROL[0])
    assert (len(ours), ours.model_max_length, ours.chat_template) == (len(TOKENS), 128, TEMPLATE)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["a", "ĠĠ", "1", "2", "ĊĊ", "3", "."]),
        ("gpt-2", ["a", "Ġ", "Ġ", "12", "Ċ", "Ċ", "3", "."]),
        ("default", ["a", "Ġ", "Ġ", "12", "Ċ", "Ċ", "3", "."]),
    ],
)
def test_pre_tokenizer_decides_what_happens_before_a_digit(tmp_path: Path, pre: str, expected: list[str]):
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.pre": pre}), tmp_path / "model")
    text = "a  12\n\n3."
    tokenizer = Tokenizer.from_file(str(tmp_path / "model/tokenizer.json"))
    assert tokenizer.encode(text).tokens == expected
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_transformers_splits_digits_too(converted: Path):
    # It rebuilds the pre-tokenizer for some values of tokenizer_class, and then forgets about digits.
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted / "model")
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_decoding_can_hide_control_tokens_but_not_others(converted: Path):
    tokenizer = Tokenizer.from_file(str(converted / "model/tokenizer.json"))
    ids = tokenizer.encode("<|im_start|>the<think><|im_end|>").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<think>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>the<think><|im_end|>"


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_bos_and_eos_are_added_where_the_file_says_so(tmp_path: Path, bos: bool, eos: bool):
    flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", metadata=flags), tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model/tokenizer.json"))
    assert tokenizer.encode("the").tokens == [CONTROL[1]] * bos + ["the"] + [CONTROL[2]] * eos


def test_optional_metadata_may_be_absent(tmp_path: Path):
    absent = ["llama.rope.freq_base", "llama.rope.dimension_count", "llama.vocab_size", "tokenizer.chat_template"]
    absent += [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "unknown", "padding")]
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", metadata=dict.fromkeys(absent)), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert (config["rope_theta"], config["head_dim"], config["pad_token_id"]) == (10000.0, HEAD_DIM, None)
    tokenizer_config = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    assert not {"chat_template", "bos_token", "pad_token"} & tokenizer_config.keys()


def test_progress_goes_to_stderr_and_files_share_their_permissions(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    convert_gguf(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "model")
    output = capsys.readouterr()
    assert "Converting tiny.gguf" in output.err
    assert output.out == ""
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1


def refused(path: Path) -> str:
    """Converts, expects a refusal that names the file and leaves nothing behind, and returns its message."""
    with pytest.raises(ValueError, match=path.name) as error:
        convert_gguf(path, path.parent / "model")
    assert [left.name for left in path.parent.iterdir()] == [path.name]
    return str(error.value)


@pytest.mark.parametrize("contents", [b"", b"GG", b"This is a text file, and not a short one either.\n" * 9])
def test_refuses_what_is_no_gguf_file(tmp_path: Path, contents: bytes):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(contents)
    assert "is not a GGUF file" in refused(path)


@pytest.mark.parametrize("part", [0.0005, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_refuses_a_truncated_file(tmp_path: Path, part: float):
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[: int(part * len(whole))])
    assert "truncated" in refused(tmp_path / "tiny.gguf")


def test_refuses_a_big_endian_file(tmp_path: Path):
    model = {name: entry for name, entry in make_model().items() if entry[2] == F32}  # the writer swaps only floats
    assert "big-endian" in refused(write_gguf(tmp_path / "tiny.gguf", model, endian=gguf.GGUFEndian.BIG))


REQUIRED = [
    "general.architecture",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.eos_token_id",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_refuses_a_missing_key_by_name(tmp_path: Path, key: str):
    assert f"{key} is missing" in refused(write_gguf(tmp_path / "tiny.gguf", metadata={key: None}))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2' is not supported; supported: 'llama'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer 'llama' is not supported; supported: 'gpt2'"),
        (
            {"tokenizer.ggml.pre": "llama-bpe"},
            "'llama-bpe' (tokenizer.ggml.pre) is not supported; supported: smollm, gpt-2",
        ),
        ({"llama.rope.scaling.type": "linear"}, "rescaled rotary frequencies"),
        ({"llama.rope.dimension_count": HEAD_DIM // 2}, "llama.rope.dimension_count"),
        ({"llama.attention.head_count_kv": [2, 2]}, "llama.attention.head_count_kv should be of type int, but is list"),
        ({"tokenizer.ggml.eos_token_id": len(TOKENS)}, "tokenizer.ggml.eos_token_id"),
        ({"tokenizer.ggml.merges": ["t h", "Ġ zebra"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "the"]}, "repeats a token"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"split.count": 2}, "split over several files"),
        (
            {"llama.feed_forward_length": 96},
            "blk.0.ffn_gate.weight has shape (64, 32), but the metadata asks for (96, 32)",
        ),
        ({"llama.block_count": 3}, "9 tensors are missing, the first of them blk.2.attn_norm.weight"),
    ],
)
def test_refuses_metadata_it_cannot_honour(tmp_path: Path, metadata: dict, message: str):
    assert message in refused(write_gguf(tmp_path / "tiny.gguf", metadata=metadata))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("rope_freqs.weight", np.ones(HEAD_DIM // 2, np.float32), "rescaled rotary frequencies"),
        ("blk.0.ffn_gate_inp.weight", np.ones((4, WIDTH), np.float32), "unknown tensor blk.0.ffn_gate_inp.weight"),
        ("blk.0.attn_q.bias", np.ones(HEADS * HEAD_DIM, np.float32), "missing, the first of them blk.0.attn_k.bias"),
    ],
)
def test_refuses_tensors_it_does_not_know(tmp_path: Path, name: str, values: np.ndarray, message: str):
    assert message in refused(write_gguf(tmp_path / "tiny.gguf", make_model() | {name: ("", values, F32)}))


def test_a_missing_file_is_reported_as_such(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "model")


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = []

    def interrupted(weights: dict, path: Path, **_: object) -> None:
        path.write_bytes(b"half a file")
        written.extend(left.name for left in path.parent.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("minift.sources.gguf.save_file", interrupted)
    path = write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(path, tmp_path / "model")
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(written)  # it was well under way
    assert [left.name for left in tmp_path.iterdir()] == ["tiny.gguf"]
