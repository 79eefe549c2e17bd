"""The memory formulas of the book (chapter 5), its figures as numbers, and where they are wrong.

    mem_total = mem_model + (mem_batch + mem_act) + mem_grad + mem_optim                                        eq 5.1
    mem_model = 12 L h^2         mem_act = L (alpha h b s + beta n_heads b s^2)                                 eq 5.7
                                 alpha = 34; beta = 5 if attention stores its scores, else 0                    eq 5.8

    mem_act / mem_model = [3 s/h + n_heads/2 (s/h)^2] p_comp / p_model       b = 1, 34/12 ~ 3, 5/12 ~ 1/2  eq 5.2, 5.9a
                        = 3 (s/h) p_comp / p_model                           scores not stored             eq 5.4, 5.9b

with L layers, width h, b rows of s tokens, and p bytes of a number in compute and in the model. The figures (gpu_ram-*)
draw a model of 360 M parameters in squares of 20 MB; `ram_figure` computes every one of them.

`catches` lists what does not hold, with both values. The heaviest: 34 is already a number of *bytes*, of 16-bit
activations, so multiplying by p_comp counts them twice; and the logits are missing, which lead as soon as activations
are computed again. `activation_bytes` is the same formula put right, with its constants measured from the book's own
tables (book_tables.py); `minift.study.ledger` counts tensor by tensor instead.

Sources: D. Voigt Godoy, A Hands-On Guide to Fine-Tuning LLMs, chapter 5, figures CC BY 4.0; Reducing Activation
Recomputation in Large Transformer Models, arXiv 2205.05198, for 34 and 5.
"""

from dataclasses import dataclass

import torch

from minift.study.book_tables import MB, ablation

SQUARE = 20 * MB
PARAMETERS = 360 * 10**6  # of the model in the figures
ALPHA, BETA = 34, 5
# What shrinks which term (eq 5.6).
TECHNIQUES = {
    "mem_model": ("quantization",),
    "mem_batch": ("gradient accumulation",),
    "mem_act": ("gradient checkpointing", "flash attention"),
    "mem_grad": ("LoRA", "gradient accumulation"),
    "mem_optim": ("LoRA", "8-bit paged optimizer", "gradient accumulation"),
}
OPT_PARAMETERS, OPT_IN_LINEARS = 331_196_416, 303_038_464  # of opt-350m, the model of the tables


# --- the equations ----------------------------------------------------------------------------------------------------


def total(model: float, batch: float, activations: float, gradients: float, optimizer: float) -> float:
    """Eq 5.1."""
    return model + (batch + activations) + gradients + optimizer


def effective_batch(micro_batch: int, accumulation_steps: int) -> int:
    """Eq 5.5: rows of an optimizer step."""
    return micro_batch * accumulation_steps


def model_count(layers: int, h: int) -> int:
    """Eq 5.7: 4 h^2 parameters of attention and 8 h^2 of an MLP of width 4 h, in each layer."""
    return layers * 12 * h**2


def activation_count(
    layers: int, h: int, heads: int, b: int, s: int, alpha: float = ALPHA, beta: float = BETA
) -> float:
    """Eq 5.7 with the constants of eq 5.8; beta = 0 if scores are not stored."""
    return layers * (alpha * h * b * s + beta * heads * b * s**2)


def activation_ratio(
    s: int, h: int, heads: int, p_comp: float, p_model: float, eager: bool = True, rounded: bool = True
) -> float:
    """Activations in units of the model's weights, one row.

    Args:
        eager: eq 5.2 if scores are stored, eq 5.4 if not.
        rounded: with 3 and 1/2 as printed; False: with 34/12 and 5/12, the derivation of eq 5.9 before it is rounded.
    """
    linear, square = (3, 0.5) if rounded else (ALPHA / 12, BETA / 12)
    return (linear * s / h + (square * heads * (s / h) ** 2 if eager else 0)) * p_comp / p_model


def worked_example() -> dict[str, float]:
    """Eq 5.3: 500 tokens, h = 2048, 16 heads, 16-bit activations, 18 squares of int8 weights; in squares."""

    def of(s: float, rounded: bool) -> float:
        return 18 * activation_ratio(s, 2048, 16, 16, 8, rounded=rounded)  # pyright: ignore[reportArgumentType]

    return {
        "as printed, 500/2048 taken as 1/4": of(512, True),
        "not rounded": of(500, True),
        "34/12, 5/12": of(500, False),
    }


# --- the figures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a stack: bytes, and whether it is one of alternatives (`choice`), of which a total takes one."""

    name: str
    bytes: float
    choice: bool = False

    @property
    def squares(self) -> float:
        return self.bytes / SQUARE


WEIGHTS = (Part("weights NF4", 0.5 * PARAMETERS, True), Part("weights INT8", PARAMETERS, True),
           Part("weights FP16", 2.0 * PARAMETERS, True))  # fmt: skip
TRAINED_BY_LORA = 10 * MB  # one square of 16-bit gradients: 2.8 % of the model
EAGER = "only if eager"
FIGURES = ("no_lora", "8bit_adam", "lora", "lora_s", "lora_short_s")


def ram_figure(name: str) -> list[Part]:
    """The parts of a figure of the book, computed from 360 M parameters.

    Args:
        name: "no_lora", "8bit_adam", "lora" (weights in INT8 from here on), "lora_s" (with activations, as many tokens
            as the model is wide), "lora_short_s" (a quarter as many).

    Raises:
        ValueError: another name.
    """
    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}: choose one of {', '.join(FIGURES)}")
    n = PARAMETERS if name in ("no_lora", "8bit_adam") else TRAINED_BY_LORA
    moment, kind = (1, "INT8") if name == "8bit_adam" else (4, "FP32")
    states = [Part("gradients FP16", 2 * n), Part("weight copy FP32", 4 * n),
              Part(f"mean {kind}", moment * n), Part(f"variance {kind}", moment * n)]  # fmt: skip
    if n == PARAMETERS:
        return [*WEIGHTS, *states]
    stack = [Part("weights INT8", PARAMETERS), *states]
    if name == "lora":
        return stack
    s = 1024 if name == "lora_s" else 256  # of a width of 1024; only the ratio counts
    flash = PARAMETERS * activation_ratio(s, 1024, 16, 16, 8, eager=False)
    eager = PARAMETERS * activation_ratio(s, 1024, 16, 16, 8)
    return [*stack, Part("activations FP16", flash), Part(EAGER, eager - flash)]


def corrected_figure(name: str) -> list[Part]:
    """The parts of the same figure as they are needed: what the tables and the libraries say, in the same order.

    Quantized weights and 8-bit states with their scales (NF4 with double quantization, int8 with 4 bytes a row of 1024,
    states with 4 bytes for 256). Adapters in fp32 as PEFT and minift hold them, and so their gradients, with no copy.
    Activations of 34 bytes a token, layer and feature, 8 a score, 8 a logit (`activation_bytes`), of a model 1024 wide
    with OPT's 50272 words.

    Raises:
        ValueError: another name.
    """
    scales = {
        "weights NF4": (1 + 4 / 256) / 32,
        "weights INT8": 4 / 1024,
        "mean INT8": 4 / 256,
        "variance INT8": 4 / 256,
    }
    parts = [Part(part.name, part.bytes * (1 + scales.get(part.name, 0)), part.choice) for part in ram_figure(name)]
    if name in ("no_lora", "8bit_adam"):
        return parts
    n = TRAINED_BY_LORA
    stack = [parts[0], *(Part(f"{what} FP32", 4 * n) for what in ("adapters", "gradients", "mean", "variance"))]
    if name == "lora":
        return stack
    s, h = 1024 if name == "lora_s" else 256, 1024
    linear, scores = PARAMETERS * ALPHA / 12 * s / h, PARAMETERS * 8 * 16 / 12 * (s / h) ** 2
    return [*stack, Part("activations FP16", linear), Part("logits FP32+FP16", 8 * s * 50272), Part(EAGER, scores)]


def stack_bytes(parts: list[Part], choice: str = "weights FP16", eager: bool = True) -> float:
    """Sum of a figure, with one of its alternatives."""
    chosen = (part for part in parts if not part.choice or part.name == choice)
    return sum(part.bytes for part in chosen if eager or part.name != EAGER)


# --- what the tables say against the formulas -------------------------------------------------------------------------


def activation_bytes(
    layers: int, h: int, heads: int, vocabulary: int, tokens: int, checkpointing: bool = False, eager: bool = False
) -> float:
    """The formula put right: bytes of 16-bit activations of one row, logits included.

        L s (34 h  or  2 h with checkpointing) + 8 n_heads s^2 (L, or 1 with checkpointing) + 8 s v

    2 h is the input of a block; one block that is computed again is 34 h s and its scores. 8 bytes a score are what
    transformers' eager attention holds, which takes the softmax in fp32; 8 a logit are fp32 and two 16-bit copies.
    """
    blocks = layers * 2 * h * tokens + 34 * h * tokens if checkpointing else layers * 34 * h * tokens
    scores = 8 * heads * tokens**2 * (1 if checkpointing else layers) if eager else 0
    return blocks + scores + 8 * tokens * vocabulary


@dataclass(frozen=True)
class Catch:
    """Something in the book that does not hold: its value, the right one, and why."""

    number: int
    what: str
    book: float
    better: float
    unit: str
    why: str


def catches() -> list[Catch]:
    """The six of them, computed."""
    layers, h, heads, vocabulary = 24, 1024, 16, 50272
    long = ablation(2000, False, True)
    short_again, long_again = (ablation(s, True, True) for s in (500, 2000))
    alpha = (long.sdpa - long_again.sdpa) * MB / (layers * h * 2000)
    beta = (long.eager - long.sdpa) * MB / (layers * heads * 2000**2)
    grown = (long_again.sdpa - short_again.sdpa) * MB / 1500
    logit = (grown - 2 * layers * h) / vocabulary
    eager = stack_bytes(ram_figure("lora_s")) - stack_bytes(ram_figure("lora"))
    in_bytes = PARAMETERS * (ALPHA + BETA * heads) / 12
    adam = ablation(500, False, False).sdpa * MB / OPT_PARAMETERS
    footprint = OPT_IN_LINEARS / 2 + 4 * (OPT_PARAMETERS - OPT_IN_LINEARS)
    state = OPT_IN_LINEARS / 64 + 4 * OPT_IN_LINEARS / (64 * 256)
    half = torch.tensor(0.33669, dtype=torch.float16)
    return [
        Catch(1, "stochastic rounding figures: 10^6 x the first weight", 336690.0, (half * 10.0**6).item(), "as run",
              "their code sets fp16 as the default, where 65504 is the end: six and seven decimals are infinite from "
              "the first step on. What is printed comes out in fp32"),
        Catch(2, "activations in figure lora_s", eager / MB, in_bytes / MB, "MB",
              "alpha = 34 and beta = 5 are bytes of 16-bit activations already; the book multiplies them by 2 bytes. "
              f"Its own tables say {alpha:.1f} bytes a token, layer and feature without checkpointing, not 68"),
        Catch(3, "beta, of transformers' eager attention", float(BETA), beta, "bytes a score",
              "which fits a softmax in fp32 that is kept beside its 16-bit copies"),
        Catch(4, "memory that grows with a token, checkpointing on", 2.0 * layers * h / 1e3, grown / 1e3, "kB",
              f"the formulas leave out the logits: {logit:.1f} bytes for each of {vocabulary} words"),
        Catch(5, "full fine-tuning with Adam", 16.0, adam, "bytes a parameter",
              "the figure has fp32 copies of weights and fp32 states; what the table measured fits states in 16 bits "
              "and no copy, so neither describes the other"),
        Catch(6, "footprint of opt-350m in NF4", footprint / MB, (footprint + state) / MB, "MB",
              "get_memory_footprint leaves out quantization state: a byte for 64 weights, and 4 for 256 of those"),
    ]  # fmt: skip


def format_catches() -> str:
    """`catches` as text."""
    return "\n".join(
        f"{c.number}. {c.what}: {c.book:,.2f} in the book, {c.better:,.2f} {c.unit}".rstrip() + f"\n   {c.why}."
        for c in catches()
    )
