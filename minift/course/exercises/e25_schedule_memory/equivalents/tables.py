"""A list of all rates by complex rotation; memory as a table of rows (count, bytes each)."""

import cmath


def lr_at(step, peak, floor, warmup, total):
    rates = [peak * i / warmup for i in range(1, warmup + 1)]
    for i in range(1, total - warmup + 1):
        share = (1 + cmath.exp(1j * cmath.pi * i / (total - warmup)).real) / 2
        rates.append(peak * share + floor * (1 - share))
    return rates[step] if step < len(rates) else floor


def nf4_bytes(out_features, in_features):
    n = out_features * in_features
    blocks = (n + 63) // 64
    return (n + 1) // 2 + blocks + (blocks + 255) // 256 * 4 + 4


def estimate(model, method, r=16):
    d, f = model["width"], model["mlp"]
    kv = model["kv_heads"] * d // model["heads"]
    pairs = {(d, d): 2, (kv, d): 2, (f, d): 2, (d, f): 1}
    if kv == d:
        pairs[(d, d)] = 4
    layers = model["layers"]
    outside = model["vocab"] * d * (1 if model["tied"] else 2) + d + 2 * d * layers
    inside = layers * sum(many * out * into for (out, into), many in pairs.items())
    adapters = layers * sum(many * r * (out + into) for (out, into), many in pairs.items())
    four_bit = layers * sum(many * nf4_bytes(*pair) for pair, many in pairs.items())
    trained = inside + outside if method == "full" else adapters
    weights = {
        "full": 2 * (inside + outside),
        "lora": 2 * (inside + outside) + 4 * adapters,
        "qlora": four_bit + 2 * outside + 4 * adapters,
    }[method]
    found = {"weights": weights, "gradients": 4 * trained, "optimizer": 8 * trained}
    return found | {"gib": sum(found.values()) / 1024 / 1024 / 1024}
