"""e25 Cosine schedule and memory estimate: the rate of every step, and where the bytes go."""

import math


def lr_at(step: int, peak: float, floor: float, warmup: int, total: int) -> float:
    """The learning rate of update number `step`, counted from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if step >= total:
        return floor
    progress = (step + 1 - warmup) / (total - warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def nf4_bytes(out_features: int, in_features: int) -> int:
    """Bytes of a matrix in NF4 with double quantization."""
    count = out_features * in_features
    packed = math.ceil(count / 2)
    absmax = math.ceil(count / 64)
    nested = math.ceil(absmax / 256)
    return packed + absmax + 4 * nested + 4


def estimate(model: dict, method: str, r: int = 16) -> dict:
    """Bytes of weights, gradients and optimizer state when `model` is trained by "full", "lora" or "qlora"."""
    width, mlp, layers = model["width"], model["mlp"], model["layers"]
    narrow = width // model["heads"] * model["kv_heads"]
    layer = [(width, width), (narrow, width), (narrow, width), (width, width)]
    layer += [(mlp, width), (mlp, width), (width, mlp)]
    tables = 1 if model["tied"] else 2
    rest = tables * model["vocab"] * width + (2 * layers + 1) * width
    linear = layers * sum(rows * columns for rows, columns in layer)

    if method == "full":
        trained = linear + rest
        weights = 2 * trained
    else:
        trained = layers * sum(r * (rows + columns) for rows, columns in layer)
        base = 2 * linear
        if method == "qlora":
            base = layers * sum(nf4_bytes(rows, columns) for rows, columns in layer)
        weights = base + 2 * rest + 4 * trained
    gradients, optimizer = 4 * trained, 8 * trained
    total = weights + gradients + optimizer
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "gib": total / 2**30}
