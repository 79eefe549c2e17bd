"""Phi-3-mini as chapter 0 of the book fine-tunes it, by its shapes: bytes and counts without its weights.

    2206.35 MB  loaded in NF4 with double quantization     linears / 2  +  2 * others                +  rotary tables
    2651.08 MB  prepared for training, with LoRA (r = 8)   linears / 2  +  4 * others  +  4 * LoRA   +  rotary tables

The book calls transformers' get_memory_footprint, which counts parameters and buffers, but not the quantization state
(57 MB). In its transformers 4, each layer also held a rotary table of 48 fp32 numbers; minift computes it when needed.

Source: D. Voigt Godoy, A Hands-On Guide to Fine-Tuning LLMs, chapter 0; microsoft/Phi-3-mini-4k-instruct, config.json.
"""

from dataclasses import dataclass

import torch

from minift.adapters.inject import add_lora, count_parameters
from minift.adapters.kbit import prepare_for_kbit_training
from minift.adapters.lora import LoraConfig
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.quant.config import QuantConfig
from minift.quant.linear import QuantizedLinear
from minift.quant.model import swap_linears
from minift.study.memory import footprint, module_table

PHI3_MINI = ModelConfig.from_dict({
    "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
})  # fmt: skip
ROTARY = 32 * 48 * 4  # bytes of the rotary tables of its layers: 48 numbers of fp32 each
BOOK_LOADED, BOOK_PREPARED = 2_206_347_264, 2_651_080_704


@dataclass(frozen=True)
class Phi3Parts:
    """Numbers of parameters: in the quantized linears, in everything else, in LoRA's matrices.

    `loaded` and `prepared` are bytes by the formulas above; `state` the quantization state, which they leave out.
    """

    linears: int
    others: int
    lora: int
    state: int

    @property
    def loaded(self) -> int:
        return self.linears // 2 + 2 * self.others + ROTARY

    @property
    def prepared(self) -> int:
        return self.linears // 2 + 4 * self.others + 4 * self.lora + ROTARY


def phi3(lora: LoraConfig | None = None, policy: str = "peft") -> CausalLM:
    """Phi-3-mini in NF4 on the meta device: shapes and dtypes, no memory.

    Args:
        lora: prepared for training as `policy` says (adapters/kbit.py), and with these adapters; None: as loaded.
    """
    with torch.device("meta"):
        model = CausalLM(PHI3_MINI).to(torch.bfloat16)
        swap_linears(model, QuantConfig())
        if lora:
            prepare_for_kbit_training(model, policy)
            add_lora(model, lora)
    return model


def phi3_parts(lora: LoraConfig | None = None) -> Phi3Parts:
    """The counts, from the model itself; `lora` is the book's (r = 8 on every linear layer) unless given."""
    model = phi3(lora or LoraConfig(r=8))
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    linears = sum(layer.in_features * layer.out_features for layer in layers)
    trained, total = count_parameters(model)
    rows = module_table(model)
    state = footprint(rows) - footprint(rows, quant_state=False)
    return Phi3Parts(linears, total - trained - linears, trained, state)
