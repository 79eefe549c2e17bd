"""minift: how LLM fine-tuning works, by being a complete, exact and fast implementation of it.

The rooms, from the ground up (a file imports only from lower floors):

    numerics  sources        how one number is rounded; where a model's files come from
    quant                    how a tensor is stored in 4 or 8 bits
    optim  model  data       optimizers; the decoder; rows, tokens, labels, batches
    adapters                 LoRA and its relatives
    train                    the step, the loop, checkpoints
    study                    tables and plots
    cli                      the `minift` command
    course                   exercises and their judge; imports nothing of the above

Tensor names end in their dimensions (`x_bsd`, `weight_oi`):

    b batch row     s query position    t key position      d model width       h query head    g key/value head
    e head width    f MLP width         v vocabulary        i / o in / out features             r LoRA rank
    n flat elements                     m quantization block                    c element within a block
"""

from minift.adapters.inject import add_lora
from minift.adapters.kbit import prepare_for_kbit_training
from minift.adapters.lora import LoraConfig
from minift.adapters.many import combine, disabled, set_adapter
from minift.adapters.merge import merge_lora, unmerge_lora
from minift.adapters.serving import adapters_of_rows
from minift.adapters.verbs import add_adapter, load_adapter, save_adapter
from minift.data.collate import Batch, collate, flatten
from minift.data.encode import Example, encode
from minift.data.formats import read_dataset
from minift.data.packing import pack
from minift.data.report import examine
from minift.data.templates import use_template
from minift.data.tokenizer import Tokenizer, load_tokenizer
from minift.model.decoder import CausalLM
from minift.model.generate import Sampling, generate
from minift.model.load import load_model
from minift.model.resize import resize_embeddings
from minift.model.save import save_model
from minift.optim.adamw import AdamW
from minift.optim.adamw8bit import AdamW8bit
from minift.quant.config import QuantConfig
from minift.train.config import TrainConfig
from minift.train.loop import TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "AdamW8bit",
    "Batch",
    "CausalLM",
    "Example",
    "LoraConfig",
    "QuantConfig",
    "Sampling",
    "Tokenizer",
    "TrainConfig",
    "TrainResult",
    "adapters_of_rows",
    "add_adapter",
    "add_lora",
    "collate",
    "combine",
    "disabled",
    "encode",
    "examine",
    "flatten",
    "generate",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "merge_lora",
    "pack",
    "prepare_for_kbit_training",
    "read_dataset",
    "resize_embeddings",
    "save_adapter",
    "save_model",
    "set_adapter",
    "train",
    "unmerge_lora",
    "use_template",
]
