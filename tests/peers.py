# type: ignore (the peers are only partly typed; this file calls little else)
"""The peers as a reference: transformers, PEFT, TRL and bitsandbytes on the CPU, on tiny models made here.

Everything a test compares with comes out of the installed libraries; nothing of minift is imported.
"""

import contextlib
import tempfile
import time
import warnings
from dataclasses import dataclass, field

import torch

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same text, with the assistant's turn (and its end marker) inside {% generation %}
CHATML_GENERATION = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LINES = [
    SYSTEM,
    "What is the capital of France? The capital of France is Paris.",
    "Name three colours. Red, green and blue are three colours.",
    "How many legs has a spider? A spider has 8 legs, an insect has 6.",
    "Write a short poem about the sea. The sea is wide, the sea is deep, it sings the sailors all to sleep.",
    "user assistant system answer question please explain why the sky is blue",
]


@contextlib.contextmanager
def _quiet():
    """No warnings and no progress bars; bitsandbytes' and TRL's log lines still pass."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- tiny checkpoints


def tiny_tokenizer(template: str = CHATML, size: int = 384):
    """A byte-level BPE with SmolLM2's special tokens, pre-tokenizer and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=template,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


@_quiet()
def tiny_llama(
    folder,
    tied: bool = True,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 64,
    layers: int = 2,
    vocab: int | None = None,
    seed: int = 0,
    intermediate: int | None = None,
    head_dim: int | None = None,
    std: float = 0.08,
    dtype: str = "float32",
    template: str = CHATML,
) -> str:
    """Save a tiny random LlamaForCausalLM and its tokenizer; returns the folder.

    `hidden=64` (and the default `intermediate=128`) gives in_features that are multiples of 64.
    `hidden=65, heads=5, kv_heads=1` gives odd in_features (65 and 131): transformers demands
    hidden % heads == 0, and head_dim must be even, so it is 16 there. Norm weights are random too.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(template)
    vocab = vocab or len(tokenizer)
    if vocab < len(tokenizer):
        raise ValueError(f"vocab must be at least {len(tokenizer)}")
    if intermediate is None:
        intermediate = 2 * hidden + hidden % 2
    if head_dim is None:
        head_dim = hidden // heads if hidden % heads == 0 and (hidden // heads) % 2 == 0 else 16
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attention_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "norm" in name:
                    value.copy_(1 + 0.1 * torch.randn(value.shape))
                else:
                    value.copy_(std * torch.randn(value.shape))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# --- the base model


def _bnb_config(dtype: str, double_quant: bool):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


@_quiet()
def peer_base(
    folder,
    *,
    nf4: bool = True,
    double_quant: bool = True,
    dtype: str = "float32",
    compute_dtype: str | None = None,
    weights: dict | None = None,
    attention: str = "sdpa",
):
    """The base model in train() mode (in eval() mode bnb would repack the weights and round absmax)."""
    from transformers import AutoModelForCausalLM

    kwargs = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if weights is None and nf4:
        kwargs["quantization_config"] = _bnb_config(compute_dtype or dtype, double_quant)
        kwargs["device_map"] = {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(str(folder), **kwargs)
    if weights is not None:
        tied = bool(model.config.tie_word_embeddings)
        given = {name: value.to(getattr(torch, dtype)) for name, value in weights.items()}
        missing, unknown = model.load_state_dict(given, strict=False)
        missing = [name for name in missing if not (tied and name == "lm_head.weight")]
        if missing or unknown:
            raise ValueError(f"weights do not fit: missing {missing}, unknown {unknown}")
        model.tie_weights()
    return model.train()


def _nf4_layers(model):
    import bitsandbytes as bnb

    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise RuntimeError(f"{name}: bitsandbytes repacked this layer for inference; absmax is rounded")
            yield name, module


@torch.no_grad()
def peer_nf4_weights(folder, *, double_quant: bool = True, dtype: str = "float32", model=None) -> dict:
    """All weights of the peer's NF4 base, dequantized, as the peer's forward and backward use them.

    Names are those of the checkpoint ("model.layers.0.self_attn.q_proj.weight", ...; "lm_head.weight"
    only when untied). They can go into `peer_run(weights=...)` and into any other library.
    """
    import bitsandbytes as bnb

    model = model if model is not None else peer_base(folder, nf4=True, double_quant=double_quant, dtype=dtype)
    quantized = dict(_nf4_layers(model))
    out = {}
    for name, value in model.named_parameters():  # tied parameters appear once
        owner = name.rpartition(".")[0]
        if owner in quantized and name.endswith(".weight"):
            out[name] = bnb.functional.dequantize_4bit(value.data, value.quant_state).clone()
        else:
            out[name] = value.detach().clone()
    return out


@torch.no_grad()
def peer_nf4_tensors(folder, *, double_quant: bool = True, dtype: str = "float32", model=None) -> dict:
    """The packed tensors of every NF4 layer under bitsandbytes' checkpoint keys.

    P.weight, P.weight.absmax, P.weight.nested_absmax, P.weight.nested_quant_map,
    P.weight.quant_map, P.weight.quant_state.bitsandbytes__nf4 (JSON bytes).
    """
    model = model if model is not None else peer_base(folder, nf4=True, double_quant=double_quant, dtype=dtype)
    out = {}
    for name, module in _nf4_layers(model):
        out[f"{name}.weight"] = module.weight.data.clone()
        for key, value in module.weight.quant_state.as_dict(packed=True).items():
            out[f"{name}.weight.{key}"] = value.clone()
    return out


# --- LoRA


def _adapter(model) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names of adapter_model.safetensors."""
    return {
        name.replace(".default.weight", ".weight"): value.detach().clone()
        for name, value in model.named_parameters()
        if ".lora_" in name
    }


def _load_adapter(model, adapter: dict) -> None:
    ours = {name.replace(".default.weight", ".weight"): value for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, value in adapter.items():
            ours[name].copy_(value)


# --- SFTTrainer


@dataclass
class PeerRun:
    steps: list[dict] = field(default_factory=list)  # loss, grad_norm, learning_rate: unrounded
    first: dict = field(default_factory=dict)  # adapter (or all trainable weights) before the first step
    last: dict = field(default_factory=dict)  # ... after the last one
    grads: list[dict] = field(default_factory=list)  # per step, after clipping, when asked for
    seconds: list[float] = field(default_factory=list)  # per optimizer step
    cpu_seconds: list[float] = field(default_factory=list)  # ... processor time of all threads
    dtypes: dict = field(default_factory=dict)  # trainable dtype before and after SFTTrainer's own cast
    summary: dict = field(default_factory=dict)  # the last log record (train_loss, ...)


def _config(output, **kwargs):
    from trl import SFTConfig

    settings = {
        "output_dir": output,
        "use_cpu": True,
        "bf16": False,  # SFTConfig's default is True
        "fp16": False,
        "loss_type": "nll",
        "shuffle_dataset": False,  # the default; shuffles the prepared dataset when True
        "train_sampling_strategy": "sequential",  # the default "random" is a RandomSampler
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # True replaces a nan loss by an average
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "optim": "adamw_torch",  # the default is adamw_torch_fused
        "weight_decay": 0.0,
        "gradient_checkpointing": False,  # SFTConfig's default is True
    }
    settings.update(kwargs)
    return SFTConfig(**settings)


def _data(rows):
    from datasets import Dataset

    return Dataset.from_list([dict(row) for row in rows])


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def peer_run(
    folder,
    rows,
    *,
    nf4: bool = True,
    double_quant: bool = True,
    weights: dict | None = None,
    lora_r: int = 8,
    lora_alpha: int = 16,
    targets=None,
    adapter: dict | None = None,
    batch_size: int = 4,
    accumulation: int = 1,
    max_steps: int = 4,
    lr: float = 1e-3,
    schedule: str = "linear",
    warmup_steps: float = 0,
    max_grad_norm: float = 1.0,
    max_length: int | None = 1024,
    completion_only: bool | None = None,
    assistant_only: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    autocast: bool = False,
    compute_dtype: str | None = None,
    gradient_checkpointing: bool = False,
    packing: bool = False,
    packing_strategy: str = "bfd",
    attention: str = "sdpa",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    keep_trl_cast: bool = False,
    keep_grads: bool = False,
    adapter_folder=None,
) -> PeerRun:
    """Train with trl.SFTTrainer on the CPU, rows in order.

    lora_r=0 trains every weight (needs nf4=False). `weights` replaces the base weights (nf4 is then off).
    `adapter` overwrites the drawn adapter. `keep_trl_cast=False` undoes SFTTrainer's bf16 cast of the
    LoRA weights of a quantized base, so that everything stays in fp32.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTTrainer

    nf4 = nf4 and weights is None
    model = peer_base(
        folder,
        nf4=nf4,
        double_quant=double_quant,
        dtype=dtype,
        compute_dtype=compute_dtype,
        weights=weights,
        attention=attention,
    )
    if lora_r:
        config = LoraConfig(
            r=lora_r,
            lora_alpha=lora_alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=list(targets or SEVEN),
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)  # PEFT draws inside get_peft_model and nowhere else
        with _quiet():
            model = get_peft_model(model, config)
        if adapter is not None:
            _load_adapter(model, adapter)
    elif nf4:
        raise ValueError("a quantized base needs lora_r > 0")

    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    kept = {name: value.detach().clone() for name, value in trainable.items()}
    run = PeerRun()
    run.dtypes["drawn"] = sorted({str(value.dtype) for value in trainable.values()})

    def snapshot():
        if lora_r:
            return _adapter(model)
        return {name: value.detach().clone() for name, value in trainable.items()}

    class Recorder(TrainerCallback):
        def __init__(self):
            self.started = self.cpu_started = None

        def on_step_begin(self, args, state, control, **kwargs):
            self.started = time.perf_counter()
            self.cpu_started = time.process_time()

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if keep_grads:
                run.grads.append(
                    {
                        name.replace(".default.weight", ".weight"): value.grad.detach().clone()
                        for name, value in trainable.items()
                        if value.grad is not None
                    }
                )

        def on_step_end(self, args, state, control, **kwargs):
            run.seconds.append(time.perf_counter() - self.started)
            run.cpu_seconds.append(time.process_time() - self.cpu_started)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "learning_rate" in logs:
                run.steps.append({key: logs[key] for key in ("loss", "grad_norm", "learning_rate")})
            elif logs:
                run.summary = dict(logs)

    with tempfile.TemporaryDirectory() as output, _quiet():
        trainer = SFTTrainer(
            model=model,
            args=_config(
                output,
                bf16=autocast,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                max_steps=max_steps,
                learning_rate=lr,
                lr_scheduler_type=schedule,
                warmup_steps=warmup_steps,
                max_grad_norm=max_grad_norm,
                max_length=max_length,
                completion_only_loss=completion_only,
                assistant_only_loss=assistant_only,
                seed=seed,
                gradient_checkpointing=gradient_checkpointing,
                packing=packing,
                packing_strategy=packing_strategy,
                weight_decay=weight_decay,
                adam_beta1=betas[0],
                adam_beta2=betas[1],
            ),
            train_dataset=_data(rows),
            processing_class=_tokenizer(folder),
            callbacks=[Recorder()],
        )
        trainer.remove_callback(PrinterCallback)  # it prints "%.4g"; the log records themselves are not rounded
        run.dtypes["after SFTTrainer"] = sorted({str(value.dtype) for value in trainable.values()})
        if not keep_trl_cast:
            # SFTTrainer has rounded the LoRA weights of a quantized base to bf16; the optimizer does not exist yet
            for name, value in trainable.items():
                value.data = kept[name].clone()
        run.dtypes["trained"] = sorted({str(value.dtype) for value in trainable.values()})
        run.first = snapshot()
        if adapter_folder is not None:
            model.save_pretrained(str(adapter_folder))
        trainer.train()
        run.last = snapshot()
        if nf4:
            list(_nf4_layers(model))  # raises when a layer was repacked on the way
    return run


# --- data only


def _data_trainer(folder, rows, output, *, attention="sdpa", **settings):
    """An SFTTrainer around a one-layer stand-in model: only its data side is used."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import SFTTrainer

    config = AutoConfig.from_pretrained(str(folder))
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 8, 8, 1
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 1, 1, 8
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return SFTTrainer(
        model=model,
        args=_config(output, **settings),
        train_dataset=_data(rows),
        processing_class=_tokenizer(folder),
    )


def peer_tokens(
    folder, rows, completion_only: bool | None = None, max_length: int | None = 1024, assistant_only: bool = False
) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of every row that SFTTrainer keeps, in its order, before collation.

    Rows of one call must have the same columns: {messages}, {prompt, completion} or {text}.
    """
    with tempfile.TemporaryDirectory() as output, _quiet():
        trainer = _data_trainer(
            folder,
            rows,
            output,
            completion_only_loss=completion_only,
            assistant_only_loss=assistant_only,
            max_length=max_length,
        )
        return [(list(row["input_ids"]), list(row["labels"])) for row in trainer.train_dataset]


def peer_packs(folder, rows, length: int, strategy: str = "bfd", completion_only: bool | None = None) -> list[dict]:
    """Packed rows: input_ids, labels, seq_lengths (absent for "wrapped"), in SFTTrainer's order."""
    with tempfile.TemporaryDirectory() as output, _quiet():
        trainer = _data_trainer(
            folder,
            rows,
            output,
            completion_only_loss=completion_only,
            max_length=length,
            packing=True,
            packing_strategy=strategy,
        )
        keys = ("input_ids", "labels", "seq_lengths")
        return [{key: list(row[key]) for key in keys if key in row} for row in trainer.train_dataset]


def demo_rows(count: int = 12) -> list[dict]:
    """Rows of unequal length as {prompt, completion} message lists."""
    words = ["the", "sea", "is", "wide", "and", "deep", "it", "sings", "the", "sailors", "all", "to", "sleep"]
    rows = []
    for index in range(count):
        question = f"Question {index}: " + " ".join(words[: 2 + (index * 5) % 9]) + "?"
        answer = " ".join(words[(index * 3) % 7 :][: 1 + (index * 7) % 6]) + "."
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return rows


def as_messages(rows: list[dict]) -> list[dict]:
    return [{"messages": row["prompt"] + row["completion"]} for row in rows]


def as_strings(rows: list[dict]) -> list[dict]:
    return [
        {"prompt": row["prompt"][-1]["content"] + "\n", "completion": row["completion"][-1]["content"]} for row in rows
    ]


def as_text(rows: list[dict]) -> list[dict]:
    return [{"text": row["prompt"][-1]["content"] + " " + row["completion"][-1]["content"]} for row in rows]
