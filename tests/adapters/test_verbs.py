"""The verbs, the same for every method: add, save, load, remove; and what they refuse without a trace."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minift
from minift.adapters.bottleneck import PfeifferConfig
from minift.adapters.ia3 import IA3Config
from minift.adapters.method import COMMON, Method, check_settings, method_of
from minift.adapters.own import FullConfig
from minift.adapters.report import report, without_gradient
from minift.adapters.verbs import METHODS, add_adapter, delete_method, load_adapter, save_adapter

IDS = torch.arange(3, 27).view(2, 12)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
State = dict[str, tuple[int, bool, Tensor]]


def state(model: minift.CausalLM) -> State:
    """Every parameter and buffer, whose object it is and whether it is trained; and every module's kind."""
    tensors = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    tensors |= {name: (0, False, b.clone()) for name, b in model.named_buffers()}
    kinds = {path: (id(module), False, torch.empty(0)) for path, module in model.named_modules()}
    return tensors | {f"{path} itself": kind for path, kind in kinds.items()}


def assert_same(model: minift.CausalLM, before: State, frozen: bool = False) -> None:
    """Bit for bit, the same objects, and the same of them trained."""
    after = state(model)
    assert after.keys() == before.keys()
    for name, (own, trained, value) in after.items():
        identity, was_trained, old = before[name]
        assert own == identity and trained == (was_trained and not frozen), name
        assert value.dtype == old.dtype and torch.equal(value, old), name


def trained(model: minift.CausalLM) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def randomize(model: minift.CausalLM) -> None:
    for p in trained(model).values():
        with torch.no_grad():
            p.add_(0.2 * torch.randn(p.shape).to(p.dtype))


def adapted(folder: Path, method: type[Method], **options: Any) -> minift.CausalLM:
    """With values that show."""
    model = minift.load_model(folder, **options)
    add_adapter(model, method())
    randomize(model)
    return model


def saved(folder: Path, method: type[Method], place: Path) -> Path:
    return save_adapter(adapted(folder, method), place)


def test_names_are_told_apart():
    assert len({method.name for method in METHODS}) == len({method.peft_type for method in METHODS}) == len(METHODS)
    assert {"lora", "LORA"}.isdisjoint(name for method in METHODS for name in (method.name, method.peft_type))


@every_method
@pytest.mark.parametrize(
    ("quantize", "dtype"),
    [(None, torch.float32), (None, torch.bfloat16), ("nf4", torch.bfloat16), ("int8", torch.float32)],
)
def test_round_trip(tiny: Path, tmp_path: Path, method: type[Method], quantize: str | None, dtype: torch.dtype):
    """Everything that is trained has a gradient, comes back from the file bit for bit, and leaves again."""
    if quantize and method is FullConfig:
        pytest.skip("full fine-tuning refuses quantized models: test_own.py")
    ours = minift.load_model(tiny, quantize, dtype=dtype)
    before, plain = state(ours), ours(IDS)
    add_adapter(ours, method())
    assert method_of(ours) == method() and trained(ours)
    assert report(ours).trained == sum(p.numel() for p in trained(ours).values()) > 0
    randomize(ours)
    ours(IDS).float().logsumexp(-1).sum().backward()
    assert without_gradient(ours) == []
    ours.zero_grad()
    assert not torch.equal(ours(IDS), plain)
    assert save_adapter(ours, tmp_path / "saved") == tmp_path / "saved"

    generator = torch.get_rng_state()
    again = minift.load_model(tiny, quantize, dtype=dtype)
    torch.set_rng_state(generator)
    assert load_adapter(again, tmp_path / "saved") == "default"
    assert torch.equal(torch.get_rng_state(), generator)  # loading draws nothing from the caller's randomness
    assert not trained(again)
    assert torch.equal(again(IDS), ours(IDS))
    theirs = method_of(again)
    assert theirs is not None
    for key, value in method().tensors(ours).items():
        other = theirs.tensors(again)[key]
        assert value.dtype == other.dtype and torch.equal(value, other), key
    save_adapter(again, tmp_path / "twice")
    assert (tmp_path / "twice" / WEIGHTS).read_bytes() == (tmp_path / "saved" / WEIGHTS).read_bytes()
    assert (tmp_path / "twice" / CONFIG).read_bytes() == (tmp_path / "saved" / CONFIG).read_bytes()

    learned = ours(IDS)
    delete_method(ours)
    assert method_of(ours) is None and not trained(ours)
    if method is FullConfig:  # keeps no second copy of the model
        assert torch.equal(ours(IDS), learned)
        return
    assert_same(ours, before, frozen=True)
    delete_method(again)
    assert torch.equal(again(IDS), plain)


@every_method
def test_loaded_to_be_trained_further(tiny: Path, tmp_path: Path, method: type[Method]):
    folder = saved(tiny, method, tmp_path / "saved")
    again = minift.load_model(tiny)
    load_adapter(again, folder, trainable=True)
    assert trained(again)
    again(IDS).sum().backward()
    assert without_gradient(again) == []


@every_method
@pytest.mark.parametrize("family", ["phi3", "gemma2", "opt", "gpt2"])
def test_round_trip_in_other_families(tmp_path: Path, method: type[Method], family: str):
    """Or a sentence on what to name, where PEFT has no default either."""
    folder = checkpoints.checkpoint(tmp_path / "model", **checkpoints.FAMILY_NAMES[family])
    ours, again = minift.load_model(folder), minift.load_model(folder)
    before = state(ours)
    try:
        add_adapter(ours, method())
    except ValueError as error:
        assert (method.name, family) in {("ia3", "phi3"), ("norms", "phi3"), ("norms", "opt")}
        assert "target_modules" in str(error)
        assert_same(ours, before)
        return
    randomize(ours)
    save_adapter(ours, tmp_path / "saved")
    load_adapter(again, tmp_path / "saved")
    assert torch.equal(again(IDS), ours(IDS))
    delete_method(ours)
    if method is not FullConfig:
        assert_same(ours, before, frozen=True)


# --- refused, without a trace -----------------------------------------------------------------------------------------


def refuse(model: minift.CausalLM, folder: Path, message: str) -> None:
    """Loading raises, and the model is as it was: a part of it is trained."""
    for number, p in enumerate(model.parameters()):
        p.requires_grad_(number % 3 == 0)
    before, generator = state(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert_same(model, before)
    assert method_of(model) is None and torch.equal(torch.get_rng_state(), generator)


def drop(tensors: dict[str, Tensor]) -> None:
    tensors.pop(sorted(tensors)[0])


def add_key(tensors: dict[str, Tensor]) -> None:
    key = sorted(tensors)[0]
    tensors[f"{key}.more"] = tensors[key].clone()


def reshape(tensors: dict[str, Tensor]) -> None:
    key = sorted(tensors)[-1]
    tensors[key] = torch.zeros(*tensors[key].shape, 2)


@every_method
@pytest.mark.parametrize(
    ("change", "message"),
    [(drop, "lacks|no place|shape|must|holds"), (add_key, "no place for|holds|must|more"), (reshape, "shape")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_with_other_tensors(
    tiny: Path, tmp_path: Path, method: type[Method], change: Callable[[dict[str, Tensor]], None], message: str
):
    folder = saved(tiny, method, tmp_path / "saved")
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    if not tensors:
        pytest.skip("a single tensor: a file without any is refused by folder.py")
    save_file(tensors, folder / WEIGHTS)
    refuse(minift.load_model(tiny), folder, message)


@every_method
def test_a_file_of_another_model(tiny: Path, tiny_odd: Path, tmp_path: Path, method: type[Method]):
    folder = saved(tiny_odd, method, tmp_path / "saved")
    refuse(minift.load_model(tiny), folder, "another model|has no place|shape|width|lacks")


@every_method
def test_a_setting_that_is_not_known(tiny: Path, tmp_path: Path, method: type[Method]):
    folder = saved(tiny, method, tmp_path / "saved")
    path = folder / CONFIG
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"a_new_switch": None, "another": False}))  # off
    load_adapter(minift.load_model(tiny), folder)
    path.write_text(json.dumps(content | {"a_new_switch": "on"}))
    refuse(minift.load_model(tiny), folder, "a_new_switch='on' is not supported")


@every_method
def test_a_setting_that_is_missing(tiny: Path, tmp_path: Path, method: type[Method]):
    """Whatever PEFT always writes and this needs; a setting that has a usual value may be left out."""
    folder = saved(tiny, method, tmp_path / "saved")
    path = folder / CONFIG
    content = json.loads(path.read_text())
    needed = {
        "ia3": "target_modules", "norms": "target_modules", "houlsby": "scaling", "pfeiffer": "non_linearity",
        "parallel": "reduction_factor",
    }.get(method.name, "peft_type")  # fmt: skip
    del content[needed]
    path.write_text(json.dumps(content))
    refuse(minift.load_model(tiny), folder, "lacks|peft_type None is not supported")


def test_a_key_without_the_prefix(tiny: Path, tmp_path: Path):
    folder = saved(tiny, IA3Config, tmp_path / "saved")
    tensors = load_file(folder / WEIGHTS)
    save_file({key.removeprefix("base_model."): value for key, value in tensors.items()}, folder / WEIGHTS)
    refuse(minift.load_model(tiny), folder, r"model\.model\.layers.* does not begin with base_model\.model\.")


@pytest.mark.parametrize("kind", ["ADALORA", "", None, 7])
def test_another_peft_type(tiny: Path, tmp_path: Path, kind: object):
    folder = saved(tiny, IA3Config, tmp_path / "saved")
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": kind}))
    refuse(minift.load_model(tiny), folder, f"peft_type {kind!r} is not supported; supported: LORA, IA3, .*FULL")


@every_method
def test_one_method_at_a_time(tiny: Path, tmp_path: Path, method: type[Method]):
    folder = saved(tiny, method, tmp_path / "saved")
    lora = minift.load_model(tiny)
    minift.add_lora(lora, minift.LoraConfig(r=2))
    lora_folder = save_adapter(lora, tmp_path / "lora")
    ours = adapted(tiny, method)
    for model, refused, message in (
        (ours, lambda: add_adapter(ours, PfeifferConfig()), f"holds {method.name} already, and pfeiffer cannot"),
        (ours, lambda: add_adapter(ours, minift.LoraConfig()), f"holds {method.name} already, and LoRA cannot"),
        (ours, lambda: minift.add_lora(ours), f"holds {method.name} already, and LoRA cannot"),
        (ours, lambda: load_adapter(ours, folder), rf"holds {method.name} already.*delete_method\(model\)"),
        (ours, lambda: load_adapter(ours, lora_folder), f"holds {method.name} already, and LoRA cannot"),
        (lora, lambda: add_adapter(lora, method()), f"holds LoRA already, and {method.name} cannot"),
        (lora, lambda: load_adapter(lora, folder), f"holds LoRA already, and {method.name} cannot"),
    ):
        before = state(model)
        with pytest.raises(ValueError, match=message):
            refused()
        assert_same(model, before)
    delete_method(ours)
    add_adapter(ours, PfeifferConfig())


@every_method
def test_only_lora_has_names(tiny: Path, tmp_path: Path, method: type[Method]):
    ours, plain = adapted(tiny, method), minift.load_model(tiny)
    before = state(plain)
    folder = save_adapter(ours, tmp_path / "saved")
    for refused in (
        lambda: add_adapter(plain, method(), "mine"),
        lambda: load_adapter(plain, folder, "mine"),
        lambda: save_adapter(ours, tmp_path / "other", "mine"),
    ):
        with pytest.raises(
            ValueError, match=f"'mine': a model holds only one {method.name}, which is called 'default'"
        ):
            refused()
    assert_same(plain, before)
    assert not (tmp_path / "other").exists()


def test_lora_goes_through_the_same_verbs(tiny: Path, tmp_path: Path):
    ours, again = minift.load_model(tiny), minift.load_model(tiny)
    add_adapter(ours, minift.LoraConfig(r=3), "first")
    randomize(ours)
    save_adapter(ours, tmp_path / "saved", "first")
    assert load_adapter(again, tmp_path / "saved", "second") == "second"
    assert torch.equal(again(IDS), ours(IDS)) and method_of(again) is None
    with pytest.raises(ValueError, match="no method to remove"):
        delete_method(again)


@pytest.mark.parametrize("value", [1, "x", ["a"], {"a": 1}, True, 0.5])
def test_settings_that_are_on(value: object):
    check_settings(dict.fromkeys(COMMON, value) | {"known": value, "off": None, "none": []}, ("known",))
    with pytest.raises(ValueError, match="strange="):
        check_settings({"strange": value}, ("known",))


@pytest.mark.parametrize("method", [m for m in METHODS if m.merge is Method.merge])
def test_what_no_weight_computes_cannot_be_merged(tiny: Path, method: type[Method]):
    ours = minift.load_model(tiny)
    add_adapter(ours, method())
    before = ours(IDS)
    with pytest.raises(ValueError, match=f"{method.name} cannot be merged"):
        method().merge(ours)
    assert torch.equal(ours(IDS), before) and method_of(ours) is not None
