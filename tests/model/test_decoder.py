"""Our decoder against transformers, every family, same kernel against same kernel, on the CPU.

Tiny random checkpoints for every shape and setting that a config can ask for: logits, and the gradient of every
parameter; padded, packed and quantized. The real SmolLM2-135M-Instruct: logits in fp32 and bf16, and the tokens that
greedy decoding picks.

Tolerances: see tests/checkpoints.py.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from checkpoints import (
    FAMILY_CASES,
    FAMILY_NAMES,
    assert_close,
    assert_gradients_close,
    checkpoint,
    gradients,
    in_fp64,
    load_theirs,
    random_ids,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import minift
from minift.model.attention import SharedPrefix
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.generate import generate_tokens
from minift.quant import Linear4bit
from minift.study.live import LiveBytes

# With head_dim 16 and theta 10000 the wavelengths are 6, 20, 63 (left alone), 199 (on the ramp), 628, ... (slowed).
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
CASES = {
    "GQA 4 on 2, tied": {},
    "MQA 8 on 1": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "GQA 6 on 3, width 60": {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3},
    "MHA, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "odd sizes": {
        "hidden_size": 65,
        "intermediate_size": 131,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 14,
        "vocab_size": 97,
        "tie_word_embeddings": False,
    },
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "both biases, untied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "heads wider than the model": {"head_dim": 32},
    "large eps, theta 500000": {"rms_norm_eps": 0.05, "rope_theta": 500000.0},
    "one layer": {"num_hidden_layers": 1},
    "rope linear": {"rope_parameters": {"rope_theta": 10000.0} | LINEAR},
    "rope llama3": {"rope_parameters": {"rope_theta": 10000.0} | LLAMA3},
}
THEIRS = ["eager", "sdpa"]
ATTENTION = [*THEIRS, "flash"]


ROUNDINGS = {"eager": 4, "sdpa": 4, "flash": 8}


def both(folder: Path, attention: str) -> tuple[CausalLM, nn.Module]:
    """Ours with one of our kernels, theirs with the same; with eager steps where they have it not (all of Gemma 2)."""
    config = ModelConfig.from_folder(folder)
    same = attention in THEIRS and config.model_type != "gemma2"
    theirs = load_theirs(folder, attention if same else "eager")
    if attention == "sdpa" and config.attention_softcap:
        attention = "eager"
    return minift.load_model(folder, attention=attention), theirs


# --- shapes and settings ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family that differs where positions and neighbours matter."""
    torch.manual_seed(0)
    return {name: checkpoint(tmp_path_factory.mktemp("family"), **case) for name, case in FAMILY_NAMES.items()}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("case", CASES | FAMILY_CASES)
def test_logits_and_gradients_equal_transformers(tmp_path: Path, case: str, attention: str):
    folder = checkpoint(tmp_path, **(CASES | FAMILY_CASES)[case])
    ours, theirs = both(folder, attention)
    ids = random_ids(ours.config, 3, 53)
    assert_close(lambda model: model(ids).logits, ours(ids).detach(), theirs, ROUNDINGS[attention])

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    assert_gradients_close(
        lambda model: loss(model(ids).logits), gradients(ours, loss(ours(ids))), theirs, ROUNDINGS[attention]
    )


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
def test_shared_checkpoints(request: pytest.FixtureRequest, name: str, attention: str):
    folder = request.getfixturevalue(name)
    ours, theirs = both(folder, attention)
    for shape in [(1, 1), (1, 2), (2, 40)]:
        ids = random_ids(ours.config, *shape)
        assert_close(lambda model: model(ids).logits, ours(ids).detach(), theirs, ROUNDINGS[attention])  # noqa: B023


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3], ids=["default", "linear", "llama3"])
def test_rope_in_the_old_spelling(tmp_path: Path, scaling: dict | None, type_key: str):
    """Checkpoints from before transformers 5 have rope_theta and rope_scaling instead of rope_parameters."""
    new = checkpoint(tmp_path / "new", rope_parameters={"rope_theta": 4000.0} | (scaling or {"rope_type": "default"}))
    raw = json.loads((new / "config.json").read_text())
    parameters = raw.pop("rope_parameters")
    assert "rope_theta" not in raw
    raw["rope_theta"] = parameters.pop("rope_theta")
    parameters[type_key] = parameters.pop("rope_type")
    raw["rope_scaling"] = parameters if scaling else None
    old = new.rename(tmp_path / "old")
    (old / "config.json").write_text(json.dumps(raw))

    ours, theirs = minift.load_model(old, attention="eager"), load_theirs(old, "eager")
    ids = random_ids(ours.config, 2, 200)
    assert_close(lambda model: model(ids).logits, ours(ids).detach(), theirs)


@pytest.mark.parametrize("case", ["rope linear", "rope llama3"])
def test_scaled_positions_matter(tmp_path: Path, case: str):
    """The cases above would pass with any rope type if the input were too short for it to show."""
    folder = checkpoint(tmp_path, **CASES[case])
    ours = minift.load_model(folder)
    ids = random_ids(ours.config, 3, 53)
    scaled = ours(ids)
    ours.config.rope["rope_type"] = "default"
    assert (ours(ids) - scaled).abs().max() > 0.01


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("lengths", [(13, 3), (5, 5)], ids=["padded", "not padded"])
def test_greedy_text_of_every_family(folders: dict[str, Path], family: str, attention: str, lengths: tuple[int, int]):
    """Past the window, with the key/value cache, rows side by side: as transformers decodes each row alone."""
    ours, theirs = both(folders[family], attention)
    generate: Any = theirs.generate
    prompts = [random_ids(ours.config, length).tolist() for length in lengths]
    columns = torch.stack(list(generate_tokens(ours, prompts, 12, stop_ids=())), dim=1)
    for prompt, row in zip(prompts, columns.tolist(), strict=True):
        expected = generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert row == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradient_checkpointing_changes_no_bit(folders: dict[str, Path], family: str, attention: str):
    ours, _ = both(folders[family], attention)
    ids = random_ids(ours.config, 2, 30)
    kept = gradients(ours, ours(ids).square().mean())
    for how in (True, "selective"):
        recomputed = gradients(ours, ours.logits(ours.hidden(ids, gradient_checkpointing=how)).square().mean())
        for name, value in kept.items():
            assert torch.equal(value, recomputed[name]), name


class Counts(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func] += 1
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_computes_all_but_products_again(folders: dict[str, Path]):
    """Memory between the two others, and not one matrix product more than without."""
    ours, ids = minift.load_model(folders["llama"], attention="sdpa"), torch.randint(3, 100, (4, 128))
    products, others, peak = {}, {}, {}
    for how in (False, "selective", True):
        with LiveBytes() as live, Counts() as counts:
            ours.hidden(ids, gradient_checkpointing=how).square().mean().backward()
        ours.zero_grad(set_to_none=True)
        products[how] = counts.of[torch.ops.aten.mm.default]
        others[how], peak[how] = counts.of[torch.ops.aten.rsqrt.default], live.peak
    assert products[False] == products["selective"] < products[True]
    assert others[False] < others["selective"] == others[True]
    assert peak[False] > peak["selective"] > peak[True]


# --- padding, packing, shared prefixes --------------------------------------------------------------------------------


def padded(lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """True where a token is real, bool [b, s], and each token's position within its row."""
    columns = torch.arange(max(lengths))
    first = torch.tensor([0 if side == "right" else max(lengths) - length for length in lengths]).unsqueeze(1)
    last = first + torch.tensor(lengths).unsqueeze(1)
    return (columns >= first) & (columns < last), (columns - first).clamp(min=0)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [[20, 7, 1], [20, 20], [1, 2]])
def test_padding(folders: dict[str, Path], family: str, side: str, lengths: list[int], attention: str):
    ours, theirs = both(folders[family], attention)
    is_real, positions = padded(lengths, side)
    ids = random_ids(ours.config, *is_real.shape)

    def run(model: nn.Module) -> Tensor:
        return model(ids, attention_mask=is_real.long(), position_ids=positions).logits[is_real]

    documents = torch.where(is_real, 0, -1)
    logits = ours(ids, positions, documents)
    assert logits.isfinite().all()
    assert_close(run, logits[is_real].detach(), theirs, ROUNDINGS[attention])
    assert_gradients_close(
        lambda model: run(model).square().mean(),
        gradients(ours, ours(ids, positions, documents)[is_real].square().mean()),
        theirs,
        ROUNDINGS[attention],
    )


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("lengths", [[[9, 1, 14]], [[24]], [[8, 8, 8], [1, 22, 1]]])
def test_packed_rows(folders: dict[str, Path], family: str, lengths: list[list[int]], attention: str):
    """transformers finds the documents where position_ids restart, if it is given no attention mask."""
    ours, theirs = both(folders[family], attention)
    positions = torch.tensor([[p for length in row for p in range(length)] for row in lengths])
    documents = torch.tensor([[number for number, length in enumerate(row) for _ in range(length)] for row in lengths])
    ids = random_ids(ours.config, *positions.shape)

    def run(model: nn.Module) -> Tensor:
        if family not in ("opt", "gpt2"):
            return model(ids, position_ids=positions, use_cache=False).logits
        # These two look at attention masks only: each document by itself, then.
        parts = [part for row, cuts in zip(ids, lengths, strict=True) for part in row.split(cuts)]
        return torch.cat([model(part.unsqueeze(0)).logits[0] for part in parts]).unflatten(0, ids.shape)

    assert_close(run, ours(ids, positions, documents).detach(), theirs, ROUNDINGS[attention])
    assert_gradients_close(
        lambda model: run(model).square().mean(),
        gradients(ours, ours(ids, positions, documents).square().mean()),
        theirs,
        ROUNDINGS[attention],
    )


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(("prefix", "lengths"), [(12, [9, 1, 4]), (1, [5, 5]), (10, [3])])
def test_shared_prefix(folders: dict[str, Path], family: str, prefix: int, lengths: list[int], attention: str):
    """One flat sequence `prefix | row | row ...` against transformers on whole rows, padded right."""
    ours, theirs = both(folders[family], attention)
    is_real, positions = padded([prefix + length for length in lengths], "right")
    ids = random_ids(ours.config, *is_real.shape)
    ids[:, :prefix] = ids[0, :prefix].clone()
    own = is_real[:, prefix:]

    def flat(x_bs: Tensor) -> Tensor:
        return torch.cat([x_bs[0, :prefix], x_bs[:, prefix:][own]]).unsqueeze(0)

    def run_ours() -> Tensor:
        shared = SharedPrefix(prefix, tuple(lengths))
        return ours.logits(ours.hidden(flat(ids), flat(positions), shared_prefix=shared))[0, prefix:]

    def run(model: nn.Module) -> Tensor:
        return model(ids, attention_mask=is_real.long(), position_ids=positions).logits[:, prefix:][own]

    assert_close(run, run_ours().detach(), theirs, ROUNDINGS[attention])
    assert_gradients_close(
        lambda model: run(model).square().mean(),
        gradients(ours, run_ours().square().mean()),
        theirs,
        ROUNDINGS[attention],
    )


# --- quantized --------------------------------------------------------------------------------------------------------


def decoded_weights(model: CausalLM) -> dict[str, Tensor]:
    """All weights of our quantized model, by checkpoint name, as its layers multiply with them."""
    packed = {f"{name}.weight": m.dequantize() for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    return {name: value.detach() for name, value in model.named_parameters()} | packed


@pytest.mark.parametrize("attention", THEIRS)
@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
@pytest.mark.parametrize("quantize", ["nf4", "fp4", minift.QuantConfig(blocksize=128, double_quant=False)])
def test_quantized_logits_are_those_of_the_decoded_weights(
    request: pytest.FixtureRequest, name: str, quantize: str | minift.QuantConfig, attention: str
):
    folder = request.getfixturevalue(name)
    ours = minift.load_model(folder, quantize, attention=attention)
    assert sum(isinstance(module, Linear4bit) for module in ours.modules()) == 2 * 7
    theirs = peers.peer_base(folder, weights=decoded_weights(ours), attention=attention)
    ids = random_ids(ours.config, 3, 25)
    assert_close(lambda model: model(ids).logits, ours(ids).detach(), theirs)
    plain = load_theirs(folder, attention)
    assert (ours(ids) - plain(ids).logits).abs().max() > 0.01  # it is the quantized model that was compared


@pytest.mark.parametrize("attention", THEIRS)
def test_quantized_layers_keep_their_biases(tmp_path: Path, attention: str):
    folder = checkpoint(tmp_path, **CASES["both biases, untied"])
    ours = minift.load_model(folder, "nf4", attention=attention)
    theirs = peers.peer_base(folder, weights=decoded_weights(ours), attention=attention)
    ids = random_ids(ours.config, 3, 25)
    assert_close(lambda model: model(ids).logits, ours(ids).detach(), theirs)


def test_quantized_logits_equal_bitsandbytes(tiny: Path):
    """Without double quantization its CPU is exact (with it, the nested codes come from a coarse table), at least for
    rows of whole blocks: 0.50.2 decodes rows of 80 values with the scales of other blocks."""
    pytest.importorskip("bitsandbytes")
    ours = minift.load_model(tiny, minift.QuantConfig(double_quant=False))
    weights = peers.peer_nf4_weights(tiny, double_quant=False)
    decoded = decoded_weights(ours)
    assert decoded.keys() == weights.keys()
    for key, value in decoded.items():
        assert torch.equal(value, weights[key]), key
    ids = random_ids(ours.config, 3, 25)
    theirs = peers.peer_base(tiny, weights=weights)
    assert_close(lambda model: model(ids).logits, ours(ids).detach(), theirs)
    # bitsandbytes' own product from packed weights may round as theirs does.
    with torch.no_grad():
        rounding = (theirs(ids).logits - in_fp64(theirs)(ids).logits).abs().max()
        packed = peers.peer_base(tiny, double_quant=False)
        assert (ours(ids) - packed(ids).logits).abs().max() <= 4 * rounding


# --- the real model ---------------------------------------------------------------------------------------------------

TEXTS = [
    "The capital of France is Paris.",
    "In 1969, 3 astronauts flew 384,400 km:\n  1. Armstrong\n  2. Aldrin\n\n10 days later ...",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
]
PROMPTS = [
    "What is the capital of France?",
    "Count from 7 to 12.",
    "Write one sentence about the sea.",
    "A train leaves at 9:45 and arrives at 11:20. How long does it take?",
    "Translate 'good morning' into Spanish, and say why.",
]


@pytest.fixture(scope="module")
def real_ids(real: Path) -> list[Tensor]:
    tokenizer = minift.load_tokenizer(real)
    return [torch.tensor([tokenizer.encode(text)]) for text in TEXTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_logits(real: Path, real_ids: list[Tensor], dtype: torch.dtype):
    """The yardstick of rounding in either dtype: how far transformers' own two kernels are from each other."""
    with torch.no_grad():
        theirs = {}
        for attention in THEIRS:
            model = load_theirs(real, attention, dtype)
            theirs[attention] = [model(ids).logits for ids in real_ids]
        rounding = max((a - b).abs().max().item() for a, b in zip(*theirs.values(), strict=True))
        # fp32 carries 24 bits, bf16 8: 2^16 times the rounding, of logits up to about 30.
        assert 0 < rounding < (1e-3 if dtype is torch.float32 else 4.0)
        for attention, expected in theirs.items():
            model = minift.load_model(real, dtype=dtype, attention=attention)
            for ids, logits in zip(real_ids, expected, strict=True):
                ours = model(ids)
                assert ours.dtype == logits.dtype == dtype
                assert (ours - logits).abs().max().item() <= rounding, attention


def test_real_nf4_logits(real: Path, real_ids: list[Tensor]):
    ours = minift.load_model(real, "nf4", dtype=torch.float32, attention="eager")
    weights = decoded_weights(ours)
    with torch.no_grad():
        theirs = peers.peer_base(real, weights=weights, attention="eager")
        other_kernel = peers.peer_base(real, weights=weights, attention="sdpa")
        for ids in real_ids:
            expected = theirs(ids).logits
            rounding = (expected - other_kernel(ids).logits).abs().max().item()
            assert (ours(ids) - expected).abs().max().item() <= rounding


@pytest.fixture(scope="module")
def greedy(real: Path) -> tuple[CausalLM, nn.Module, list[list[int]]]:
    """Both libraries' model in fp32, and the encoded prompts, without the template's long system message."""
    tokenizer = minift.load_tokenizer(real)
    prompts = [tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n") for prompt in PROMPTS]
    return minift.load_model(real, dtype=torch.float32), load_theirs(real, "sdpa"), prompts


def until_stop(row: list[int], stop: int) -> list[int]:
    return row[: row.index(stop) + 1] if stop in row else row


def test_real_greedy_tokens_equal_transformers(greedy: tuple[CausalLM, nn.Module, list[list[int]]]):
    ours, theirs, prompts = greedy
    (stop,) = ours.config.eos_token_ids
    generated = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        row = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)  # pyright: ignore[reportCallIssue]
        tokens = torch.cat(list(generate_tokens(ours, [prompt], 40, {stop}))).tolist()
        assert tokens == row[0, len(prompt) :].tolist()
        generated.append(tokens)
    assert sum(map(len, generated)) > 100  # they did not all stop at once

    # The same prompts side by side, padded left: each row goes on as it does alone, and stops on its own.
    longest = max(map(len, prompts))
    ids = torch.tensor([[stop] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=40)[:, longest:].tolist()  # pyright: ignore[reportCallIssue]
    rows = torch.stack(list(generate_tokens(ours, prompts, 40, {stop})), dim=1).tolist()
    assert [until_stop(row, stop) for row in rows] == [until_stop(row, stop) for row in expected]
    assert [until_stop(row, stop) for row in rows] == generated
