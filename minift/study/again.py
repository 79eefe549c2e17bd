"""A pass forward and back, watched: what is kept between the two, what is computed, and how memory rises and falls.

Gradient checkpointing keeps a block's input instead of what the block computes, and computes the block again when its
backward pass comes. So three numbers move:

    kept     bytes that wait at the end of the forward pass        fall
    peak     the most at a time                                    falls, less: one block's activations come back
    flops    of the backward pass                                  rise by those of a forward pass

    watched = watch_pass(lambda: model(ids).float().logsumexp(-1).mean(), model.parameters())
    watched.kept, watched.peak, watched.flops, watched.gradients

A trained linear layer multiplies once forward (2 n i o flops) and twice backward (dx and dW), so computing it again
makes 4 products of 3: a third more. A frozen one has no dW, and 3 products of 2 are half more: with LoRA, checkpointing
costs more than is usually said.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from minift.adapters.inject import add_lora
from minift.adapters.lora import LoraConfig
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM, Checkpointing
from minift.study.live import LiveBytes


class Timeline(LiveBytes):
    """`LiveBytes` that also writes down `now` after every operation, and counts flops of matrix products.

    Attributes:
        history: bytes that exist, after each operation.
        flops: of the products seen; those of operators that PyTorch does not know are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.history: list[int] = []
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.history.append(self.now)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


@dataclass(frozen=True)
class Pass:
    """What a pass forward and back took.

    Attributes:
        loss: what was computed.
        kept: bytes of new tensors at the end of the forward pass, the loss included.
        peak: the most at a time, gradients included.
        forward_flops, backward_flops: of matrix products.
        history: bytes after each operation.
        turn: how many operations of `history` belong to the forward pass.
        gradients: of each parameter; None where it got none.
    """

    loss: float
    kept: int
    peak: int
    forward_flops: int
    backward_flops: int
    history: list[int] = field(repr=False)
    turn: int
    gradients: list[Tensor | None] = field(repr=False)

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops


def watch_pass(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> Pass:
    """Run forward and backward once. Gradients that are there are forgotten, and none are left behind.

    Args:
        run: computes a loss, a tensor of one number.
        parameters: whose gradients are returned; those that are frozen are skipped.
    """
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        p.grad = None
    with Timeline() as live:
        loss = run()
        kept, turn, forward = live.now, len(live.history), live.flops
        loss.backward()
    gradients = [p.grad for p in trained]
    for p in trained:
        p.grad = None
    return Pass(loss.item(), kept, live.peak, forward, live.flops - forward, live.history, turn, gradients)


def same_gradients(one: Pass, other: Pass) -> bool:
    """Whether all gradients are equal to the last bit."""
    pairs = zip(one.gradients, other.gradients, strict=True)
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def gradient_gap(one: Pass, other: Pass) -> float:
    """Length of the difference of all gradients, relative to those of `one`.

    Raises:
        ValueError: a parameter has a gradient in one pass only.
    """
    apart = whole = 0.0
    for a, b in zip(one.gradients, other.gradients, strict=True):
        if (a is None) != (b is None):
            raise ValueError("a parameter has a gradient in one of the passes only")
        if a is not None and b is not None:
            apart, whole = apart + (a - b).double().square().sum().item(), whole + a.double().square().sum().item()
    return (apart / whole) ** 0.5 if whole else 0.0


def toy_blocks(blocks: int = 8, depth: int = 4, dropout: float = 0.0, width: int = 100) -> nn.ModuleList:
    """Blocks of `depth` times (linear layer without bias, tanh, and dropout if asked for).

    On 2500 rows of width 100 each tanh keeps its result, 1 MB in fp32, which is the next layer's input as well: without
    checkpointing blocks x depth MB are kept.
    """

    def block() -> nn.Sequential:
        layers = [(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(depth)]
        drop = [nn.Dropout(dropout)] if dropout else []
        return nn.Sequential(*(part for layer in layers for part in layer), *drop)

    made = nn.ModuleList(block() for _ in range(blocks))
    for weight in made.parameters():
        nn.init.normal_(weight, std=1.5 * width**-0.5)  # so that neither values nor gradients die out
    return made


def run_blocks(blocks: Iterable[nn.Module], x_ni: Tensor, again: bool = False, **options: Any) -> Tensor:
    """The blocks one after the other, each by itself computed again if so wished; returns a loss.

    Args:
        options: of torch.utils.checkpoint.checkpoint.
    """
    options = {"use_reentrant": False} | options
    for block in blocks:
        x_ni = checkpoint(block, x_ni, **options) if again else block(x_ni)
    return x_ni.square().mean()


def tiny_model(lora: LoraConfig | None = None, layers: int = 8) -> CausalLM:
    """A random Llama of width 256; with adapters, or all of it trained."""
    config = ModelConfig.from_dict({
        "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 768,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "tie_word_embeddings": True,
    })  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CausalLM(config).train()
        if lora is not None:
            add_lora(model, lora)
    return model


def watch_model(model: CausalLM, input_ids_bs: Tensor, checkpointing: Checkpointing, seed: int = 0) -> Pass:
    """A pass of a model that predicts the next token.

    Args:
        checkpointing: what to keep: False, True or "selective" (model/decoder.py).
        seed: of dropout.
    """

    def run() -> Tensor:
        hidden_bsd = model.hidden(input_ids_bs, gradient_checkpointing=checkpointing)
        return F.cross_entropy(model.logits(hidden_bsd)[:, :-1].flatten(0, 1), input_ids_bs[:, 1:].flatten())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return watch_pass(run, model.parameters())
