"""Equations 3.1 to 3.4 and 5.1 to 5.11 of the book, each beside the function that evaluates it and its worked numbers.

    number    formula                            evaluated by                        worked
    3.4       y = x W^T + (alpha / r) x (BA)^T   minift.study.lora                   -0.4097 in the book, -0.4097 here
    5.3       18 [3 s/h + n/2 (s/h)^2] 16/8      minift.study.book_memory            45 squares, 43.53 if not rounded
    5.10      softmax(Q K^T / sqrt(d_k)) V       minift.study.attention, or here     1,048,576 scores of 256 tokens

A formula is only as good as the numbers that come out of it: wherever the book prints one, it is computed again when a
sheet is made, and both stand side by side; a number that the book does not have is given alone. `differs` says where
the two are further apart than the digits that are printed.

A notebook shows a sheet as rendered formulas; `print` gives the LaTeX. Formulas are written so that matplotlib can draw
them, too (plots/equations.py).

Source: D. Voigt Godoy, A Hands-On Guide to Fine-Tuning LLMs, chapters 3 and 5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from minift.model.config import ModelConfig
from minift.study.attention import element_counts, multi_head_attention, scaling_study
from minift.study.book_memory import (
    ALPHA,
    BETA,
    OPT_IN_LINEARS,
    TECHNIQUES,
    activation_count,
    activation_ratio,
    catches,
    effective_batch,
    model_count,
    ram_figure,
    total,
    worked_example,
)
from minift.study.book_tables import MB, ablation
from minift.study.ledger import predict
from minift.study.lora import bottleneck, merged_weight, scaled_bottleneck, two_products
from minift.study.setting import Setting


@dataclass(frozen=True)
class Worked:
    """A number of the book, and the same computed here.

    Attributes:
        book: None where it prints none.
        digits: how far the two may be apart: half of the book's last digit, or what chance allows.
    """

    what: str
    book: float | None
    here: float
    digits: float = 0.0

    @property
    def differs(self) -> bool:
        return self.book is not None and abs(self.book - self.here) > self.digits

    def numbers(self) -> tuple[str, str]:
        """The book's and ours in a few digits."""
        return _number(self.book), _number(self.here)


@dataclass(frozen=True)
class Equation:
    """A numbered formula of the book.

    Attributes:
        lines: LaTeX, one formula each, in what matplotlib's mathtext understands of it.
        says: in words.
        evaluated_by: the functions that compute it.
        remark: what does not hold, or is easily overlooked.
    """

    number: str
    says: str
    lines: tuple[str, ...]
    evaluated_by: tuple[Callable, ...]
    worked: tuple[Worked, ...]
    remark: str = ""

    def __repr__(self) -> str:
        names = ", ".join(f"{f.__module__}.{f.__qualname__}" for f in self.evaluated_by)
        rows = [f"    {w.what}: {w.numbers()[0]} in the book, {w.numbers()[1]} here" for w in self.worked]
        text = [f"{self.number}  {self.says}", *(f"    {line}" for line in self.lines), f"    = {names}", *rows]
        return "\n".join([*text, *([f"    {self.remark}"] if self.remark else [])])

    def _repr_markdown_(self) -> str:
        names = ", ".join(f"`{f.__qualname__}`" for f in self.evaluated_by)
        text = [f"**{self.number}** {self.says}: {names}", *(f"$${line}$$" for line in self.lines)]
        if self.worked:
            rows = [f"| {w.what} | {' | '.join(w.numbers())}{' (differs)' * w.differs} |" for w in self.worked]
            text.append("\n".join(["| worked | book | here |", "| :-- | --: | --: |", *rows]))
        return "\n\n".join([*text, *([f"*{self.remark}*"] if self.remark else [])])


@dataclass(frozen=True)
class Sheet:
    """Equations, one below the other."""

    equations: tuple[Equation, ...]

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self.equations))

    def _repr_markdown_(self) -> str:
        return "\n\n".join(equation._repr_markdown_() for equation in self.equations)


def sheet(*numbers: str) -> Sheet:
    """The equations with these numbers, or whose numbers begin with them ("3", "5.9"); all without any.

    Raises:
        ValueError: no equation has such a number.
    """
    known = equations()
    for number in numbers:
        if not any(_belongs(name, number) for name in known):
            raise ValueError(f"no equation {number}: choose of {', '.join(known)}")
    return Sheet(tuple(e for name, e in known.items() if not numbers or any(_belongs(name, n) for n in numbers)))


def _belongs(name: str, wanted: str) -> bool:
    return name == wanted or name.split(".")[0] == wanted or name.rstrip("ab") == wanted


@cache
def equations() -> dict[str, Equation]:
    """All of them by number, in the book's order, with every worked number computed."""
    found = {equation.number: equation for equation in (*_lora(), *_memory(), *_activations(), *_attention())}
    return {name: found[name] for name in sorted(found, key=lambda name: (name[0], _place(name), name))}


def _place(name: str) -> int:
    """5.9a -> 9."""
    return int(name.rstrip("ab").split(".")[1])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.5g}"


# --- functions for what no other module evaluates ---------------------------------------------------------------------


def attention(q_se: Tensor, k_te: Tensor, v_te: Tensor) -> Tensor:
    """Eq 5.10 as it is written, [s, e]: one head, nothing masked."""
    return (q_se @ k_te.T / q_se.shape[-1] ** 0.5).softmax(-1) @ v_te


def head_dim(d_model: int, heads: int) -> int:
    """Eq 5.11.

    Raises:
        ValueError: not a whole number.
    """
    if heads < 1 or d_model % heads:
        raise ValueError(f"a width of {d_model} cannot be cut into {heads} heads; choose a divisor of {d_model}")
    return d_model // heads


def terms_shrunk_by(technique: str) -> list[str]:
    """Eq 5.6: the terms under which the book writes a technique.

    Raises:
        ValueError: a technique that it does not name.
    """
    found = [term for term, techniques in TECHNIQUES.items() if technique in techniques]
    if not found:
        names = sorted({name for techniques in TECHNIQUES.values() for name in techniques})
        raise ValueError(f"unknown technique {technique!r}: choose one of {', '.join(names)}")
    return found


# --- chapter 3 --------------------------------------------------------------------------------------------------------


def lora_example() -> tuple[Tensor, Tensor, Tensor]:
    """x [1, 1024], A [8, 1024] and B [1024, 8] of the book's example, drawn as there (seeds 11 and 19)."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(11)
        a, b = nn.Linear(1024, 8, bias=False).weight, nn.Linear(8, 1024, bias=False).weight
        torch.manual_seed(19)
        return torch.randn(1, 1024), a.detach(), b.detach()


# The first and the last number that the frozen layer gives in the book, which draws its weights without a seed.
FROZEN = (-0.3383, 0.0186)
PRINTED = 5e-5  # half of the fourth decimal


def _lora() -> list[Equation]:
    x, a, b = lora_example()
    none = torch.zeros(1024, 1024)
    merged, twice = merged_weight(x, none, a, b), two_products(x, none, a, b)
    chained, scaled = bottleneck(x, none, a, b), scaled_bottleneck(x, none, a, b, 16)
    rank = int(torch.linalg.matrix_rank(b @ a))
    base, low = none.numel(), a.numel() + b.numel()
    ends = [(0, "first"), (-1, "last")]

    def outputs(change: Tensor, printed: tuple[float, float]) -> list[Worked]:
        """With the book's own output of the frozen layer, which is rounded, too."""
        return [Worked(f"{name} output", book, FROZEN[i] + change[0, i].item(), 2 * PRINTED)
                for (i, name), book in zip(ends, printed, strict=True)]  # fmt: skip

    def additional(change: Tensor) -> list[Worked]:
        return [Worked(f"{name} additional output", book, change[0, i].item(), PRINTED)
                for (i, name), book in zip(ends, (-0.0357, 0.5041), strict=True)]  # fmt: skip

    counts = [Worked("numbers in W", 1_048_576, base), Worked("numbers in A and B", 16_384, low),
              Worked("rank of BA", 8, rank)]  # fmt: skip
    return [
        Equation("3.1", "The change added to the weight", (r"y = x\,(W + BA)^T",), (merged_weight,),
                 (*counts, *outputs(merged, (-0.3740, 0.5227)))),
        Equation("3.2", "Two products of full size", (r"y = x\,W^T + x\,(BA)^T",), (two_products,),
                 (*additional(twice), Worked("multiplications of x (BA)^T", None, base),)),
        Equation("3.3", "Through the bottleneck", (r"x\,(BA)^T = (x\,A^T)\,B^T",), (bottleneck,),
                 (*additional(chained), Worked("multiplications", None, low))),
        Equation("3.4", "Scaled, so that the rank can be changed alone",
                 (r"y = x\,W^T + \dfrac{\alpha}{r}\,x\,(BA)^T",), (scaled_bottleneck,),
                 (Worked("alpha / r", 2, 16 / len(a)), *outputs(scaled, (-0.4097, 1.0268)))),
    ]  # fmt: skip


# --- chapter 5: what fills memory -------------------------------------------------------------------------------------


def _mem(what: str) -> str:
    return rf"\mathrm{{mem}}_{{\mathrm{{{what}}}}}"


def _under(below: str, above: str) -> str:
    name = below.replace(" ", r"\ ")
    return rf"\underset{{\mathrm{{{name}}}}}{{{above}}}"


TINY = ModelConfig.from_dict({
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
})  # fmt: skip


def _memory() -> list[Equation]:
    weights, gradients, *adam = [part.bytes for part in ram_figure("no_lora")][2:]
    states = [predict(Setting(TINY, 1, 16, accumulation=n)).parts for n in (1, 4)]
    held = [parts["gradients"] + parts["optimizer"] for parts in states]
    return [
        Equation("5.1", "Everything that a step holds", (
            rf"{_mem('total')} = {_under('stage 0', _mem('model'))}"
            rf" + {_under('stage 1', _mem('batch') + ' + ' + _mem('act'))}"
            rf" + {_under('stage 2', _mem('grad'))} + {_under('stage 3', _mem('optim'))}",), (total,),
            (Worked("360 M parameters, Adam, MB without activations", 5760,
                    total(weights, 0, 0, gradients, sum(adam)) / MB),),
            "The terms do not all have their largest size at one time, so the peak is less than their sum."),
        Equation("5.5", "Rows of an optimizer step", (
            r"\mathrm{batch}_{\mathrm{effective}} = \mathrm{batch}_{\mathrm{micro}} \cdot n_{\mathrm{accumulation}}",),
            (effective_batch,), (Worked("8 rows, accumulated twice", 16, effective_batch(8, 2)),)),
        Equation("5.6", "What shrinks which term", (
            rf"{_mem('total')} = {_under('quantization', _mem('model'))} + {_under('accumulation', _mem('batch'))}"
            rf" + {_under('checkpointing, flash', _mem('act'))}"
            rf" + {_under('LoRA, paged Adam, accumulation', _mem('grad') + ' + ' + _mem('optim'))}",),
            (terms_shrunk_by,),
            (Worked("gradients and states with accumulation, to those without", None, held[1] / held[0]),),
            "Accumulation shrinks the batch and its activations. Gradients and states stay as large as they are."),
    ]  # fmt: skip


# --- chapter 5: activations -------------------------------------------------------------------------------------------


def _activations() -> list[Equation]:
    found = {catch.number: catch.better for catch in catches()}
    worked = worked_example()
    eager, flash = (activation_ratio(1024, 1024, 16, 16, 8, eager=way) for way in (True, False))
    # The ratio with every activation as the bytes that alpha and beta say: weights of 8 bits, so p_comp is left out.
    bytes_once = 18 * activation_ratio(500, 2048, 16, 1, 1, rounded=False)
    own_width = 18 * activation_ratio(500, 1024, 16, 1, 1, rounded=False)
    ratio, p = rf"\dfrac{{{_mem('act')}}}{{{_mem('model')}}}", r"\dfrac{p_{\mathrm{comp}}}{p_{\mathrm{model}}}"
    n = r"n_{\mathrm{heads}}"
    rounded = rf"\left[3\,\dfrac{{s}}{{h}} + \dfrac{{1}}{{2}}\,{n}\left(\dfrac{{s}}{{h}}\right)^2\right] {p}"
    exact = rf"\left[\dfrac{{34\,b\,s}}{{12\,h}} + \dfrac{{5\,{n}\,b\,s^2}}{{12\,h^2}}\right] {p}"
    about = r"\;\underset{b=1}{\approx}\;"
    opt = activation_count(24, 1024, 16, 1, 500), activation_count(24, 1024, 16, 1, 500, beta=0)
    return [
        Equation("5.2", "Activations to weights, scores stored", (rf"{ratio} = {rounded}",), (activation_ratio,),
                 (Worked("s = h, 16 heads, 16 bits on 8: squares, of 18 of weights", 108 + 288, 18 * eager),),
                 "Counts times bytes of each; but 34 and 5 are bytes of 16-bit activations already: twice too much."),
        Equation("5.3", "The worked example: 500 tokens, 18 squares of 8-bit weights", (
                 rf"\dfrac{{{_mem('act')}}}{{18}} = \left[3\,\dfrac{{500}}{{2048}} + \dfrac{{1}}{{2}}\,16"
                 r"\left(\dfrac{500}{2048}\right)^2\right]\dfrac{16}{8}"
                 r" \approx \left[\dfrac{3}{4} + \dfrac{1}{2}\right] 2 = \dfrac{3}{2} + 1",
                 rf"{_mem('act')} = 18 \cdot \dfrac{{3}}{{2}} + 18 = 27 + 18 = 45"), (worked_example,),
                 (Worked("500/2048 taken as 1/4", 45, worked["as printed, 500/2048 taken as 1/4"]),
                  Worked("not rounded", 45, worked["not rounded"]),
                  Worked("34/12 and 5/12 not rounded either", 45, worked["34/12, 5/12"]),
                  Worked("and the bytes counted once", 45, bytes_once),
                  Worked("and the model's own width, 1024", 45, own_width)),
                 "2048 is the longest row of the model, not its width."),
        Equation("5.4", "Activations to weights, scores not stored", (rf"{ratio} = 3\,\dfrac{{s}}{{h}}\,{p}",),
                 (activation_ratio,), (Worked("s = h, 16 bits on 8: squares, of 18 of weights", 108, 18 * flash),)),
        Equation("5.7", "Numbers in the weights and in the activations", (
                 rf"{_mem('model')} = L\,12\,h^2",
                 rf"{_mem('act')} = L\left(\alpha\,h\,b\,s + \beta\,{n}\,b\,s^2\right)"),
                 (model_count, activation_count),
                 (Worked("OPT-350M, 24 layers of 1024: weights", None, model_count(24, 1024)),
                  Worked("weights of all its linear layers", None, OPT_IN_LINEARS)),
                 "12 h^2 fits blocks with an MLP of two matrices, 4 h wide. Embeddings, head and logits are left out."),
        Equation("5.8", "The constants", (
                 rf"\alpha = 34,\ \beta = 5:\quad {_mem('act')} = L\left(34\,h\,b\,s + 5\,{n}\,b\,s^2\right)",
                 rf"\alpha = 34,\ \beta = 0:\quad {_mem('act')} = L\,34\,h\,b\,s"), (activation_count,),
                 (Worked("alpha, as its tables measure it, bytes", ALPHA, _alpha(), 4),
                  Worked("beta, as they measure it, bytes", BETA, found[3]),
                  Worked("OPT-350M, one row of 500 tokens, eager: MB", None, opt[0] / MB),
                  Worked("not eager: MB", None, opt[1] / MB)),
                 "Bytes. transformers' eager attention holds 8 of a score; minift's 2, of 16 bits."),
        Equation("5.9a", "Where 5.2 comes from", (rf"{ratio} = {exact} {about} {rounded}",), (activation_ratio,),
                 (Worked("34/12", 3, ALPHA / 12), Worked("5/12", 0.5, BETA / 12))),
        Equation("5.9b", "Where 5.4 comes from", (
                 rf"{ratio} = \dfrac{{34\,b\,s}}{{12\,h}}\,{p} {about} 3\,\dfrac{{s}}{{h}}\,{p}",), (activation_ratio,),
                 (Worked("34/12", 3, ALPHA / 12),)),
    ]  # fmt: skip


def _alpha() -> float:
    """Bytes a token, layer and feature that checkpointing saves in the book's longest rows with LoRA."""
    saved = ablation(2000, False, True).sdpa - ablation(2000, True, True).sdpa
    return saved * MB / (24 * 1024 * 2000)


# --- chapter 5: attention ---------------------------------------------------------------------------------------------


def _attention() -> list[Equation]:
    counts = element_counts(1, 256, 1024, 16)
    spread = scaling_study(1024).raw.std
    return [
        Equation("5.10", "Attention of one head",
                 (r"\mathrm{Attention}(Q, K, V) = \mathrm{softmax}\left(\dfrac{Q K^T}{\sqrt{d_k}}\right) V",),
                 (attention, multi_head_attention),
                 (Worked("256 tokens, width 1024: numbers in Q", 262_144, counts["q_bhse"]),
                  Worked("numbers in the scores of 16 heads", 1_048_576, counts["scores_bhst"]),
                  # 1000 products there: their spread is known to 1 / sqrt(2000) of it, 0.7; twice that.
                  Worked("spread of q k for d_k = 1024, at random", 32.5935, spread, 1.5),
                  Worked("sqrt(d_k)", 32, 1024**0.5))),
        Equation("5.11", "Width of a head", (r"d_k = \dfrac{d_{\mathrm{model}}}{n_{\mathrm{heads}}}",), (head_dim,),
                 (Worked("1024 in 16 heads", 64, head_dim(1024, 16)),)),
    ]  # fmt: skip
