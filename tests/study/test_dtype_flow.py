"""The trace says what ran: compared with what the operators of small networks are known to do, and with themselves."""

import pytest
import torch
from torch import Tensor, nn

from minift.model.layers import RMSNorm
from minift.quant import QuantConfig, quantize_model
from minift.study.dtype_flow import Flow, format_flows, one_block, trace_dtypes


class Net(nn.Module):
    """A norm, a linear layer, and a product of its own after both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = RMSNorm(64, 1e-5), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.norm(x))
        return x @ x.T


def flows(model: nn.Module, x: Tensor) -> dict[str, Flow]:
    return {flow.path: flow for flow in trace_dtypes(model, x)}


def test_a_norm_computes_in_fp32_and_nothing_else_does():
    found = flows(Net().bfloat16(), torch.randn(3, 64).bfloat16())
    assert found["norm"].casts == ["bf16 -> fp32", "fp32 -> bf16"] and found["norm"].products == []
    assert found["linear"].casts == [] and found["linear"].products == ["bf16 x bf16"]
    assert found[""].products == ["bf16 x bf16"] and found[""].stored == ""
    assert list(found) == ["norm", "linear", ""]  # the net's own product comes last
    assert {(f.came, f.left) for f in found.values()} == {("bf16", "bf16")}


def test_in_fp32_nothing_is_cast():
    assert all(flow.casts == [] for flow in flows(Net(), torch.randn(3, 64)).values())


@pytest.mark.parametrize("compute", [torch.float32, torch.float16, None])
def test_a_4_bit_layer_casts_to_the_compute_dtype_and_back(compute: torch.dtype | None):
    model = Net().bfloat16()
    quantize_model(model, QuantConfig(compute_dtype=compute, skip=()))
    linear = flows(model, torch.randn(3, 64).bfloat16())["linear"]
    name = {torch.float32: "fp32", torch.float16: "fp16", None: "bf16"}[compute]
    around = [f"bf16 -> {name}", f"uint8 -> {name}", f"{name} -> bf16"]
    assert linear.casts == (around if compute else ["uint8 -> bf16"])
    assert linear.products == [f"{name} x {name}"]
    assert (linear.stored, linear.came, linear.left) == ("nf4 + double quant", "bf16", "bf16")


@pytest.mark.parametrize(("largest", "split"), [(1.0, False), (50.0, True)])
def test_an_8_bit_layer_multiplies_codes_and_outliers_apart(largest: float, split: bool):
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).half()
    quantize_model(model, "int8")
    x = torch.rand(3, 64).half()
    x[0, 5] = largest
    (flow,) = trace_dtypes(model, x)
    assert flow.products == ["int8 x int8 -> int32"] + ["fp16 x fp16"] * split
    assert "fp32 -> int8" in flow.casts


def test_the_trace_changes_nothing():
    model, x = Net(), torch.randn(3, 64)
    before = model(x)
    trace_dtypes(model, x)
    assert torch.equal(model(x), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_are_removed_when_the_pass_fails():
    model = Net()
    with pytest.raises(RuntimeError):
        trace_dtypes(model, torch.randn(3, 63))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_autocast_casts_weights_and_inputs():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    with torch.autocast("cpu", torch.bfloat16):
        first, second = trace_dtypes(model, torch.randn(2, 8))
    assert (first.stored, first.came, first.left, second.came) == ("fp32", "fp32", "bf16", "bf16")
    assert first.products == second.products == ["bf16 x bf16"]
    assert first.casts == second.casts == ["fp32 -> bf16"]


def test_one_block_of_many():
    paths = ["model.embed", "model.layers.0.mlp", "model.layers.1", "model.layers.1.mlp", "model.layers.10.mlp", "head"]
    chosen = one_block([Flow(path, "") for path in paths], layer=1)
    assert [flow.path for flow in chosen] == ["model.embed", "model.layers.1", "model.layers.1.mlp", "head"]


def test_the_table_names_the_model_itself():
    text = format_flows([Flow("", "Net", "", "bf16", "fp32", ["bf16 -> fp32"], ["fp32 x fp32"])])
    header, row = text.splitlines()
    assert header.split()[0] == "module" and row.startswith("(the model)")
    assert "bf16 -> fp32" in row and "fp32 x fp32" in row
