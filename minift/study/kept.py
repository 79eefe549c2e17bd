"""What a block keeps in memory from its forward pass until its backward pass.

A layer keeps what its own gradient needs, and nothing else:

    y = x W^T          dx = dy W needs W, which exists anyway; dW = dy^T x needs x, if W is trained
    y = x + (x A^T) B^T    needs x and t = x A^T of `rank` numbers a token (adapters/lora.py), whatever W is stored as
    n = x / rms(x)     needs x and one number a row; a trained weight w of w * n needs n, too
    a(gate) * up       needs gate and up (model/layers.py); the product is kept by `down`, if that needs its input
    attention          q, k, v; written out also all probabilities, fused only its output and one number a query

A tensor that two layers need is kept once. So what is trained decides: a frozen linear layer keeps nothing, one with
an adapter keeps its input, however few numbers the adapter has. That is why LoRA shrinks gradients and optimizer state,
but activations hardly.

Sizes are written as sums of products of these symbols, which `evaluate` multiplies out, so that the formula that is
printed is the one that was computed:

    b rows    s tokens a row    n = b s    d width    f MLP width    h query heads    g key/value heads    e head width
    v vocabulary    a bytes of a number (2 in bf16)    other numbers stand for themselves

and, where rows share a prefix that is computed once (model/attention.py): p tokens of the prefix, q rows, t tokens of
the longest rest of a row. Then n counts the prefix once; attention alone copies its keys and values to every row.

Left out: dropout of the adapters' input in the selective way of checkpointing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from torch import nn

from minift.adapters.lora import LoraLinear
from minift.model.layers import Block, RMSNorm, RMSNormPlusOne
from minift.quant.linear import Linear8bit, QuantizedLinear

SCORES = "attention scores"
ACTIVATIONS = "activations"
# Numbers of a table with a cell for each query and each key that it might see, by whether rows share a prefix.
PAIRS = {False: ("s s",), True: ("p p", "t p", "t t")}
ROW_PAIRS = {False: ("b s s",), True: ("p p", "q t p", "q t t")}


@dataclass(frozen=True)
class Kept:
    """One kept tensor, or several alike.

    Attributes:
        part: "attention" or "mlp": when it is freed; the backward pass takes the MLP first.
        what: in words.
        formula: bytes.
        category: "activations" or "attention scores".
        role: "input" of the block, which checkpointing keeps, too; "graph": held by the graph itself, which
            checkpointing does not free; "product": input of the MLP's last layer, freed before the widest moment.
    """

    part: str
    what: str
    formula: str
    category: str = ACTIVATIONS
    role: str = ""


def evaluate(formula: str, symbols: Mapping[str, int]) -> int:
    """The value of "2 n f a + 4 n"."""
    factors = (term.split() for term in formula.split(" + "))
    return sum(prod(symbols[f] if f in symbols else int(f) for f in term) for term in factors)


def times(formulas: Iterable[str], *factors: str) -> str:
    """The sum of the formulas, each multiplied by all factors."""
    return " + ".join(" ".join((formula, *factors)) for formula in formulas)


def needs_input(linear: nn.Module) -> bool:
    """Whether the gradient of a linear layer needs the layer's input."""
    if isinstance(linear, LoraLinear):  # an adapter with dropout reads, and keeps, another tensor
        return not _dropout(linear)
    return isinstance(linear, nn.Linear) and linear.weight.requires_grad


def is_adapted(linear: nn.Module) -> bool:
    return isinstance(linear, LoraLinear)


def rank(linear: nn.Module) -> int:
    """Numbers a token between A and B, of all active adapters; 0 of a layer without."""
    return sum(linear.configs[name].r for name in linear.active) if isinstance(linear, LoraLinear) else 0


def _is_trained(linear: nn.Module) -> bool:
    return any(p.requires_grad for p in linear.parameters())


def part_linears(block: Block) -> dict[str, list[nn.Module]]:
    """The linear layers of a block by part, in the order of the forward pass."""
    attention, mlp = block.attention, block.mlp if block.config.family.name("mlp") else block
    first = [attention.qkv_proj] if attention.fused else [attention.q_proj, attention.k_proj, attention.v_proj]
    family = block.config.family
    separate = [mlp.gate_proj, mlp.up_proj] if family.gated and not family.fused else []
    up = separate or [mlp.gate_up_proj if family.gated else mlp.up_proj]
    return {"attention": [*first, attention.o_proj], "mlp": [*up, mlp.down_proj]}


def block_keeps(block: Block, attention: str, flows: bool, mask: str = "", shared: bool = False) -> list[Kept]:
    """What a block keeps without checkpointing.

    Args:
        block: on any device, the meta device included; which parameters require a gradient, and adapters, count.
        attention: "eager", "sdpa" or "flash".
        flows: whether a gradient must reach the block's input; not before the first trained layer.
        mask: elements of the mask where documents or a window limit what is seen, "b s s" or "s s"; "": no limit.
        shared: rows share a prefix.
    """
    parts = part_linears(block)
    reaches = flows or any(map(_is_trained, parts["attention"]))
    kept = _attention_keeps(block, parts["attention"], attention, flows, mask, shared)
    if reaches or any(map(_is_trained, parts["mlp"])):
        kept += _mlp_keeps(block, parts["mlp"], reaches)
    for part, linears in parts.items():
        kept += [Kept(part, "A x of the adapters", f"n {rank(x)} a") for x in linears if is_adapted(x)]
        last = "product" if part == "mlp" else ""
        kept += [_dropped(part, x, last if x is linears[-1] else "") for x in linears if _dropout(x)]
    return kept


def _attention_keeps(
    block: Block, linears: list[nn.Module], attention: str, flows: bool, mask: str, shared: bool
) -> list[Kept]:
    config = block.config
    *first, last = linears
    kept = norm_keeps("attention", block.attention_norm, "n", "d", flows, "input") if not config.norm_sum else []
    if any(map(needs_input, first)):
        kept.append(Kept("attention", "input of q, k, v", "n d a", role="input" if config.norm_sum else ""))
    inside = flows or any(map(_is_trained, first))
    if inside:
        kept += [*_qkv_keeps(block, attention, mask), *(_copies(block, attention) if shared else [])]
        kept += _score_keeps(block, attention, mask, shared)
    if needs_input(last) or (inside and attention != "eager"):
        kept.append(Kept("attention", "attention output", "n h e a"))
    reaches = inside or _is_trained(last)
    if config.family.norms_after:
        kept += norm_keeps("attention", block.attention_out_norm, "n", "d", reaches)
    if config.norm_sum:
        kept += norm_keeps("attention", block.attention_norm, "n", "d", reaches)
    return kept


def _score_keeps(block: Block, attention: str, mask: str, shared: bool) -> list[Kept]:
    """What attention makes of queries and keys."""
    kept = []
    if attention == "eager":
        scores = times(ROW_PAIRS[shared], "h a")
        kept.append(Kept("attention", "probabilities", scores, SCORES))
        if block.config.attention_softcap:
            kept.append(Kept("attention", "scores before the cap", scores, SCORES))
        if not mask:
            kept.append(Kept("attention", "mask", " + ".join(PAIRS[shared]), SCORES, "graph"))
    else:
        queries = "4 p h + 4 q t h" if shared else "4 n h"
        kept.append(Kept("attention", "sums of the softmax", queries, SCORES))
    if attention == "sdpa" and (mask or shared):  # PyTorch makes numbers of it, anew in every layer
        kept.append(Kept("attention", "mask as numbers", f"{mask} a" if mask else "t p a + t t a", SCORES))
    return kept


def _copies(block: Block, attention: str) -> list[Kept]:
    """What each row has of its own where the prefix is shared: padded queries, and keys and values behind the prefix's.
    sdpa takes a mask here, and so keys and values for every query head. Fused attention keeps its results, too."""
    heads = "h" if attention == "sdpa" else "g"
    kept = [Kept("attention", "q, k and v of each row", f"q t h e a + 2 q p {heads} e a + 2 q t {heads} e a")]
    if attention != "eager":
        kept.append(Kept("attention", "output for each row", "p h e a + q t h e a"))
    return kept


def _qkv_keeps(block: Block, attention: str, mask: str) -> list[Kept]:
    """Queries, keys and values as attention gets them."""
    module, kept = block.attention, []
    if module.qk_norm:
        kept += norm_keeps("attention", module.q_norm, "n h", "e", True)
        kept += norm_keeps("attention", module.k_norm, "n g", "e", True)
    if attention == "sdpa" and mask and block.config.num_key_value_heads != block.config.num_attention_heads:
        return [*kept, Kept("attention", "q, and k and v for each query head", "3 n h e a")]
    if module.fused:  # v is a part of the one result for q, k and v, which therefore stays as a whole
        kept.append(Kept("attention", "q, k, v in one", "n h e a + 2 n g e a"))
        return [*kept, Kept("attention", "turned q and k", "n h e a + n g e a")] if module.rotary else kept
    kept.append(Kept("attention", "q and k", "n h e a + n g e a"))
    return [*kept, Kept("attention", "v", "n g e a")]


def _mlp_keeps(block: Block, linears: list[nn.Module], flows: bool) -> list[Kept]:
    config = block.config
    *first, last = linears
    kept = norm_keeps("mlp", block.mlp_norm, "n", "d", flows) if not config.norm_sum else []
    if any(map(needs_input, first)):
        kept.append(Kept("mlp", "input of the MLP", "n d a"))
    if flows or any(map(_is_trained, first)):
        if config.family.gated:
            kept.append(Kept("mlp", "gate and up", "2 n f a"))
        elif config.activation != "relu":  # relu's gradient is read from its result
            kept.append(Kept("mlp", "input of the activation", "n f a"))
    if needs_input(last) or (config.activation == "relu" and not config.family.gated):
        kept.append(Kept("mlp", "input of the last layer", "n f a", role="product"))
    if config.family.norms_after:
        kept += norm_keeps("mlp", block.mlp_out_norm, "n", "d", True)
    if config.norm_sum:
        kept += norm_keeps("mlp", block.mlp_norm, "n", "d", True)
    return kept


def norm_keeps(part: str, norm: nn.Module, rows: str, width: str, flows: bool, role: str = "") -> list[Kept]:
    """Input and factors of `rows` normalized rows, and the normalized rows themselves where a weight is trained."""
    is_rms, trained = isinstance(norm, RMSNorm), any(p.requires_grad for p in norm.parameters())
    kept = []
    if flows or (trained and not is_rms):
        kept.append(Kept(part, "input of a norm", f"{rows} {width} a", role=role))
        kept.append(Kept(part, "a norm's factors", f"4 {rows}" if is_rms else f"8 {rows}"))
        if isinstance(norm, RMSNormPlusOne):
            kept.append(Kept(part, "1 + weight, fp32", f"4 {width}"))
    if trained and is_rms:
        size = "4" if isinstance(norm, RMSNormPlusOne) else "a"
        kept.append(Kept(part, "normalized rows, for the norm's weight", f"{rows} {width} {size}"))
    return kept


def _dropout(linear: nn.Module) -> bool:
    return isinstance(linear, LoraLinear) and any(config.dropout for config in linear.configs.values())


def _dropped(part: str, linear: nn.Module, role: str) -> Kept:
    """With dropout every adapter reads an input of its own, and keeps it and what was drawn."""
    assert isinstance(linear, LoraLinear)
    return Kept(part, "dropped input of an adapter", f"2 n {linear.in_features} a", role=role)


def linear_results(linears: list[nn.Module]) -> list[str]:
    """What selective checkpointing saves of linear layers: formulas of their results.

    Of an adapted layer it saves the base's result, A x, and their sum. An int8 product is none of the operations that
    it knows.
    """
    formulas = []
    for linear in linears:
        assert isinstance(linear, nn.Linear | QuantizedLinear | LoraLinear)
        base = linear.base if isinstance(linear, LoraLinear) else linear
        size = f"n {linear.out_features} a"
        formulas += [size] * (not isinstance(base, Linear8bit))
        formulas += [size, f"n {rank(linear)} a"] * is_adapted(linear)
    return formulas
