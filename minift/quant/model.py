"""Quantizing the linear layers of a whole model, and saying what happened to each.

Which layers: every `nn.Linear` except those that `QuantConfig.skip` names (the head by default) and a head that shares
its weight with the embedding, because the embedding needs its rows. Embeddings and norms are small or looked up row by
row and keep their dtype.

    swap_linears     before loading: empty quantized layers, for weights that are quantized as they are read
    quantize_model   a model already in memory, layer by layer, with a report
    dequantize_model back to ordinary layers, with the decoded values
"""

from dataclasses import dataclass

from torch import Tensor, nn

from minift.quant.config import QuantConfig
from minift.quant.linear import QuantizedLinear, empty_quantized


@dataclass(frozen=True)
class LayerReport:
    """What quantization did to one linear layer.

    Attributes:
        path: of the layer in the model.
        shape: of its weight.
        format: "nf4 + double quant", ...; None if the layer was left alone.
        reason: why it was left alone.
        bytes_before, bytes_after: of the weight, scales included.
        error: root mean square of (decoded - original) / root mean square of the original.
    """

    path: str
    shape: tuple[int, int]
    format: str | None
    reason: str
    bytes_before: int
    bytes_after: int
    error: float


def swap_linears(model: nn.Module, config: QuantConfig) -> list[str]:
    """Replace every nn.Linear that is to be quantized by an empty quantized layer on the same device.

    Works on the meta device: nothing is allocated or computed.

    Returns:
        names of the replaced modules.

    Raises:
        ValueError: if nothing was replaced.
    """
    chosen = [path for path, reason in plan(model, config).items() if not reason]
    for path in chosen:
        model.set_submodule(path, empty_quantized(model.get_submodule(path), config))  # pyright: ignore
    return chosen


def quantize_model(model: nn.Module, quantize: str | QuantConfig = "nf4") -> list[LayerReport]:
    """Quantize the linear layers of a model that is already in memory, one by one, in place.

    Args:
        model: any module tree.
        quantize: "nf4", "fp4", "int8" or a QuantConfig.

    Returns:
        a report for each linear layer, those left alone included.

    Raises:
        ValueError: nothing to quantize, or a weight that cannot be (NaN, infinite); names it.
    """
    config = QuantConfig.named(quantize)
    if config is None:
        raise ValueError("quantize_model needs a format: 'nf4', 'fp4', 'int8' or a QuantConfig")
    reports = []
    for path, reason in plan(model, config).items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        shape, before = (linear.out_features, linear.in_features), linear.weight.nbytes
        if reason:
            reports.append(LayerReport(path, shape, None, reason, before, before, 0.0))
            continue
        layer = empty_quantized(linear, config)
        try:
            layer.quantize_weight(linear.weight)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        layer.bias = linear.bias
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        model.set_submodule(path, layer)
        after = sum(buffer.nbytes for buffer in layer.buffers())
        error = relative_error(linear.weight.detach(), layer.dequantize())
        reports.append(LayerReport(path, shape, layer.config.label, "", before, after, error))
    return reports


def plan(model: nn.Module, config: QuantConfig) -> dict[str, str]:
    """Path of every nn.Linear -> why it stays as it is, or "" if it will be quantized.

    Raises:
        ValueError: if all of them would stay.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def reason(path: str, linear: nn.Linear) -> str:
        if id(linear.weight) in embeddings:
            return "shares the embedding's weight"
        return "named in skip" if config.skips(path) else ""

    reasons = {path: reason(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if all(reasons.values()):
        raise ValueError("nothing to quantize: the model has no linear layer that is not skipped")
    return reasons


def dequantize_model(model: nn.Module, kind: type[QuantizedLinear] = QuantizedLinear) -> list[str]:
    """Replace every quantized linear layer by an ordinary nn.Linear with the decoded weight, in place.

    With 4 bits the outputs stay the same to the bit: the decoded values are those the layer multiplies with (unless it
    computes in another dtype than its surroundings: the plain layer has no such setting). It trades
    memory (4x at 16 bit) for not decoding at every token, which is what slows generation down on a CPU. With int8 the
    outputs change, since the rounding of the activations goes away.

    Args:
        model: any module tree.
        kind: which layers: all, or only Linear4bit or Linear8bit.

    Returns:
        names of the replaced modules.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    for name, layer in layers:
        model.set_submodule(name, layer.plain())
    return [name for name, _ in layers]


def format_report(reports: list[LayerReport]) -> str:
    """The reports and their total as aligned text."""
    lines = [("layer", "shape", "format", "bytes before", "after", "relative error")]
    lines += [
        (r.path, f"{r.shape[0]} x {r.shape[1]}", r.format or f"kept: {r.reason}", f"{r.bytes_before:,}",
         f"{r.bytes_after:,}", f"{r.error:.4f}" if r.format else "")
        for r in reports
    ]  # fmt: skip
    before, after = sum(r.bytes_before for r in reports), sum(r.bytes_after for r in reports)
    lines.append(("total", "", "", f"{before:,}", f"{after:,}", ""))
    widths = [max(len(line[i]) for line in lines) for i in range(6)]

    def aligned(line: tuple[str, ...]) -> str:
        cells = [v.rjust(w) if i > 2 else v.ljust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join(map(aligned, lines))


def relative_error(original: Tensor, decoded: Tensor) -> float:
    """Root mean square of the difference over that of the original; 0 for a zero tensor."""
    scale = original.float().square().mean().sqrt()
    difference = (decoded.float() - original.float()).square().mean().sqrt()
    return float(difference / scale) if scale > 0 else 0.0
