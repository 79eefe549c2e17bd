"""P-tuning: prompt tuning whose embeddings are computed by a small net, so that they learn together.

    MLP     p = W3 relu(W2 relu(W1 e + b1) + b2) + b3           e: n trained embeddings [n, d]
    LSTM    p = W2 relu(W1 lstm(e) + b1) + b2                   lstm: both directions, some layers

Trained by themselves, neighbouring virtual tokens have nothing to do with each other, and Adam moves each from wherever
it began. The net ties them together: all tokens share its weights (and the LSTM hands on from token to token). After
training only its output counts: a file holds the n * d embeddings, as for prompt tuning, and the net is gone. A loaded
prompt that is trained further is therefore trained without it.

Parameters while training, of hidden size f: n d for e, and d f + f + f f + f + f d + d for the MLP; of SmolLM2-135M
(d = f = 576) with 20 tokens that is 1.0 million for 11,520 numbers that are kept.

Left out: the paper also puts virtual tokens between the words of a template, and takes the cloze position as output.

Sources: arXiv 2103.10385; PEFT `tuners/p_tuning/model.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from minift.adapters.prompt import EmbeddedMethod
from minift.model.decoder import CausalLM

ENCODERS = {"mlp": "MLP", "lstm": "LSTM"}  # ours -> PEFT's


@dataclass(frozen=True)
class PTuningConfig(EmbeddedMethod):
    """Settings of P-tuning.

    Attributes:
        encoder_type: "mlp" or "lstm".
        encoder_hidden_size: f; None is the width of the embeddings.
        encoder_num_layers, encoder_dropout: of the LSTM.
    """

    encoder_type: str = "mlp"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    name: ClassVar[str] = "p-tuning"
    peft_type: ClassVar[str] = "P_TUNING"
    settings: ClassVar[tuple[str, ...]] = (
        "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_type not in ENCODERS:
            raise ValueError(f"p-tuning encoder_type {self.encoder_type!r}: choose one of {', '.join(ENCODERS)}")
        for name in ("encoder_hidden_size", "encoder_num_layers"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"p-tuning {name} must be at least 1, got {value!r}")
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"p-tuning encoder_dropout must be at least 0 and below 1, got {self.encoder_dropout!r}")

    def hidden_size(self, model: CausalLM) -> int:
        """f."""
        return self.encoder_hidden_size or model.config.embedding_size

    def encoder(self, model: CausalLM) -> nn.Module:
        return PromptEncoder(self, model.config.embedding_size, self.hidden_size(model))

    def to_file(self, model: CausalLM) -> dict[str, Any]:
        return super().to_file(model) | {
            "encoder_dropout": self.encoder_dropout,
            "encoder_hidden_size": self.hidden_size(model),
            "encoder_num_layers": self.encoder_num_layers,
            "encoder_reparameterization_type": ENCODERS[self.encoder_type],
        }

    @classmethod
    def of_file(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        cls.check_file(content)
        return cls(
            num_virtual_tokens=content["num_virtual_tokens"],
            encoder_type=content["encoder_reparameterization_type"].lower(),
            encoder_hidden_size=content.get("encoder_hidden_size"),
            encoder_num_layers=content.get("encoder_num_layers", 2),
            encoder_dropout=content.get("encoder_dropout", 0.0),
        )


class PromptEncoder(nn.Module):
    """The net; its parts are called, and drawn in the order, as in PEFT."""

    def __init__(self, config: PTuningConfig, width: int, hidden: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(config.num_virtual_tokens, width, device="cpu"))
        if config.encoder_type == "mlp":
            self.mlp_head = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )
            return
        self.lstm_head = nn.LSTM(
            width,
            hidden,
            num_layers=config.encoder_num_layers,
            dropout=config.encoder_dropout,
            bidirectional=True,
            batch_first=True,
        )
        self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def forward(self) -> Tensor:
        """The virtual tokens' embeddings, fp32 [n, d]."""
        if not hasattr(self, "lstm_head"):
            return self.mlp_head(self.embedding)
        return self.mlp_head(self.lstm_head(self.embedding.unsqueeze(0))[0]).squeeze(0)
