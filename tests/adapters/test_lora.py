"""Our LoRA against PEFT's: which layers, which initial weights, which numbers forward and backward.

Two yardsticks. For one layer, exact arithmetic (float64) and a bound that counts roundings: a sum of k products in
floating point with unit roundoff u is off by at most k u times the sum of their magnitudes, in any order. For a whole
model, the rounding error E of PEFT itself, measured as the distance of its fp32 numbers from its own in float64; ours
and theirs may be off by E each, E being one sample of it, so they may differ by 4 E (as in model/test_decoder.py).
"""

import copy
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from checkpoints import assert_as_close
from torch import Tensor, nn

import minift
from minift.adapters.inject import count_parameters, linear_layers, lora_layers
from minift.adapters.lora import LoraConfig, LoraLinear
from minift.quant import Linear4bit, QuantConfig

peft = pytest.importorskip("peft")

SEVEN = peers.SEVEN


def add_theirs(base: nn.Module, config: LoraConfig, **options: Any) -> Any:
    targets = config.target_modules
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] (a fraction is fine, too)
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets or ()),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, settings, **options)


def load_theirs(folder: Path, dtype: str = "float32") -> nn.Module:
    return peers.peer_base(folder, nf4=False, dtype=dtype)


def their_matrices(model: nn.Module) -> dict[str, Tensor]:
    """A and B by our names: base_model.model.<path>.lora_A.default.weight."""
    return {
        name.removeprefix("base_model.model."): value for name, value in model.named_parameters() if ".lora_" in name
    }


def our_matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if ".lora_" in name}


def randomize(ours: nn.Module, *theirs: nn.Module) -> None:
    """A random B (it starts at zero, where A has no gradient), and the same A and B in the other models."""
    for name, value in our_matrices(ours).items():
        with torch.no_grad():
            if ".lora_B." in name:
                value.normal_(std=0.1)
            for model in theirs:
                their_matrices(model)[name].copy_(value)


# --- initial weights --------------------------------------------------------------------------------------------------

TARGETS = ["all-linear", ("q_proj", "v_proj"), ("down_proj",), r".*layers\.1\..*_proj"]


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
def test_a_seed_gives_pefts_initial_weights(
    request: pytest.FixtureRequest, name: str, targets: str | tuple[str, ...], seed: int
):
    folder = request.getfixturevalue(name)
    ours, base = minift.load_model(folder), load_theirs(folder)
    config = LoraConfig(r=5, alpha=10, target_modules=targets)
    torch.manual_seed(seed)
    wrapped = minift.add_lora(ours, config)
    after_ours = torch.get_rng_state()
    torch.manual_seed(seed)
    theirs = add_theirs(base, config)
    matrices = their_matrices(theirs)
    assert our_matrices(ours).keys() == matrices.keys()
    assert len(matrices) == 2 * len(wrapped)
    for key, value in our_matrices(ours).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, matrices[key]), key
        assert ".lora_A." in key or not value.any()
    assert torch.equal(after_ours, torch.get_rng_state())  # as many draws, so what is drawn later is the same, too


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_initial_weights_over_other_bases(tiny: Path, quantize: str | None, dtype: str):
    """fp32 whatever the base. PEFT gives A the base's (compute) dtype for a moment, so over bf16 its A is ours, rounded
    to bf16."""
    pytest.importorskip("bitsandbytes")
    config = LoraConfig(r=4, target_modules=("q_proj", "down_proj"))
    ours = minift.load_model(tiny, quantize, dtype=getattr(torch, dtype))
    base = peers.peer_base(tiny, nf4=quantize is not None, dtype=dtype)
    torch.manual_seed(3)
    minift.add_lora(ours, config)
    torch.manual_seed(3)
    theirs = their_matrices(add_theirs(base, config))
    assert our_matrices(ours).keys() == theirs.keys()
    for key, value in our_matrices(ours).items():
        assert value.dtype == theirs[key].dtype == torch.float32
        assert torch.equal(value.to(getattr(torch, dtype)).float(), theirs[key]), key


def test_a_is_uniform_within_one_over_root_in():
    layer = LoraLinear(nn.Linear(400, 10))
    layer.add("default", LoraConfig(r=50))
    a_ri, b_or = layer.matrices("default")
    assert a_ri.shape == (50, 400) and b_or.shape == (10, 50)
    assert a_ri.abs().max() <= 1 / 20
    # Uniform in +-1/20: variance 1/1200; the mean of 20000 squares is off by sqrt(4/45 / 20000) / 400 a deviation.
    assert abs(a_ri.square().mean().item() - 1 / 1200) <= 5 * (4 / 45 / 20000) ** 0.5 / 400
    assert abs(a_ri.mean().item()) <= 5 * (1 / 1200 / 20000) ** 0.5


# --- one layer: forward and gradients ---------------------------------------------------------------------------------

SHAPES = [(1, 1, 1, 1), (3, 64, 48, 8), (2, 65, 131, 5), (7, 80, 3, 16)]  # rows of input, in, out, rank


def make_layer(n: int, i: int, o: int, r: int, dtype: torch.dtype) -> tuple[LoraLinear, Tensor, Tensor]:
    base = nn.Linear(i, o).requires_grad_(False).to(dtype)
    layer = LoraLinear(base)
    layer.add("default", LoraConfig(r=r, alpha=3))
    nn.init.normal_(layer.matrices("default")[1])
    return layer, torch.randn(2, n, i, dtype=dtype, requires_grad=True), torch.randn(2, n, o, dtype=dtype)


def exact_numbers(layer: LoraLinear, x: Tensor, dy: Tensor) -> list[tuple[Tensor, Tensor, int]]:
    """(value, size, terms) of y, dx, dA and dB: the exact number, the sum of its terms' magnitudes, and how many
    products are added up one after the other to get it."""
    config = layer.configs["default"]
    a, b, w = (t.detach().double() for t in (*layer.matrices("default"), layer.base.weight))
    bias = layer.base.bias.detach().double()  # pyright: ignore[reportOptionalMemberAccess]
    s, x, dy = config.scaling, x.detach().double().flatten(0, 1), dy.double().flatten(0, 1)
    n, i, o, r = len(x), a.shape[1], b.shape[0], a.shape[0]

    def numbers(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
        return [
            x @ w.T + bias + s * x @ a.T @ b.T,
            dy @ w + s * dy @ b @ a,
            s * (dy @ b).T @ x,
            s * dy.T @ (x @ a.T),
        ]

    values = numbers(x, dy, a, b, w, bias)
    sizes = numbers(*(t.abs() for t in (x, dy, a, b, w, bias)))
    return list(zip(values, sizes, [i + r + 8, o + r + 8, o + n + 8, i + n + 8], strict=True))


@pytest.mark.parametrize(("n", "i", "o", "r"), SHAPES)
def test_a_layer_in_fp32_equals_peft(n: int, i: int, o: int, r: int):
    layer, x, dy = make_layer(n, i, o, r, torch.float32)
    model = nn.Sequential(copy.deepcopy(layer.base))
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=3, target_modules=["0"]))
    matrices = [value for name, value in theirs.named_parameters() if ".lora_" in name]
    with torch.no_grad():
        for mine, other in zip(layer.matrices("default"), matrices, strict=True):
            other.copy_(mine)

    y_ours, y_theirs = layer(x), theirs(x)
    ours = [y_ours, *torch.autograd.grad(y_ours, (x, *layer.matrices("default")), dy)]
    others = [y_theirs, *torch.autograd.grad(y_theirs, (x, *matrices), dy)]
    for mine, other, (exact, size, terms) in zip(ours, others, exact_numbers(layer, x, dy), strict=True):
        assert mine.shape == other.shape
        assert mine.dtype == other.dtype == torch.float32
        bound = terms * 2**-24 * size
        assert ((mine.double().view_as(exact) - exact).abs() <= bound).all()
        assert ((mine.double() - other.double()).view_as(exact).abs() <= 2 * bound).all()


@pytest.mark.parametrize(("n", "i", "o", "r"), SHAPES)
def test_a_layer_in_bf16(n: int, i: int, o: int, r: int):
    """bf16 activations and base, fp32 A and B. The thin products run in bf16: what is rounded to bf16 on the way (the
    factors A and B, the result of each of the two products, the sum) costs u = 2^-8 of the number's size each, at most
    six of them; products are added up in fp32."""
    layer, x, dy = make_layer(n, i, o, r, torch.bfloat16)
    y = layer(x)
    ours = [y, *torch.autograd.grad(y, (x, *layer.matrices("default")), dy)]
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    model = nn.Sequential(copy.deepcopy(layer.base))
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=3, target_modules=["0"]))
    matrices = [value for name, value in theirs.named_parameters() if ".lora_" in name]
    with torch.no_grad():
        for mine, other in zip(layer.matrices("default"), matrices, strict=True):
            other.copy_(mine)
    # PEFT's path with fp32 adapters outside autocast: everything thin in fp32, fewer roundings than ours.
    y_theirs = theirs(x)
    others = [y_theirs, *torch.autograd.grad(y_theirs, (x, *matrices), dy)]
    for mine, other, (exact, size, terms) in zip(ours, others, exact_numbers(layer, x, dy), strict=True):
        assert mine.dtype == other.dtype
        bound = (6 * 2**-8 + terms * 2**-24) * size
        assert ((mine.double().view_as(exact) - exact).abs() <= bound).all()
        assert ((mine.double() - other.double()).view_as(exact).abs() <= 2 * bound).all()


def test_no_gradient_for_an_input_that_needs_none():
    layer, x, _ = make_layer(3, 8, 4, 2, torch.float32)
    y = layer(x.detach())
    y.sum().backward()
    assert all(p.grad is not None for p in layer.matrices("default"))
    assert layer.base.weight.grad is None


def test_the_backward_pass_keeps_the_input_itself_and_r_numbers_a_token():
    layer, x, _ = make_layer(10, 64, 48, 4, torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    own = {t.data_ptr() for t in (*layer.parameters(), x)}
    assert sum(t.numel() for t in saved if t.data_ptr() not in own) == 2 * 10 * 4


# --- a whole model ----------------------------------------------------------------------------------------------------


def loss(logits: Tensor) -> Tensor:
    return logits.float().square().mean()


def assert_model_equals_peft(ours: nn.Module, theirs: Any, reference: Any, ids: Tensor) -> None:
    """Logits and all gradients of A and B: ours against theirs, and theirs against `reference`, the same in float64."""
    assert our_matrices(ours).keys() == their_matrices(theirs).keys() == their_matrices(reference).keys()
    runs = []
    for logits, parameters in [
        (ours(ids), our_matrices(ours)),
        (theirs(ids).logits, their_matrices(theirs)),
        (reference(ids).logits, their_matrices(reference)),
    ]:
        gradients = torch.autograd.grad(loss(logits) if logits.dtype != torch.float64 else logits.square().mean(),
                                        tuple(parameters.values()))  # fmt: skip
        runs.append({"logits": logits.detach()} | dict(zip(parameters, gradients, strict=True)))
    assert_as_close(*runs)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", ["tiny", "tiny_odd"])
def test_a_model_in_fp32_equals_peft(request: pytest.FixtureRequest, name: str, targets: str | tuple[str, ...]):
    folder = request.getfixturevalue(name)
    config = LoraConfig(r=6, alpha=9, target_modules=targets)
    ours, theirs = minift.load_model(folder), add_theirs(load_theirs(folder), config)
    minift.add_lora(ours, config)
    randomize(ours, theirs)
    ids = torch.randint(3, ours.config.vocab_size, (2, 23))
    assert_model_equals_peft(ours, theirs, copy.deepcopy(theirs).double(), ids)


def test_a_model_over_nf4_equals_peft_over_bitsandbytes(tiny: Path):
    """Training mode (in eval mode bitsandbytes' CPU repacks weights and rounds their scales), no double quantization
    (its nested codes come from a coarse table on the CPU)."""
    pytest.importorskip("bitsandbytes")
    config = LoraConfig(r=6, alpha=9)
    ours = minift.load_model(tiny, QuantConfig(double_quant=False)).train()
    assert all(isinstance(layer, Linear4bit) for path, layer in linear_layers(ours).items() if path != "lm_head")
    minift.add_lora(ours, config)
    theirs = add_theirs(peers.peer_base(tiny, double_quant=False), config)
    weights = peers.peer_nf4_weights(tiny, double_quant=False)
    reference = add_theirs(peers.peer_base(tiny, weights=weights), config)
    randomize(ours, theirs, reference)
    ids = torch.randint(3, ours.config.vocab_size, (2, 23))
    assert_model_equals_peft(ours, theirs, reference.double(), ids)


def test_b_of_zero_changes_no_bit(tiny: Path):
    ours = minift.load_model(tiny)
    ids = torch.randint(0, ours.config.vocab_size, (2, 9))
    before = ours(ids)
    minift.add_lora(ours)
    assert torch.equal(ours(ids), before)


# --- dropout ----------------------------------------------------------------------------------------------------------


def identity_layer(width: int, p: float) -> LoraLinear:
    """y = x + dropout(x): A, B and the base are identities, alpha = r."""
    base = nn.Linear(width, width, bias=False).requires_grad_(False)
    layer = LoraLinear(base)
    layer.add("default", LoraConfig(r=width, alpha=width, dropout=p))
    with torch.no_grad():
        for matrix in (base.weight, *layer.matrices("default")):
            matrix.copy_(torch.eye(width))
    return layer


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_of_the_adapters_input(p: float):
    layer, x = identity_layer(32, p).train(), torch.ones(5000, 32)
    adapted = layer(x) - x  # the base's own input is whole
    dropped = adapted == 0
    # 160000 independent draws: within 5 standard deviations, which a right one exceeds once in 1.7 million.
    assert abs(dropped.double().mean().item() - p) <= 5 * (p * (1 - p) / dropped.numel()) ** 0.5
    assert torch.allclose(adapted[~dropped], torch.tensor(1 / (1 - p)), rtol=1e-5)
    assert dropped.double().mean(0).min() > 0 and dropped.double().mean(0).max() < 1  # no number is always dropped
    assert torch.equal(layer.eval()(x), 2 * x)


def test_a_new_adapter_is_in_the_mode_of_its_model(tiny: Path):
    """Asked before it is trained, as in the demo, an adapter with dropout answers without it."""
    for training in (False, True):
        ours = minift.load_model(tiny).train(training)
        minift.add_lora(ours, LoraConfig(dropout=0.5))
        randomize(ours)
        assert {layer.training for layer in lora_layers(ours).values()} == {training}
        ids = torch.randint(0, ours.config.vocab_size, (2, 9))
        assert torch.equal(ours(ids), ours(ids)) != training


def test_dropout_draws_what_peft_draws(tiny: Path):
    config = LoraConfig(r=4, alpha=8, dropout=0.3)
    ours, theirs = minift.load_model(tiny).train(), add_theirs(load_theirs(tiny), config).train()
    minift.add_lora(ours, config)
    ours.train()
    randomize(ours, theirs)
    reference = copy.deepcopy(theirs).eval()
    ids = torch.randint(3, ours.config.vocab_size, (2, 23))
    torch.manual_seed(5)
    mine = ours(ids)
    torch.manual_seed(5)
    other = theirs(ids).logits
    # Another mask would move the logits by as much as dropout does, which is far more than rounding.
    moved = (reference(ids).logits - other).abs().max()
    assert (mine - other).abs().max() <= 1e-4 * moved
    assert moved > 0.1


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ("q_proj",),
        ("self_attn.q_proj", "mlp.up_proj"),
        ("model.layers.1.self_attn.k_proj",),
        ("layers.0.mlp.gate_proj", "o_proj"),
        ("q_proj", "lm_head"),
        r"model\.layers\.0\..*_proj",
        r".*\.(gate|up)_proj",
        r".*(q|v)_proj$",
    ],
    ids=str,
)
def test_targets_are_those_of_peft(tiny_odd: Path, targets: str | tuple[str, ...]):
    ours, config = minift.load_model(tiny_odd), LoraConfig(target_modules=targets)
    wrapped = minift.add_lora(ours, config)
    theirs = add_theirs(load_theirs(tiny_odd), config)
    assert sorted(wrapped) == sorted(theirs.targeted_module_names)
    assert sorted(wrapped) == sorted(lora_layers(ours))


def test_all_linear_leaves_the_head_alone(tiny_odd: Path):
    ours = minift.load_model(tiny_odd)
    wrapped = minift.add_lora(ours, LoraConfig(target_modules="all-linear"))
    assert len(wrapped) == 2 * 7
    assert not any("lm_head" in path for path in wrapped)
    assert type(ours.lm_head) is nn.Linear


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (("nothing",), "nothing"),
        (("q_proj", "query"), "query"),  # one of two
        (("q_pro",), "q_pro"),  # not the end of a path after a dot
        (("proj",), "proj"),
        ((".*q_proj",), ".*q_proj"),  # a list is no regular expression
        (("input_layernorm",), "input_layernorm"),  # neither a linear layer nor an embedding
        ((), "()"),
        ("q_proj", "q_proj"),  # a single string must match a whole path
        ("layers", "layers"),
        (r".*\.q_pro", "q_pro"),  # to its end
        (r"model\.layers\.0", "layers"),
    ],
)
def test_targets_that_match_nothing_are_refused_with_the_names_there_are(tiny: Path, targets: Any, named: str):
    ours = minift.load_model(tiny)
    with pytest.raises(ValueError) as error:
        minift.add_lora(ours, LoraConfig(target_modules=targets))
    message = str(error.value)
    assert named in message and "\n" not in message
    assert all(name in message for name in [*SEVEN, "lm_head"])
    assert not lora_layers(ours)
    assert all(p.requires_grad for p in ours.parameters())  # nothing was changed


def test_a_regular_expression_that_is_none_is_refused(tiny: Path):
    with pytest.raises(ValueError, match=r"\(q_proj"):
        minift.add_lora(minift.load_model(tiny), LoraConfig(target_modules="(q_proj"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank must be at least 1, got 0"),
        ({"r": -3}, "rank"),
        ({"alpha": 0}, "alpha must be positive, got 0"),
        ({"alpha": -1}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


# --- several adapters, and what is trained ----------------------------------------------------------------------------


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_only_a_and_b_are_trained(tiny: Path, quantize: str | None):
    ours = minift.load_model(tiny, quantize)
    total = 384 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64) + 64
    assert count_parameters(ours)[1] == total
    wrapped = minift.add_lora(ours, LoraConfig(r=3, target_modules=("q_proj", "down_proj")))
    assert trained_names(ours) == {f"{path}.lora_{part}.default.weight" for path in wrapped for part in "AB"}
    trained = 2 * 3 * (64 + 64 + 128 + 64)
    assert count_parameters(ours) == (trained, total + trained)


def randomize_b(model: nn.Module, adapter: str) -> None:
    for layer in lora_layers(model).values():
        if adapter in layer.configs:
            nn.init.normal_(layer.matrices(adapter)[1], std=0.05)


def test_active_adapters_add_up(tiny: Path):
    """Layer by layer: base + change of the first + change of the second, each with its own rank and scaling."""
    layer = LoraLinear(nn.Linear(20, 10).requires_grad_(False).double())
    for name, config in {"one": LoraConfig(r=2, alpha=1), "two": LoraConfig(r=5, alpha=30)}.items():
        layer.add(name, config)
        nn.init.normal_(layer.matrices(name)[1])
    layer.double()
    x = torch.randn(4, 20, dtype=torch.float64)
    for active in itertools.chain.from_iterable(itertools.permutations(["one", "two"], n) for n in range(3)):
        layer.active = list(active)
        weight = layer.base.weight + sum((layer.delta(name) for name in active), torch.zeros(10, 20))
        assert (layer(x) - nn.functional.linear(x, weight, layer.base.bias)).abs().max() <= 1e-12

    ours = minift.load_model(tiny)
    ids = torch.randint(0, ours.config.vocab_size, (1, 9))
    minift.add_lora(ours, LoraConfig(r=2, target_modules=("q_proj",)), adapter="one")
    randomize_b(ours, "one")
    first = ours(ids)
    minift.add_lora(ours, LoraConfig(r=4, target_modules=("q_proj", "up_proj")), adapter="two")
    assert torch.equal(ours(ids), first)  # the new one's B is zero
    randomize_b(ours, "two")
    assert not torch.equal(ours(ids), first)
    layers = lora_layers(ours)
    assert layers["model.layers.0.self_attn.q_proj"].active == ["one", "two"]
    assert layers["model.layers.0.mlp.up_proj"].active == ["two"]


def test_a_second_adapter_leaves_a_frozen_first_one_frozen(tiny: Path, tmp_path: Path):
    """add_lora "freezes everything but the new A and B"."""
    first = minift.load_model(tiny)
    minift.add_lora(first, LoraConfig(r=2, target_modules=("q_proj",)))
    minift.save_adapter(first, tmp_path / "first")

    ours = minift.load_model(tiny)
    minift.load_adapter(ours, tmp_path / "first", adapter="first")
    assert trained_names(ours) == set()
    wrapped = minift.add_lora(ours, LoraConfig(r=2, target_modules=("q_proj", "up_proj")), adapter="second")
    assert trained_names(ours) == {f"{path}.lora_{part}.second.weight" for path in wrapped for part in "AB"}


def test_a_second_adapter_leaves_one_in_training_in_training(tiny: Path):
    ours = minift.load_model(tiny)
    first = minift.add_lora(ours, LoraConfig(r=2, target_modules=("q_proj",)), adapter="first")
    second = minift.add_lora(ours, LoraConfig(r=2, target_modules=("q_proj", "up_proj")), adapter="second")
    expected = {f"{path}.lora_{part}.first.weight" for path in first for part in "AB"}
    expected |= {f"{path}.lora_{part}.second.weight" for path in second for part in "AB"}
    assert trained_names(ours) == expected


@pytest.mark.parametrize("again", [("q_proj",), ("k_proj", "q_proj"), ("gate_proj", "q_proj")])
def test_the_same_name_twice_is_refused_and_nothing_changes(tiny: Path, again: tuple[str, ...]):
    ours = minift.load_model(tiny)
    minift.add_lora(ours, LoraConfig(r=2, target_modules=("q_proj",)))
    randomize_b(ours, "default")
    before, trained = {name: value.clone() for name, value in ours.state_dict().items()}, trained_names(ours)
    with pytest.raises(ValueError, match="'default' exists already"):
        minift.add_lora(ours, LoraConfig(r=2, target_modules=again))
    assert ours.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert trained_names(ours) == trained


@pytest.mark.parametrize("name", ["a.b", ""])
def test_a_name_that_no_module_can_have_is_refused(tiny: Path, name: str):
    ours = minift.load_model(tiny)
    with pytest.raises(ValueError, match="adapter"):
        minift.add_lora(ours, adapter=name)


def test_layers_are_found_once_and_in_order(tiny: Path):
    ours = minift.load_model(tiny)
    before = list(linear_layers(ours))
    assert before[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert before[-1] == "lm_head"
    minift.add_lora(ours, LoraConfig(target_modules=("k_proj",)))
    assert sorted(linear_layers(ours)) == sorted(before)  # the wrapper under the path of what it wraps


def paths(names: Sequence[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def test_the_default_is_every_linear_layer_of_the_blocks(tiny: Path):
    assert paths(minift.add_lora(minift.load_model(tiny))) == set(SEVEN)
