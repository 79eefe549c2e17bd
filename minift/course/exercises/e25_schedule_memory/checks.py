"""e25: the cosine by its half angle, bytes of bitsandbytes, sizes of transformers, meta tensors that are counted."""

import math

import torch

from minift.course.spec import Case, check

# cos and cos^2 of the half angle differ by a few roundings of float64 on numbers of size 1.
RTOL = 64 * torch.finfo(torch.float64).eps

# bitsandbytes 0.50.2: quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=True), the nbytes of the
# codes, absmax, state2.absmax and offset together.
NF4_BYTES = {
    (3, 5): 17, (37, 19): 371, (72, 88): 3275, (130, 72): 4835, (129, 128): 8526, (576, 192): 57056,
    (4096, 4096): 8654852, (11008, 4096): 23259908,
}  # fmt: skip

# meta-llama/Llama-2-7b and HuggingFaceTB/SmolLM2-135M: numbers of parameters of transformers 5.23's LlamaForCausalLM on
# the meta device, of peft's adapters on all linear layers, bytes of bitsandbytes for the quantized matrices.
LLAMA = {"vocab": 32000, "width": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "mlp": 11008, "tied": False}
SMOL = {"vocab": 49152, "width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "mlp": 1536, "tied": True}
LLAMA_PARAMETERS, LLAMA_LINEAR, LLAMA_ADAPTERS_16, LLAMA_NF4 = 6738415616, 6476005376, 39976960, 3340772224
SMOL_PARAMETERS, SMOL_LINEAR, SMOL_ADAPTERS_8, SMOL_NF4 = 134515008, 106168320, 2442240, 54770040


def pick(draw, low, high):
    """A whole number from low to high."""
    return int(torch.randint(low, high + 1, (1,), generator=draw))


def rates(draw):
    peak = 10.0 ** -pick(draw, 2, 5) * pick(draw, 3, 9)
    return peak, peak / pick(draw, 5, 20)


def lr_case(step, peak, floor, warmup, total, expect, about):
    given = {"step": step, "peak": peak, "floor": floor, "warmup": warmup, "total": total}
    return Case("lr_at", given, expect, rtol=RTOL, about=f"step {step} of {total}, warmup {warmup}: {about}")


@check(points=1)
def straight_up(draw):
    """The warm-up is a straight line from its first share at step 0 to the peak at its last step, and may be empty."""
    peak, floor = rates(draw)
    warmup = pick(draw, 5, 12)
    total = warmup + pick(draw, 20, 60)
    for step in (0, 1, warmup - 2, warmup - 1):
        yield lr_case(step, peak, floor, warmup, total, peak * (step + 1) / warmup, "on the way up")
    yield lr_case(0, peak, floor, 1, total, peak, "a warm-up of one step")
    down = floor + (peak - floor) * math.cos(math.pi / 2 / total) ** 2
    yield lr_case(0, peak, floor, 0, total, down, "no warm-up")
    yield lr_case(4, peak, floor, 5, 5, peak, "nothing but warm-up")
    yield lr_case(5, peak, floor, 5, 5, floor, "nothing but warm-up, and past it")


@check(points=1)
def down_the_cosine(draw):
    """After the warm-up the rate falls along half a cosine, reaches floor at the last step and stays there."""
    peak, floor = rates(draw)
    warmup, quarter = pick(draw, 3, 9), pick(draw, 5, 15)
    total = warmup + 8 * quarter
    for share, about in ((3, "3/8 of the way down"), (4, "half way down"), (7, "7/8 of the way down")):
        rate = floor + (peak - floor) * math.cos(math.pi * share / 16) ** 2
        yield lr_case(warmup + share * quarter - 1, peak, floor, warmup, total, rate, about)
    for step in (warmup, warmup + 1):
        rate = floor + (peak - floor) * math.cos(math.pi / 2 * (step + 1 - warmup) / (total - warmup)) ** 2
        yield lr_case(step, peak, floor, warmup, total, rate, "just after the peak")
    yield lr_case(total - 1, peak, floor, warmup, total, floor, "the last step")
    yield lr_case(total, peak, floor, warmup, total, floor, "one past the end")
    yield lr_case(total + 9, peak, floor, warmup, total, floor, "ten past the end")


@check(points=1)
def four_bits_and_a_bit(draw):
    """The bytes of a matrix in NF4 with double quantization are those of bitsandbytes, of odd sizes, too."""
    for (rows, columns), expect in NF4_BYTES.items():
        yield Case("nf4_bytes", {"out_features": rows, "in_features": columns}, expect, about=f"{rows} x {columns}")
    rows, columns = pick(draw, 100, 300), pick(draw, 301, 600)
    given = {"out_features": rows, "in_features": columns}
    yield Case("nf4_bytes", given, nf4_size(rows, columns), about=f"{rows} x {columns}")


def nf4_size(rows, columns):
    """Counted, block by block."""
    absmax = range(0, rows * columns, 64)
    return len(range(0, rows * columns, 2)) + len(absmax) + 4 * len(range(0, len(absmax), 256)) + 4


def shapes(model):
    """Shapes of the seven matrices of every layer, and of everything else."""
    width, kv = model["width"], model["kv_heads"] * (model["width"] // model["heads"])
    seven = [(width, width), (kv, width), (kv, width), (width, width),
             (model["mlp"], width), (model["mlp"], width), (width, model["mlp"])]  # fmt: skip
    others = [(model["vocab"], width)] * (2 - model["tied"]) + [(width,)] * (2 * model["layers"] + 1)
    return seven * model["layers"], others


def nbytes(shape_list, dtype):
    return sum(torch.empty(shape, dtype=dtype, device="meta").nbytes for shape in shape_list)


def answer(weights, trained_bytes):
    total = weights + 3 * trained_bytes
    return {"weights": weights, "gradients": trained_bytes, "optimizer": 2 * trained_bytes, "gib": total / 1024**3}


def counted(model, method, r):
    """The answer, by making every tensor on the meta device."""
    seven, others = shapes(model)
    if method == "full":
        return answer(nbytes(seven + others, torch.bfloat16), nbytes(seven + others, torch.float32))
    adapters = nbytes([(r, columns) for _, columns in seven] + [(rows, r) for rows, _ in seven], torch.float32)
    base = nbytes(seven, torch.bfloat16) if method == "lora" else sum(nf4_size(*shape) for shape in seven)
    return answer(base + nbytes(others, torch.bfloat16) + adapters, adapters)


def known(parameters, linear, adapters, nf4, method):
    """The answer, from recorded numbers."""
    if method == "full":
        return answer(2 * parameters, 4 * parameters)
    base = 2 * linear if method == "lora" else nf4
    return answer(base + 2 * (parameters - linear) + 4 * adapters, 4 * adapters)


def small_model(draw, tied):
    kv_heads = pick(draw, 2, 3)
    heads, head_width = kv_heads * pick(draw, 2, 3), pick(draw, 5, 9)
    return {
        "vocab": pick(draw, 500, 900), "width": heads * head_width, "layers": pick(draw, 3, 5), "heads": heads,
        "kv_heads": kv_heads, "mlp": pick(draw, 100, 200), "tied": tied,
    }  # fmt: skip


def estimate_case(model, method, r, expect, name):
    given = {"model": model, "method": method} | ({} if r is None else {"r": r})
    about = f"{name}, {method}{'' if r is None else f', r {r}'}"
    return Case("estimate", given, expect, rtol=RTOL, about=about)


@check(points=1)
def what_is_trained(draw):
    """Gradients and optimizer state belong to what is trained: everything, or the adapters; a tied head counts once."""
    for tied in (False, True):
        model, r = small_model(draw, tied), pick(draw, 3, 12)
        name = f"a small model with {'a tied' if tied else 'its own'} head"
        yield estimate_case(model, "full", r, counted(model, "full", r), name)
        yield estimate_case(model, "lora", r, counted(model, "lora", r), name)
    llama = LLAMA_PARAMETERS, LLAMA_LINEAR, LLAMA_ADAPTERS_16, LLAMA_NF4
    yield estimate_case(LLAMA, "full", None, known(*llama, "full"), "7B")
    yield estimate_case(LLAMA, "lora", None, known(*llama, "lora"), "7B, the default r")


@check(points=1)
def what_is_quantized(draw):
    """With qlora the seven matrices of every layer are NF4 with their scales, and nothing else is."""
    llama = LLAMA_PARAMETERS, LLAMA_LINEAR, LLAMA_ADAPTERS_16, LLAMA_NF4
    yield estimate_case(LLAMA, "qlora", 16, known(*llama, "qlora"), "7B")
    smol = SMOL_PARAMETERS, SMOL_LINEAR, SMOL_ADAPTERS_8, SMOL_NF4
    yield estimate_case(SMOL, "qlora", 8, known(*smol, "qlora"), "135M, tied")
    model, r = small_model(draw, False), pick(draw, 3, 12)
    yield estimate_case(model, "qlora", r, counted(model, "qlora", r), "a small model")
