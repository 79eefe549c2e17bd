"""The book's two models as the Hub describes them: shapes, on the meta device, without weights."""

import torch
import transformers

from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM

PHI3 = transformers.Phi3Config(  # microsoft/Phi-3-mini-4k-instruct
    vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, pad_token_id=32000, tie_word_embeddings=False,
)  # fmt: skip
OPT = transformers.OPTConfig(  # facebook/opt-350m
    vocab_size=50272, hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16,
    word_embed_proj_dim=512, do_layer_norm_before=False, max_position_embeddings=2048,
)  # fmt: skip


def on_meta(config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The model of a configuration, without memory."""
    with torch.device("meta"):
        return CausalLM(ModelConfig.from_dict(config.to_dict())).to(dtype)
