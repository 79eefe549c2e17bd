"""More tokens than rows: making the embedding and the head larger.

A token added to the tokenizer gets the next free id, and the embedding needs a row of that number:

    tokenizer.add_tokens(["<|think|>"])  ->  id 32011                          nothing to do if there is room:
    embedding [rows, d]   row 32011: what the model reads for it               Phi-3 has 32064 rows for 32011 tokens,
    head      [rows, d]   row 32011: how well it fits as the next token        OPT-350m 50272 for 50265

Matrices like row counts that are a multiple of a power of two, so checkpoints come with such spare rows.

What to put in a new row? Not noise, and not zeros: with logits z_1 ... z_V that are all far below zero, as they often
are, a zero row has the logit 0 and takes over. With the mean of the old rows its logit is the mean of theirs, and

    p(new) < exp(mean z) / sum exp(z_i) <= 1 / V           because exp is convex (Jensen)

so an untrained token is never likelier than one in V, and the old probabilities keep their proportions.

transformers 5 draws new rows from a normal distribution with this mean and 1e-9 times the covariance of the old rows;
here they are its mean, equal for all new tokens: training tells them apart as soon as each is read or predicted.

The new rows are trained only if the embedding is: a LoRA adapter neither trains nor stores them (save_model does).
Resize before the optimizer is made, because it holds the old tensors.

Left out: new rows from the pieces that a word was split into before; quantized matrices.

Source: John Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minift.model.decoder import CausalLM


@dataclass(frozen=True)
class Resized:
    """What `resize_embeddings` did.

    Attributes:
        old_rows, new_rows: of the embedding and the head, before and after; equal if there was nothing to do.
        tied: one matrix serves as both.
    """

    old_rows: int
    new_rows: int
    tied: bool

    @property
    def added(self) -> int:
        """Rows added; negative if rows were removed."""
        return self.new_rows - self.old_rows


def resize_embeddings(model: CausalLM, tokens: int, multiple_of: int = 1, shrink: bool = False) -> Resized:
    """Give the model at least `tokens` rows, in place; the rows it has stay as they are, bit for bit.

    Args:
        model: neither its embedding nor its head may be quantized or carry an adapter.
        tokens: usually len(tokenizer).
        multiple_of: rows are added up to a multiple of this, such as 64; a model with room already stays as it is.
        shrink: also remove rows that no token needs. Without it a model never loses rows.

    Returns:
        old and new number of rows.

    Raises:
        ValueError: numbers that are not positive; an embedding or a head that is not a plain layer.
    """
    for name, number in (("tokens", tokens), ("multiple_of", multiple_of)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a positive integer, got {number!r}")
    embedding, head = model.decoder.embed_tokens, model.lm_head
    for name, layer, plain in (("embed_tokens", embedding, nn.Embedding), ("lm_head", head, nn.Linear)):
        if not isinstance(layer, plain):
            raise ValueError(
                f"{name} is a {type(layer).__name__}, which cannot get more rows; resize before the model is quantized "
                "and before adapters are added, or merge them first (merge_lora)"
            )
    old_rows, tied = embedding.num_embeddings, head.weight is embedding.weight
    wanted = -(-tokens // multiple_of) * multiple_of
    if tokens <= old_rows and not (shrink and wanted < old_rows):
        return Resized(old_rows, old_rows, tied)

    embedding.weight = _resized(embedding.weight, wanted)
    embedding.num_embeddings = head.out_features = wanted
    head.weight = embedding.weight if tied else _resized(head.weight, wanted)
    if head.bias is not None:
        head.bias = _resized(head.bias, wanted)
    raw = model.config.raw and model.config.raw | {"vocab_size": wanted}
    model.config = replace(model.config, vocab_size=wanted, raw=raw)
    model.resized = True
    return Resized(old_rows, wanted, tied)


@torch.no_grad()
def _resized(old: Tensor, rows: int) -> nn.Parameter:
    """The first rows of a weight [v, d] or a bias [v]; new ones are the mean of the old, taken in fp32."""
    new = old.new_empty(rows, *old.shape[1:])
    kept = min(rows, len(old))
    new[:kept] = old[:kept]
    new[kept:] = old.mean(0, dtype=torch.promote_types(old.dtype, torch.float32))
    return nn.Parameter(new, requires_grad=old.requires_grad)
