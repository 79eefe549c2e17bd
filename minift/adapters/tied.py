"""Tied heads: one matrix reads tokens and scores them. What an adapter of one half means for the other.

        ids --> embed_tokens.weight --> blocks --> lm_head.weight --> logits        the same matrix [v, d]

    what is adapted                            the head                               a merged model
    trained token rows (tokens.py)             sees the new rows, as in PEFT          stays tied
    copy, ensure_weight_tying=True             uses the copy, as in PEFT              stays tied
    copy of one half                           keeps the original: refused            is untied
    LoRA on one half                           keeps the original, as in PEFT         is untied

PEFT trains a copy of one half and warns: the user wanted a model whose halves are one, and gets two that drift apart
(peft #2018). Here that must be asked for, by a model that is not tied; but a file that PEFT has made so is read as what
it is. After merging, PEFT leaves `tie_word_embeddings` as it was, so the next load drops the head or overwrites it
(peft #2777); here `settle_tie` corrects it.
"""

from dataclasses import replace

from torch import Tensor, nn

from minift.adapters.switched import Switched
from minift.adapters.targets import HEAD
from minift.model.decoder import CausalLM


class TiedHead(nn.Module):
    """A head that follows what an adapter makes of the embedding whose matrix it shares.

    Attributes:
        base: the head.
        source: the place of the embedding, in a list, because its parameters are not this module's.
    """

    def __init__(self, base: nn.Linear, source: Switched):
        super().__init__()
        self.base = base
        self.source = [source]

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.source[0].scores(self.base, x)


def plain(module: nn.Module) -> nn.Module:
    """What was there before adapters came."""
    while isinstance(module, Switched | TiedHead):
        module = module.base
    return module


def embedding_path(model: nn.Module) -> str | None:
    """Where the input embedding is; None for a module tree that is no language model."""
    if not isinstance(model, CausalLM):
        return None
    embedding = model.decoder.embed_tokens
    return next(path for path, module in model.named_modules() if module is embedding)


def is_tied(model: nn.Module) -> bool:
    """Whether head and embedding are one matrix."""
    if not isinstance(model, CausalLM):
        return False
    head, embedding = plain(model.lm_head), plain(model.decoder.embed_tokens)
    return head.weight is embedding.weight


def follow(model: nn.Module, source: Switched) -> None:
    """Let the head follow the embedding at `source`, if it does not yet."""
    assert isinstance(model, CausalLM)
    if not isinstance(model.lm_head, TiedHead):
        model.set_submodule(HEAD, TiedHead(model.lm_head, source).train(model.lm_head.training))


def unfollow(model: nn.Module, source: Switched) -> None:
    """Put the plain head back, if it followed `source`."""
    head = dict(model.named_children()).get(HEAD)
    if isinstance(head, TiedHead) and head.source[0] is source:
        model.set_submodule(HEAD, head.base)


def settle_tie(model: nn.Module) -> None:
    """After merging: say in the configuration that the head is not tied, if it has its own matrix now."""
    if isinstance(model, CausalLM) and model.config.tie_word_embeddings and not is_tied(model):
        raw = model.config.raw and model.config.raw | {"tie_word_embeddings": False}
        model.config = replace(model.config, tie_word_embeddings=False, raw=raw)
