"""The book's measurements (tables 5.2 to 5.5): most memory allocated while training, and what the ledger says here.

    OPT-350M in 16 bits        12 rows     with and without checkpointing, LoRA, accumulation or 8-bit Adam
    OPT-350M in 8 bits, LoRA    8 rows     with and without checkpointing and mixed precision
    Falcon 7B in 8 bits, LoRA   8 rows     kept as they were printed; minift has no Falcon, so nothing is predicted

each for eager, PyTorch's fused (SDPA) and flash attention, one row of 500 or 2000 tokens, in MB.

The programs differ, so the numbers must. There, the head makes the logits of all tokens with fp32 copies, here of a few
rows at a time; eager attention keeps 8 bytes a score there and 2 here; Adam's means are in 16 bits there, in 4 bytes
each here. What is alike (fused attention, LoRA, 16-bit weights, every activation kept) agrees within 6 %. With 8-bit
weights every step takes more there; the tables alone do not say for what.

Source: D. Voigt Godoy, A Hands-On Guide to Fine-Tuning LLMs, chapter 5.
"""

from dataclasses import dataclass

import torch

from minift.adapters.lora import LoraConfig
from minift.model.config import ModelConfig
from minift.quant.config import QuantConfig
from minift.study.ledger import predict
from minift.study.setting import Setting

MB = 10**6
ATTENTIONS = ("eager", "sdpa", "flash")
OPT_350M = ModelConfig.from_dict({
    "model_type": "opt", "vocab_size": 50272, "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "max_position_embeddings": 2048, "word_embed_proj_dim": 512,
    "do_layer_norm_before": False,
})  # fmt: skip


@dataclass(frozen=True)
class Ablation:
    """A row of the book's tables, in MB.

    Attributes:
        small_state: 8-bit Adam, or accumulated gradients, which gave the same; of no influence with LoRA.
        int8: weights in 8 bits, not 16.
        mixed: with int8, compute in 16 bits instead of 32.
    """

    tokens: int
    checkpointing: bool
    lora: bool
    eager: int
    sdpa: int
    flash: int
    small_state: bool = False
    int8: bool = False
    mixed: bool = True

    @property
    def label(self) -> str:
        """In a few words."""
        kind = ("mixed" if self.mixed else "fp32") if self.int8 else "LoRA" if self.lora else "full"
        return f"{self.tokens}, {kind}{', 8-bit Adam' * self.small_state}{', ckpt' * self.checkpointing}"


ABLATIONS = (
    Ablation(500, False, False, 3441, 3435, 3435), Ablation(2000, False, False, 15071, 3737, 3742),
    Ablation(500, False, False, 2011, 1552, 1552, True), Ablation(2000, False, False, 15071, 2908, 2807, True),
    Ablation(500, False, True, 2066, 1287, 1287), Ablation(2000, False, True, 15266, 3109, 3108),
    Ablation(500, True, False, 3387, 3386, 3386), Ablation(2000, True, False, 3532, 3537, 3538),
    Ablation(500, True, False, 1503, 1502, 1502, True), Ablation(2000, True, False, 2589, 1667, 1657, True),
    Ablation(500, True, True, 914, 914, 913), Ablation(2000, True, True, 2059, 1603, 1595),
)  # fmt: skip
INT8_ABLATIONS = tuple(
    Ablation(tokens, checkpointing, True, *measured, int8=True, mixed=mixed)
    for tokens, checkpointing, mixed, measured in (
        (2000, False, False, (17744, 5544, 5544)), (2000, False, True, (20491, 5294, 5193)),
        (500, False, False, (2518, 1717, 1715)), (500, False, True, (2670, 1692, 1668)),
        (2000, True, False, (2501, 2294, 2275)), (2000, True, True, (2481, 2144, 2126)),
        (500, True, False, (903, 904, 903)), (500, True, True, (906, 906, 905)),
    )
)  # fmt: skip
# (tokens, checkpointing, mixed) -> (SDPA, flash); None: out of memory.
FALCON_7B: dict[tuple[int, bool, bool], tuple[int, int] | None] = {
    (2000, False, False): None, (2000, False, True): None,
    (500, False, False): (15050, 12483), (500, False, True): (13957, 12824),
    (2000, True, False): (12280, 11511), (2000, True, True): (12280, 11511),
    (500, True, False): (10369, 10369), (500, True, True): (10369, 10369),
}  # fmt: skip


def ablation(tokens: int, checkpointing: bool, lora: bool) -> Ablation:
    """The row with these settings, of the model in 16 bits with ordinary Adam."""
    rows = (row for row in ABLATIONS if not row.small_state)
    return next(r for r in rows if (r.tokens, r.checkpointing, r.lora) == (tokens, checkpointing, lora))


def setting_of_row(row: Ablation, attention: str) -> Setting:
    """The same step here."""
    lora = LoraConfig(r=8, target_modules=("q_proj", "v_proj")) if row.lora else None
    quantize, dtype = QuantConfig("int8") if row.int8 else None, torch.bfloat16 if row.mixed else torch.float32
    optimizer = "adamw8bit" if row.small_state else "adamw"
    return Setting(OPT_350M, 1, row.tokens, dtype, quantize, lora, row.checkpointing, attention, optimizer,
                   device="cuda")  # fmt: skip


def predicted_ablations(rows: tuple[Ablation, ...] = ABLATIONS) -> list[tuple[Ablation, dict[str, int]]]:
    """Each row, and what the ledger says of the same step here, in MB, by attention."""
    return [
        (row, {attention: round(predict(setting_of_row(row, attention)).peak / MB) for attention in ATTENTIONS})
        for row in rows
    ]
