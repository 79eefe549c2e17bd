"""How far two versions of a model are apart, on text: what a change of the weights does to what the model says.

    largest, mean     of |logit after - logit before|, over all tokens and the whole vocabulary
    kl                sum of p log(p / q) of the next-token distributions before (p) and after (q), mean over tokens, in
                      nats: how many more nats a token costs, of texts that the model before would write
    same_argmax       share of tokens after which both would greedily say the same

The relative error of a weight says little about that: errors of many weights cancel, and a model is sure of most words.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOKENS_AT_ONCE = 64  # in float64, each takes 16 bytes a word of the vocabulary


@dataclass(frozen=True)
class Drift:
    """Differences of logits on some text; the terms are explained above.

    Attributes:
        tokens: how many tokens were read.
    """

    tokens: int
    largest: float
    mean: float
    kl: float
    same_argmax: float

    def format(self) -> str:
        """One line."""
        return (
            f"logits on {self.tokens} tokens moved by at most {self.largest:.3g}, by {self.mean:.3g} in the mean; "
            f"KL divergence {self.kl:.3g} nats; same most likely token after {100 * self.same_argmax:.4g} %"
        )


def measure_drift(before_bsv: Tensor, after_bsv: Tensor) -> Drift:
    """Compare the logits of two models for the same tokens.

    Args:
        before_bsv, after_bsv: [b, s, v] or [n, v], any float dtype; compared in float64.

    Raises:
        ValueError: different shapes, or no tokens.
    """
    if before_bsv.shape != after_bsv.shape or before_bsv.numel() == 0:
        raise ValueError(f"cannot compare logits of shapes {tuple(before_bsv.shape)} and {tuple(after_bsv.shape)}")
    largest = total = kl = same = 0.0
    both = zip(*(x.flatten(0, -2).split(TOKENS_AT_ONCE) for x in (before_bsv, after_bsv)), strict=True)
    for before_nv, after_nv in both:
        before_nv, after_nv = before_nv.double(), after_nv.double()
        moved_nv = (after_nv - before_nv).abs()
        log_p, log_q = before_nv.log_softmax(-1), after_nv.log_softmax(-1)
        largest, total = max(largest, moved_nv.max().item()), total + moved_nv.sum().item()
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        same += (before_nv.argmax(-1) == after_nv.argmax(-1)).sum().item()
    tokens = before_bsv.shape[:-1].numel()
    return Drift(tokens, largest, total / before_bsv.numel(), kl / tokens, same / tokens)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode and no gradients are prepared."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
