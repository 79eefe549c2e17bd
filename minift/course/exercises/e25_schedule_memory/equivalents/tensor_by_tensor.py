"""Walks through the model one tensor at a time; the schedule with min and max instead of cases."""

from math import cos, pi


def lr_at(step, peak, floor, warmup, total):
    done = min(step + 1, total)
    if done <= warmup and step < total:
        return peak * (done / warmup)
    falling = (done - warmup) / max(total - warmup, 1) if step < total else 1.0
    return floor + 0.5 * (peak - floor) * (1 + cos(pi * falling))


def nf4_bytes(out_features, in_features):
    size, scales = divmod(out_features * in_features, 64)
    scales = size + bool(scales)
    return -(-out_features * in_features // 2) + scales - (-scales // 256) * 4 + 4


def tensors(model):
    d = model["width"]
    head = d // model["heads"]
    yield "embed", model["vocab"], d
    for _ in range(model["layers"]):
        yield "norm", 1, d
        yield "linear", model["heads"] * head, d
        yield "linear", model["kv_heads"] * head, d
        yield "linear", model["kv_heads"] * head, d
        yield "linear", d, model["heads"] * head
        yield "norm", 1, d
        yield "linear", model["mlp"], d
        yield "linear", model["mlp"], d
        yield "linear", d, model["mlp"]
    yield "norm", 1, d
    if not model["tied"]:
        yield "head", model["vocab"], d


def estimate(model, method, r=16):
    weights = gradients = 0
    for kind, rows, columns in tensors(model):
        if method == "qlora" and kind == "linear":
            weights += nf4_bytes(rows, columns)
        else:
            weights += rows * columns * 2
        if method == "full":
            gradients += rows * columns * 4
        elif kind == "linear":
            weights += (rows + columns) * r * 4
            gradients += (rows + columns) * r * 4
    optimizer = gradients * 2
    gib = (weights + gradients + optimizer) / (1 << 30)
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "gib": gib}
