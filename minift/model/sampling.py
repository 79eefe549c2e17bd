"""Choosing the next token from the model's logits.

    logits -> penalty for what is there already -> / temperature -> top k -> top p -> softmax -> draw

    repetition penalty   a logit l of a token in the text so far becomes l / penalty, or l * penalty where l < 0
    temperature          below 1 favours what is likely, above 1 evens out; 0 takes the likeliest token (greedy)
    top k                keep the k likeliest tokens, and all that are as likely as the last of them
    top p                keep the likeliest tokens that together reach probability p (nucleus sampling)

A draw needs no cumulative sum: if q_i are independent and exponentially distributed, token i has the largest p_i / q_i
with probability p_i. That is how torch.multinomial draws, too, after checks that make a GPU wait for the host.

How a checkpoint wants to be sampled stands in its generation_config.json. Order, ties and cut-offs are those of
transformers, and with the same seed the draws are, too. Left out: beam search, and what else is listed as UNSUPPORTED.

Source: transformers 5.23 `generation/logits_process.py` and `configuration_utils.py`; repetition penalty:
arXiv 1909.05858, nucleus sampling: arXiv 1904.09751.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minift.model.config import ModelConfig

# transformers' values for what generation_config.json leaves out. Its top_k cuts even where no file asks for it.
DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}

# Settings of that file that change the text and are not computed here: for each, the value that turns it off.
UNSUPPORTED: dict[str, Any] = {
    "num_beams": 1, "constraints": None, "force_words_ids": None, "dola_layers": None,  # other searches
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None, "sequence_bias": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": 1.0, "watermarking_config": None,
    "min_length": 0, "min_new_tokens": 0, "exponential_decay_length_penalty": None, "max_time": None,
    "stop_strings": None, "token_healing": False,
}  # fmt: skip
UNSUPPORTED_GREEDY: dict[str, Any] = {"penalty_alpha": 0.0}  # contrastive search, which takes the place of greedy
UNSUPPORTED_DRAWN: dict[str, Any] = {
    "min_p": 0.0, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    Attributes:
        temperature: what logits are divided by; 0 is greedy, and then top_p, top_k and seed mean nothing.
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        seed: of the draws.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        repetition_penalty: above 1 makes tokens of prompt and answer less likely, below 1 more likely; for greedy, too.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        def number(value: object) -> bool:
            return isinstance(value, int | float)

        # Below 1e-6 a logit divided by it may leave the range of fp32, and the text would be of NaN's choosing.
        if not number(self.temperature) or not (self.temperature == 0 or 1e-6 <= self.temperature < float("inf")):
            raise ValueError(f"temperature must be 0 (greedy) or a number of at least 1e-6, got {self.temperature!r}")
        if not number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be a whole number from 0 to 2**64 - 1, got {self.seed!r}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or a positive whole number, got {self.top_k!r}")
        if not number(self.repetition_penalty) or not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be a positive number, got {self.repetition_penalty!r}")

    @classmethod
    def of(cls, config: ModelConfig) -> "Sampling":
        """What the checkpoint's generation_config.json asks for, completed as transformers completes it.

        Without do_sample that is greedy. The other fields are the file's all the same, so that a temperature put in
        with `dataclasses.replace` draws as transformers does with do_sample=True and that temperature.

        Raises:
            ValueError: a value out of range, or a setting in force that is not computed here; names it.
        """
        given = {name: value for name, value in config.generation.items() if value is not None}
        drawn = given.get("do_sample", False)
        for name, off in (UNSUPPORTED | (UNSUPPORTED_DRAWN if drawn else UNSUPPORTED_GREEDY)).items():
            if given.get(name, off) not in (off, [], {}):
                raise ValueError(
                    f"generation_config.json sets {name} to {given[name]!r}, which is not supported; to decide "
                    "otherwise than the file, pass a Sampling (minift chat: --no-generation-config)"
                )
        chosen: dict[str, Any] = {name: given.get(name, default) for name, default in DEFAULTS.items()}
        if not drawn:
            chosen["temperature"] = 0.0
        try:
            return cls(**chosen)
        except ValueError as error:
            raise ValueError(f"generation_config.json: {error}") from None


GREEDY = Sampling()


def penalized(logits_bv: Tensor, seen_bv: Tensor, penalty: float) -> Tensor:
    """Logits [b, v] with those where `seen_bv`, bool [b, v], is true made less likely (penalty above 1) or more."""
    changed_bv = torch.where(logits_bv < 0, logits_bv * penalty, logits_bv / penalty)
    return torch.where(seen_bv, changed_bv, logits_bv)


def probabilities(logits_bv: Tensor, sampling: Sampling) -> Tensor:
    """The distribution to draw from, [b, v]: temperature (not 0), top k, top p, softmax. Logits in fp32."""
    scores_bv = logits_bv / sampling.temperature
    if sampling.top_k:
        kept = torch.topk(scores_bv, min(sampling.top_k, scores_bv.shape[-1])).values
        scores_bv = scores_bv.masked_fill(scores_bv < kept[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        # From the least likely on, as transformers does it: a sum from the other end rounds to other cut-offs, and a
        # sort in the other direction puts other tokens first among equals.
        ascending_bv, order_bv = torch.sort(scores_bv)
        drop_bv = ascending_bv.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        drop_bv[:, -1] = False
        scores_bv = scores_bv.masked_fill(drop_bv.scatter(1, order_bv, drop_bv), -torch.inf)
    return scores_bv.softmax(-1)


class Chooser:
    """Chooses the next token of each row, step after step.

    Which tokens are in the text is kept as one bit for each of the vocabulary, so a step costs the same however long
    the text has become.

    Args:
        sampling: how.
        prompts: token ids of each row, without padding.
        device: of the logits that will come.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], device: torch.device):
        self.sampling = sampling
        self.prompts = prompts
        self.generator = torch.Generator(device).manual_seed(sampling.seed)
        self.seen_bv: Tensor | None = None

    def __call__(self, logits_bv: Tensor) -> Tensor:
        """Logits [b, v] in any float type -> token ids, int64 [b]. These count as part of the text from now on."""
        if self.sampling.repetition_penalty == 1:
            return self._choose(logits_bv)
        if self.seen_bv is None:
            self.seen_bv = torch.zeros_like(logits_bv, dtype=torch.bool)
            for row, prompt in zip(self.seen_bv, self.prompts, strict=True):
                row[torch.tensor(prompt, device=row.device)] = True
        token_b = self._choose(penalized(logits_bv.float(), self.seen_bv, self.sampling.repetition_penalty))
        self.seen_bv.scatter_(1, token_b.unsqueeze(1), True)
        return token_b

    def _choose(self, logits_bv: Tensor) -> Tensor:
        if self.sampling.temperature == 0:
            return logits_bv.argmax(dim=-1)
        probability_bv = probabilities(logits_bv.float(), self.sampling)
        noise_bv = torch.empty_like(probability_bv).exponential_(generator=self.generator)
        return (probability_bv / noise_bv).argmax(dim=-1)
