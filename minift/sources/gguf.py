"""A GGUF file, rewritten once as a normal Hugging Face folder.

GGUF is llama.cpp's format: one file that holds the hyper-parameters, the tokenizer, the chat template and the
weights, most of them quantized. Everything else in minift reads Hugging Face folders, so a GGUF file is translated
once, at the door, and no other file knows the format. Parsing and dequantizing are the `gguf` package's work; what is
left is to say the same things in the other dialect:

    GGUF                                    Hugging Face
    llama.embedding_length, ...             config.json
    tokenizer.ggml.tokens, merges, pre      tokenizer.json
    tokenizer.chat_template                 tokenizer_config.json
    blk.3.attn_q.weight (Q4_1, permuted)    model.layers.3.self_attn.q_proj.weight (bf16)

Two things are lost without an error message if one forgets them.

The rotary permutation. Both worlds rotate pairs of rows of a query or key head, but they pair them differently. Hugging
Face rotates row i with row i + head_dim/2; llama.cpp rotates neighbours. Its converter therefore shuffles the rows of
Llama's q_proj and k_proj, head by head, so that partners meet, and we shuffle them back. One head of width 8:

    Hugging Face   a0 a1 a2 a3 b0 b1 b2 b3      a_i and b_i are rotated together
    GGUF           a0 b0 a1 b1 a2 b2 a3 b3

The shapes agree either way: a model with the wrong order loads, runs and talks nonsense.

The pre-tokenizer. Byte-level BPE first cuts text into words, and merges never cross a cut. GGUF does not store the
rule, only a name for it in `tokenizer.ggml.pre`. `smollm` stands for "every digit alone, then GPT-2's words". GPT-2's
rule alone glues a blank to the word that follows it, and cuts runs of blanks accordingly, also before a number:

    text          words by `smollm`      words by GPT-2's rule     (G is a blank, N a line break)
    N N 1 .       NN  1  .               N  N  1  .
    x G G 1       x  GG  1               x  G  G1

so in numbered lists and indented numbers the model would meet tokens it was never trained on in that place. We know few
names and refuse the others.

Weights are stored in bf16. That is one more rounding, of at most 2^-9 of a value, where a 4-bit block has already moved
values by up to a thirtieth of the block's range.

Left out: architectures other than `llama`, SentencePiece vocabularies (`tokenizer.ggml.model = llama`), Llama 3's
rescaled rotary frequencies, models split over several files.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm

from minift.atomic import atomic_folder

__all__ = ["convert_gguf"]

_Value = TypeVar("_Value", int, float, str, bool, list)

_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # our prefix: GGUF's


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Writes the `llama` model in `gguf_path` to `folder` as Hugging Face would: configuration, tokenizer, weights.

    The folder holds config.json, generation_config.json, tokenizer.json, tokenizer_config.json and model.safetensors
    (bf16), and appears under its name only when all of them are complete; a folder that is there already is replaced.
    Beyond the mapped file this takes the memory of the bf16 model and of one tensor in fp32.

    Raises ValueError, and writes nothing, for a file that is damaged or no GGUF at all, that lacks a metadata key or a
    tensor, that holds a tensor we do not know, or whose architecture, rotary scaling or tokenizer is not supported.
    """
    reader = _open(gguf_path)
    try:
        config = _model_config(reader)
        tokenizer = _tokenizer(reader)
        with atomic_folder(folder) as temporary:
            _write_json(temporary / "config.json", config)
            ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            _write_json(temporary / "generation_config.json", ids)
            _write_json(temporary / "tokenizer_config.json", _tokenizer_config(reader, config))
            tokenizer.save(str(temporary / "tokenizer.json"))
            weights = _read_weights(reader, config, progress=f"Converting {gguf_path.name}")
            save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    except ValueError as error:
        raise ValueError(f"{gguf_path}: {error}") from error


def _open(gguf_path: Path) -> gguf.GGUFReader:
    """Maps the file and parses its header. Tensors stay on disk until they are touched."""
    try:
        reader = gguf.GGUFReader(gguf_path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # The reader does not check lengths; a short file surfaces as a failed index or reshape somewhere inside it.
        raise ValueError(f"{gguf_path} is not a GGUF file, or is truncated or damaged ({error})") from error
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise ValueError(f"{gguf_path} is a big-endian GGUF file; only little-endian ones are supported")
    return reader


def _metadata(reader: gguf.GGUFReader, key: str, kind: type[_Value], default: _Value | None = None) -> _Value:
    """The value of a metadata key; raises ValueError if it is of another kind, or absent without a default."""
    field = reader.get_field(key)
    if field is None:
        if default is None:
            raise ValueError(f"the metadata key {key} is missing")
        return default
    value = field.contents()
    if not isinstance(value, kind):
        raise ValueError(f"the metadata key {key} should be of type {kind.__name__}, but is {type(value).__name__}")
    return value


def _shortest_decimal(value: float) -> float:
    """What the author wrote: the shortest decimal that rounds to the same 32 bits. 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _token_id(reader: gguf.GGUFReader, name: str) -> int | None:
    """The id of the special token that GGUF calls `name`, or None where the file names none."""
    key = f"tokenizer.ggml.{name}_token_id"
    if reader.get_field(key) is None:
        return None
    token_id = _metadata(reader, key, int)
    if token_id >= len(_metadata(reader, "tokenizer.ggml.tokens", list)):
        raise ValueError(f"{key} is {token_id}, which is outside the vocabulary")
    return token_id


def _model_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The contents of config.json."""
    architecture = _metadata(reader, "general.architecture", str)
    if architecture != "llama":
        raise ValueError(f"architecture {architecture!r} is not supported; supported: 'llama'")
    if _metadata(reader, "split.count", int, default=1) > 1:
        raise ValueError("this is one part of a model split over several files: not supported; merge them first")
    tensor_names = {tensor.name for tensor in reader.tensors}
    scaling = _metadata(reader, "llama.rope.scaling.type", str, default="none")
    if scaling != "none" or "rope_freqs.weight" in tensor_names:
        raise ValueError("rescaled rotary frequencies (rope_freqs.weight or llama.rope.scaling) are not supported")

    hidden_size = _metadata(reader, "llama.embedding_length", int)
    heads = _metadata(reader, "llama.attention.head_count", int)
    head_dim = _metadata(reader, "llama.attention.key_length", int, default=hidden_size // heads)
    if _metadata(reader, "llama.rope.dimension_count", int, default=head_dim) != head_dim:
        raise ValueError(f"llama.rope.dimension_count differs from the head width {head_dim}: not supported")
    _metadata(reader, "tokenizer.ggml.eos_token_id", int)  # the one special token that generation cannot do without
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(_metadata(reader, "tokenizer.ggml.tokens", list)),
        "hidden_size": hidden_size,
        "intermediate_size": _metadata(reader, "llama.feed_forward_length", int),
        "num_hidden_layers": _metadata(reader, "llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": _metadata(reader, "llama.attention.head_count_kv", int, default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _shortest_decimal(_metadata(reader, "llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest_decimal(_metadata(reader, "llama.rope.freq_base", float, default=10000.0)),
        "max_position_embeddings": _metadata(reader, "llama.context_length", int),
        "attention_bias": "blk.0.attn_q.bias" in tensor_names,
        "mlp_bias": "blk.0.ffn_up.bias" in tensor_names,
        # The file holds no head of its own: the embedding table is used a second time.
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "bos_token_id": _token_id(reader, "bos"),
        "eos_token_id": _token_id(reader, "eos"),
        "pad_token_id": _token_id(reader, "padding"),
        "torch_dtype": "bfloat16",
    }


def _tensor_table(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For every tensor such a model has, by its GGUF name: the Hugging Face name, and the shape, which is the same."""
    width, mlp_width = config["hidden_size"], config["intermediate_size"]
    query_width = config["num_attention_heads"] * config["head_dim"]
    key_width = config["num_key_value_heads"] * config["head_dim"]
    table: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (config["vocab_size"], width)),
        "output_norm.weight": ("model.norm.weight", (width,)),
    }
    if not config["tie_word_embeddings"]:
        table["output.weight"] = ("lm_head.weight", (config["vocab_size"], width))
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"blk.{layer}", f"model.layers.{layer}"
        table[f"{ours}.attn_norm.weight"] = (f"{theirs}.input_layernorm.weight", (width,))
        table[f"{ours}.ffn_norm.weight"] = (f"{theirs}.post_attention_layernorm.weight", (width,))
        for name, path, rows, columns, has_bias in (
            ("attn_q", "self_attn.q_proj", query_width, width, config["attention_bias"]),
            ("attn_k", "self_attn.k_proj", key_width, width, config["attention_bias"]),
            ("attn_v", "self_attn.v_proj", key_width, width, config["attention_bias"]),
            ("attn_output", "self_attn.o_proj", width, query_width, config["attention_bias"]),
            ("ffn_gate", "mlp.gate_proj", mlp_width, width, config["mlp_bias"]),
            ("ffn_up", "mlp.up_proj", mlp_width, width, config["mlp_bias"]),
            ("ffn_down", "mlp.down_proj", width, mlp_width, config["mlp_bias"]),
        ):
            table[f"{ours}.{name}.weight"] = (f"{theirs}.{path}.weight", (rows, columns))
            if has_bias:
                table[f"{ours}.{name}.bias"] = (f"{theirs}.{path}.bias", (rows,))
    return table


def _read_weights(reader: gguf.GGUFReader, config: dict[str, Any], progress: str) -> dict[str, torch.Tensor]:
    """All weights in bf16 under their Hugging Face names, the rotary permutation undone."""
    table = _tensor_table(config)
    _check_tensors(reader, table)
    weights = {}
    for tensor in tqdm(reader.tensors, desc=progress, unit="tensor"):
        weight = _dequantize(tensor)
        if ".attn_q." in tensor.name:
            weight = _undo_rotary_permutation(weight, config["num_attention_heads"])
        elif ".attn_k." in tensor.name:
            weight = _undo_rotary_permutation(weight, config["num_key_value_heads"])
        name, _ = table[tensor.name]
        weights[name] = weight
    return weights


def _check_tensors(reader: gguf.GGUFReader, table: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raises ValueError unless the file holds exactly the tensors of the table, in these shapes."""
    # GGUF counts the fastest dimension first.
    shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
    for name, shape in shapes.items():
        if name not in table:
            raise ValueError(f"unknown tensor {name}")
        if shape != table[name][1]:
            raise ValueError(f"the tensor {name} has shape {shape}, but the metadata asks for {table[name][1]}")
    missing = [name for name in table if name not in shapes]
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, the first of them {missing[0]}")


def _dequantize(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """One tensor of the file in bf16: exact fp32 values first, then one rounding to nearest even."""
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(f"the tensor {tensor.name} is stored as {tensor.tensor_type.name}: not supported") from error
    # An F32 tensor comes back as a view of the mapped, read-only file, and torch wants memory it may write to.
    return torch.from_numpy(np.require(values, requirements="W")).to(torch.bfloat16)


def _undo_rotary_permutation(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Moves each head's rows from a0 b0 a1 b1 ... to a0 a1 ... b0 b1 ... (see the top of this file).

    weight: (heads * head_dim, in_features), or (heads * head_dim,) for a bias. The result is a contiguous copy.
    """
    interleaved = weight.reshape(heads, -1, 2, *weight.shape[1:])  # head, pair, partner a or b, the rest
    return interleaved.swapaxes(1, 2).reshape(weight.shape)


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """The rule for cutting text into words that `tokenizer.ggml.pre` names."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    known = {
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]),
        "gpt-2": words,
        # What old converters wrote when they did not know; llama.cpp then guesses, with a warning. GPT-2's rule is the
        # likeliest: it is what a byte-level tokenizer has unless its authors chose otherwise.
        "default": words,
    }
    if name not in known:
        supported = ", ".join(known)
        raise ValueError(f"the pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported; supported: {supported}")
    return known[name]


def _tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """The byte-level BPE tokenizer, with the file's control tokens as special tokens."""
    kind = _metadata(reader, "tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise ValueError(f"the tokenizer {kind!r} is not supported; supported: 'gpt2' (byte-level BPE)")
    tokens = _metadata(reader, "tokenizer.ggml.tokens", list)
    merges = [tuple(merge.split(" ")) for merge in _metadata(reader, "tokenizer.ggml.merges", list)]
    types = _metadata(reader, "tokenizer.ggml.token_type", list)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens repeats a token, or tokenizer.ggml.token_type has another length")
    try:
        # No unknown token: bytes that the vocabulary lacks are dropped, as transformers does with such files. SmolLM2's
        # lacks six control characters and the bytes that start some unassigned planes of Unicode.
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ValueError(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens ({error})") from error
    tokenizer.pre_tokenizer = _pre_tokenizer(_metadata(reader, "tokenizer.ggml.pre", str))
    tokenizer.decoder = decoders.ByteLevel()

    # Both kinds are matched whole in the text before BPE sees it; decoding can hide the special ones.
    control = (gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN)
    typed = list(zip(tokens, types, strict=True))
    special = [AddedToken(token, special=True, normalized=False) for token, kind in typed if kind in control]
    tokenizer.add_special_tokens(special)
    whole = [token for token, kind in typed if kind == gguf.TokenType.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in whole])

    first, last = (_token_id(reader, name) for name in ("bos", "eos"))
    template = ["$A"]
    if _metadata(reader, "tokenizer.ggml.add_bos_token", bool, default=False) and first is not None:
        template = [tokens[first], *template]
    if _metadata(reader, "tokenizer.ggml.add_eos_token", bool, default=False) and last is not None:
        template = [*template, tokens[last]]
    if len(template) > 1:
        ids = [(tokens[index], index) for index in (first, last) if index is not None]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def _tokenizer_config(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    tokens = _metadata(reader, "tokenizer.ggml.tokens", list)
    contents: dict[str, Any] = {
        # The class that uses tokenizer.json as it stands. GPT2TokenizerFast, the usual name for byte-level BPE, builds
        # its own pre-tokenizer in transformers 5 and so would lose the splitting of digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        # transformers 4 would add token_type_ids, which a Llama refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    for name, their_name in _SPECIAL_TOKENS.items():
        token_id = _token_id(reader, their_name)
        if token_id is not None:
            contents[f"{name}_token"] = tokens[token_id]
    if reader.get_field("tokenizer.chat_template") is not None:
        contents["chat_template"] = _metadata(reader, "tokenizer.chat_template", str)
    return contents


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
