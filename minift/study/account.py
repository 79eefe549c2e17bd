"""The entries of the ledger: what is in memory at each moment of a training step, with formulas."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minift.adapters.inject import adapter_parameters, lora_layers
from minift.adapters.lora import LoraLinear
from minift.model.decoder import CausalLM
from minift.model.layers import Block
from minift.optim.adamw8bit import MIN_8BIT_SIZE
from minift.optim.update8bit import BLOCK, WINDOW
from minift.quant.config import INT8
from minift.quant.linear import QuantizedLinear
from minift.study.kept import (
    ACTIVATIONS,
    ROW_PAIRS,
    SCORES,
    Kept,
    block_keeps,
    evaluate,
    is_adapted,
    linear_results,
    needs_input,
    norm_keeps,
    part_linears,
    rank,
    times,
)
from minift.study.setting import Setting, symbols_of

CATEGORIES = (
    "weights", "adapters", "optimizer", "batch", "gradients", ACTIVATIONS, SCORES, "logits", "temporaries", "scratch",
)  # fmt: skip
BEFORE = ("weights", "adapters", "optimizer", "batch")
PER_STEP = ("rotation", "mask")  # of the batch: made by the forward pass


@dataclass(frozen=True)
class Line:
    """One entry: `count` times `formula` bytes each."""

    category: str
    what: str
    count: int
    formula: str
    bytes: int


@dataclass(frozen=True)
class Moment:
    """Everything that is in memory at one time."""

    name: str
    lines: tuple[Line, ...]

    @property
    def total(self) -> int:
        return sum(line.bytes for line in self.lines)

    def categories(self) -> dict[str, int]:
        """Bytes of each category; all categories, also the empty ones."""
        return {name: sum(line.bytes for line in self.lines if line.category == name) for name in CATEGORIES}


class Account:
    """The model of a setting, and the entries of each moment."""

    def __init__(self, setting: Setting, model: CausalLM):
        if isinstance(model.lm_head, LoraLinear):
            raise ValueError("an adapter of the head is not predicted; leave lm_head out of the targets")
        self.setting, self.model, self.symbols = setting, model, symbols_of(setting)
        self.attention = setting.attention or ("eager" if setting.config.attention_softcap else "sdpa")
        self.blocks = [block for block in model.decoder.layers if isinstance(block, Block)]
        self.trained = [p for p in model.parameters() if p.requires_grad]
        flows, self.kept = model.decoder.embed_tokens.weight.requires_grad, []
        for block, window in zip(self.blocks, setting.config.windows, strict=True):
            self.kept.append(block_keeps(block, self.attention, flows, self._mask(window), setting.shared is not None))
            flows = flows or any(p.requires_grad for p in block.parameters())
        self.fixed = self._fixed()

    def line(self, category: str, what: str, formula: str, count: int = 1) -> Line:
        return Line(category, what, count, formula, count * evaluate(formula, self.symbols))

    def _mask(self, window: int | None) -> str:
        """Elements of the mask of the layers with this window."""
        if self.setting.packed or self.setting.shared:
            return "b s s" if self.setting.packed else ""
        return "s s" if window is not None and self.setting.length > window else ""

    @property
    def before(self) -> int:
        """Bytes held before the step."""
        return sum(line.bytes for line in self._lasting())

    @property
    def after_forward(self) -> int:
        """Bytes held when the head is called."""
        lines = [*self.fixed, *self._kept_until(len(self.blocks)), *self._final()]
        return sum(line.bytes for line in lines if line.category not in ("scratch", "temporaries"))

    def moments(self) -> list[Moment]:
        """In order of time; of the blocks only the largest moment of each kind."""
        of_blocks = [self._block(index) for index in range(len(self.blocks) - 1, -1, -1) if self.kept[index]]
        largest = [max(kind, key=lambda moment: moment.total) for kind in zip(*of_blocks, strict=True)]
        return [*self._head(), *largest, *self._embedding(), self._update()]

    # --- what is always there

    def _fixed(self) -> list[Line]:
        setting, config = self.setting, self.setting.config
        adapters = {id(p) for layer in lora_layers(self.model).values() for p in adapter_parameters(layer)}
        tensors = [*self.model.parameters(), *self.model.buffers()]
        weights = _bytes([t for t in tensors if id(t) not in adapters])
        state = _bytes([b for m in self.model.modules() if isinstance(m, QuantizedLinear) for n, b in
                        m.named_buffers(recurse=False) if n != "weight"])  # fmt: skip
        kind = setting.quantize.label if setting.quantize else str(setting.dtype).removeprefix("torch.")
        lines = [
            self.line("weights", f"linears in {kind}, the rest" if setting.quantize else f"all in {kind}",
                      str(weights - state)),
            self.line("weights", "quantization state", str(state)),
            self.line("adapters", "A and B, fp32", str(_bytes([t for t in tensors if id(t) in adapters]))),
            *self._optimizer_state(),
            self.line("batch", "ids, labels, positions, documents", "32 n"),
        ]  # fmt: skip
        if any(config.rotary):
            tables = 1 + (config.local_rope is not None)
            width = int(config.head_dim * config.rope.get("partial_rotary_factor", 1.0))
            lines.append(self.line("batch", "rotation", f"2 n {width} a", tables))
        if setting.packed and self.attention != "flash":
            lines.append(self.line("batch", "mask", "b s s", len(set(config.windows))))
        return [*lines, *self._around(), *self._decoded()]

    def _lasting(self) -> list[Line]:
        return [line for line in self.fixed if line.category in BEFORE and line.what not in PER_STEP]

    def _around(self) -> list[Line]:
        """Layers between narrow embeddings and the blocks (opt-350m)."""
        decoder = self.model.decoder
        around = [x for x in (decoder.project_in, decoder.project_out) if x is not None and needs_input(x)]
        formulas = [f"n {linear.in_features} a + n {rank(linear)} a" for linear in around]
        return [self.line(ACTIVATIONS, "input of a projection", formula) for formula in formulas]

    def _decoded(self) -> list[Line]:
        quantize = self.setting.quantize
        if quantize is None:
            return []
        layers = (m for m in self.model.modules() if isinstance(m, QuantizedLinear))
        largest = max(m.in_features * m.out_features for m in layers)
        if quantize.quant_type == INT8:
            return [self.line("temporaries", "largest weight, decoded", f"{largest} a")]
        # A CPU decodes through fp32 values (quant/fourbit.py).
        fp32 = f" + 4 {largest}" if self.setting.device == "cpu" else ""
        return [self.line("scratch", "largest weight, decoded", f"{largest} a{fp32}")]

    def _optimizer_state(self) -> list[Line]:
        sizes = [p.numel() for p in self.trained]
        if self.setting.optimizer == "adamw":
            return [self.line("optimizer", "m and v, fp32: 8 P", f"8 {sum(sizes)}")]
        small, large = _padded(sizes)
        what = "m and v, 8 bits with scales: 2 P + 8 P / 256"
        state = self.line("optimizer", what, f"2 {large} + 8 {large // BLOCK}")
        pages = self.line("optimizer", "pages of m and v", str(min(self.setting.pages, state.bytes)))
        on_host = [pages] if self.setting.device != "cpu" else [pages, state]
        return [
            *(on_host if self.setting.pages else [state]),
            self.line("optimizer", f"m and v of tensors below {MIN_8BIT_SIZE}, fp32: 8 P", f"8 {small}"),
        ]

    def _gradients(self, parameters: Sequence[Tensor]) -> list[Line]:
        """Of these; of all, if there was a micro-batch before."""
        there = self.trained if self.setting.accumulation > 1 else parameters
        return [self.line("gradients", "in the dtype of the parameters", str(_bytes(there)))]

    def _added(self, parameters: Sequence[Tensor]) -> list[Line]:
        """A gradient that is added to that of an earlier micro-batch: the largest of these."""
        if self.setting.accumulation == 1 or not parameters:
            return []
        return [self.line("temporaries", "a gradient that is added", str(max(_bytes([p]) for p in parameters)))]

    # --- what the forward pass keeps

    def _kept_until(self, blocks: int) -> list[Line]:
        """What the first `blocks` blocks keep."""
        before = [keep for kept in self.kept[:blocks] for keep in kept]
        if not self.setting.checkpointing:
            return self._lines(before)
        inputs = self.line(ACTIVATIONS, "input of each block", "n d a", blocks)
        lines = [inputs, *self._lines([keep for keep in before if keep.role == "graph"])]
        return [*lines, *self._results(blocks)] if self.setting.checkpointing == "selective" else lines

    def _results(self, blocks: int) -> list[Line]:
        """What the selective way of checkpointing keeps besides."""
        formulas = Counter(
            " + ".join(formula for linears in part_linears(block).values() for formula in linear_results(linears))
            for block in self.blocks[:blocks]
        )
        lines = [self.line(ACTIVATIONS, "results of linear layers", *item) for item in formulas.items()]
        fused = sum(map(bool, self.kept[:blocks])) if self.attention != "eager" else 0
        return [*lines, self.line(ACTIVATIONS, "results of fused attention", "n h e a + 4 n h", fused)]

    def _lines(self, kept: Sequence[Kept]) -> list[Line]:
        counts = Counter((keep.category, keep.what, keep.formula) for keep in kept)
        return [self.line(*key, count) for key, count in counts.items()]

    def _final(self) -> list[Line]:
        """What the last norm keeps, and the rows that the head reads."""
        norm = self.model.decoder.final_norm
        kept = [] if norm is None else norm_keeps("mlp", norm, "n", "d", True)
        return [*self._lines(kept), self.line(ACTIVATIONS, "rows that the head reads", "m w a")]

    # --- the moments

    def _head(self) -> list[Moment]:
        head, symbols = self.model.lm_head, self.symbols
        capped = " + c v a" if self.setting.config.logit_softcap else ""
        lines = [*self.fixed, *self._kept_until(len(self.blocks)), *self._final()]
        pieces = symbols["c"] < symbols["m"]
        done = [self.line("temporaries", "gradient of the rows", "m w a")] * pieces
        logits = self.line("logits", "softmax, its gradient, theirs: fp32", f"12 c v{capped}")
        before = self._gradients([])  # of earlier micro-batches
        moments = [Moment("softmax over the vocabulary", (*lines, *before, *done, logits))]
        if needs_input(head):
            gradient = self._gradients([head.weight])
            twice = [self.line("temporaries", "gradient of the head so far", "v w a")]
            twice *= pieces or self.setting.accumulation > 1
            grads = (*gradient, *twice, self.line("logits", "gradient", "c v a"))
            moments.append(Moment("gradient of the head", (*lines, *done, *grads)))
        return moments

    def _block(self, index: int) -> list[Moment]:
        """Two moments of a block's backward pass: within its MLP, and within its attention."""
        block, kept = self.blocks[index], self.kept[index]
        linears = part_linears(block)
        later = [p for other in self.blocks[index + 1 :] for p in other.parameters() if p.requires_grad]
        later += self._of_head()
        down = [p for p in linears["mlp"][-1].parameters() if p.requires_grad]
        mlp = [p for linear in [*linears["mlp"], linears["attention"][-1]] for p in linear.parameters()]
        mlp = [p for p in mlp if p.requires_grad]
        lines = self._kept_until(index)
        if self.setting.checkpointing and not any(keep.role == "input" for keep in kept):
            lines.append(self.line(ACTIVATIONS, "input of each block", "n d a"))
        at_mlp = self._lines([keep for keep in kept if keep.role != "product"])
        at_attention = self._lines([keep for keep in kept if keep.part == "attention"])
        rows = self.line("temporaries", "rows of the head, and their gradient", "2 m w a")
        residual = self.line("temporaries", "gradient of the block's output", "n d a")
        inside = max(
            (self.line("temporaries", what, formula) for what, formula in self._in_mlp(linears["mlp"][-1])),
            key=lambda line: line.bytes,
        )
        return [
            Moment(f"backward pass of an MLP, block {index}",
                   (*self.fixed, *self._gradients([*later, *down]), *self._added(down), *lines, *at_mlp, rows,
                    residual, inside)),
            Moment(f"backward pass of attention, block {index}",
                   (*self.fixed, *self._gradients([*later, *mlp]), *self._added(mlp), *lines, *at_attention, rows,
                    residual, *self._in_attention())),
        ]  # fmt: skip

    def _in_mlp(self, down: nn.Module) -> list[tuple[str, str]]:
        """What can be the widest moment of an MLP, the result of the activation's backward pass included."""
        if self.setting.config.family.gated:
            found = [("gradients of gate, up and their product", "4 n f a")]
        else:
            found = [("gradients of the activation", "3 n f a" if is_adapted(down) else "2 n f a")]
        if self.setting.quantize and self.setting.quantize.quant_type == INT8:
            found.append(("an int8 product: sums, scales, both in fp32", "12 n f"))
        return found

    def _in_attention(self) -> list[Line]:
        shared = self.setting.shared is not None
        if self.attention != "eager":
            size = "4 q t h e a + 2 q p h e a" if shared else "2 n h e a + 2 n g e a"
            return [self.line("temporaries", "gradients of q, k, v and the output", size)]
        pairs = ROW_PAIRS[shared][-2:]  # the prefix and the rows take turns
        sizes = [times(pairs, "8", "h"), *([times(pairs, "4", "h")] if self.setting.config.attention_softcap else [])]
        return [
            self.line(SCORES, "gradient of the probabilities, fp32, and a product", " + ".join(sizes)),
            self.line("temporaries", "gradients of v and the output", "2 n h e a"),
        ]

    def _of_head(self) -> list[Tensor]:
        """Trained parameters behind the blocks. A shared head has the embedding's gradient then."""
        modules = [self.model.lm_head, self.model.decoder.final_norm, self.model.decoder.project_out]
        return [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]

    def _embedding(self) -> list[Moment]:
        embedding = self.model.decoder.embed_tokens.weight
        if not embedding.requires_grad:
            return []
        own = [self.line("temporaries", "gradient of the embedding", str(_bytes([embedding])))]
        others = [p for p in self.trained if p is not embedding or self.setting.config.tie_word_embeddings]
        rows = self.line("temporaries", "gradients of the embedded tokens, rows of the head", "n d a + 2 m w a")
        return [Moment("gradient of the embedding", (*self.fixed, *self._gradients(others), rows, *own))]

    def _update(self) -> Moment:
        sizes = [p.numel() for p in self.trained]
        if self.setting.optimizer == "adamw":
            # The root and its quotient; the gradient too, if it is not fp32 already.
            cast = max((p.numel() for p in self.trained if p.dtype != torch.float32), default=0)
            size, what = f"8 {max(sizes)} + 4 {cast}", "of the largest tensor, fp32"
            own = [self.line("temporaries", what, size)]
        else:  # a GPU works in place
            window = f"8 {min(WINDOW, max(_padded(sizes)))}"
            on_cpu = self.setting.device == "cpu"
            own = [self.line("scratch", "parameters and gradients of a window", window)] * on_cpu
        lines = self._lasting()
        return Moment("update", (*lines, *self._gradients(self.trained), *own))


def _padded(sizes: Sequence[int]) -> tuple[int, int]:
    """Elements of the small and the large tensors, each padded to whole blocks."""
    whole = [(size < MIN_8BIT_SIZE, -(-size // BLOCK) * BLOCK) for size in sizes]
    return sum(n for small, n in whole if small), sum(n for small, n in whole if not small)


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Of different tensors: a weight with two names counts once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
