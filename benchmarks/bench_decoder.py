"""A whole model against transformers: SmolLM2-135M-Instruct, forward + backward of all parameters, and decoding.

Both sides hold the same weights in the same dtype and use PyTorch's fused attention, transformers by default and minift
by choice. Decoding is greedy, one text, with a key/value cache, 64 tokens after a prompt of 64; neither side stops
early.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import minift
from benchmarks.harness import Row, Setup, check_close
from minift.model.generate import generate_tokens
from minift.sources.resolve import resolve

MODEL = "smollm2-135m-instruct"
SHAPES = ((1, 512), (16, 64))
PROMPT, NEW = 64, 64
# Logits through 30 layers, each side rounding in its own order: fp32 by some 1e-6, bf16 by some 1e-2 of their size.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def rows(setup: Setup) -> Iterator[Row]:
    for dtype in (torch.bfloat16, torch.float32):
        ours, theirs = models(setup, dtype)
        for batch, length in SHAPES:
            yield training_row(setup, ours, theirs, setup.size(batch), setup.size(length), dtype)
        yield decoding_row(setup, ours, theirs, dtype)


def models(setup: Setup, dtype: torch.dtype) -> tuple[minift.CausalLM, Any]:
    theirs: Any = AutoModelForCausalLM.from_pretrained(resolve(MODEL), dtype=dtype, attn_implementation="sdpa")
    return minift.load_model(MODEL, dtype=dtype, device=setup.device), theirs.to(setup.device).eval()


def forward_backward(model: nn.Module, logits: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Gradients of all parameters for the mean loss of the next tokens; the logits."""
    scores = logits(ids)
    loss = F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    model.zero_grad(set_to_none=True)
    return scores.detach()


def training_row(setup: Setup, ours: minift.CausalLM, theirs: Any, batch: int, length: int, dtype: torch.dtype) -> Row:
    ids = torch.randint(100, 49000, (batch, length), device=setup.device)
    return Row(
        name=f"forward + backward, {batch}x{length}, {_name(dtype)}",
        inputs=[ids, ids.flip(0).flip(1)],
        ours=lambda ids: forward_backward(ours, ours, ids),
        theirs=lambda ids: forward_backward(theirs, lambda x: theirs(x, use_cache=False).logits, ids),
        check=lambda mine, other: check_close(mine, other, CLOSE[dtype]),
        goal=setup.goal(eager=1.0),
    )


def decoding_row(setup: Setup, ours: minift.CausalLM, theirs: Any, dtype: torch.dtype) -> Row:
    prompt = torch.randint(100, 49000, (1, PROMPT), device=setup.device)
    new = setup.size(NEW)

    def their_tokens(ids: Tensor) -> Tensor:
        settings = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]

    def check(mine: Tensor, other: Tensor) -> None:
        """In fp32 the same tokens; in bf16 two close logits may change places, and the texts part there."""
        same = (mine == other).long().cumprod(0).sum().item()
        if len(mine) != len(other) or same < (new if dtype is torch.float32 else 1):
            raise ValueError(f"{len(mine)} and {len(other)} tokens, of which the first {same} are the same")

    return Row(
        name=f"decoding {new} tokens, {_name(dtype)}",
        inputs=[prompt, prompt.flip(1)],
        ours=lambda ids: torch.cat(list(generate_tokens(ours, ids.tolist(), new))),
        theirs=their_tokens,
        check=check,
        goal=setup.goal(eager=1.5),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
