"""Five ways to write a chat, each with the kind of tokenizer it comes with, made here: folders for Tokenizer and TRL.

chatml   byte-level; every token of the frame is special
llama3   byte-level with a begin token and a post-processor that trims offsets; content is trimmed
zephyr   SentencePiece-like; the header is ordinary text, only the end of a turn is a token
phi3     SentencePiece-like; special tokens swallow the space behind them, a last token ends the whole
llama2   SentencePiece-like; [INST] is ordinary text, the system message goes into the first turn
gemma    BPE without spaces in front; begin token; no post-processor
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend


class Dialect(NamedTuple):
    """`template` has {% generation %} marks; `frame` are its control tokens; `end` is how it ends an answer."""

    make: Callable[[], Backend]
    roles: dict[str, str]
    template: str
    frame: list[str]
    end: str


def byte_level(frame: list[str], begin: str | None = None) -> Backend:
    tokenizer = peers.tiny_tokenizer().backend_tokenizer
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in frame])
    if begin is not None:
        put = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), put])
    return tokenizer


def sentencepiece(frame: list[str], rstrip: bool = False, spaces: bool = True) -> Backend:
    """Pieces with a space mark, bytes to fall back to; `spaces`: one is put in front of every stretch of text."""
    names = ["<unk>", "<s>", "</s>"]
    trained = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = [*names, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    trained.train_from_iterator(peers.LINES * 2, trainer)
    tokenizer = Backend(trained.model)
    mark = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), mark]) if spaces else mark
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * spaces)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, rstrip=rstrip) for token in frame])
    return tokenizer


SAYS = "{% generation %}{{ CONTENT }}END{% endgeneration %}"


def says(content: str, end: str) -> str:
    return SAYS.replace("CONTENT", content).replace("END", end)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    + says("m.content", "<|im_end|>")
    + "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' }}"
    "{% if m.role == 'assistant' %}"
    + says("m.content | trim", "<|eot_id|>")
    + "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>{{ '\n' }}{% if m.role == 'assistant' %}"
    + says("m.content", "{{ eos_token }}")
    + "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>{{ '\n' }}{% if m.role == 'assistant' %}"
    + says("m.content", "<|end|>\n")
    + "{% else %}{{ m.content }}<|end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% elif messages[-1].role == 'assistant' %}"
    "{% generation %}{{ eos_token }}{% endgeneration %}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {% if loop.first %}{{ system }}{% endif %}{{ m.content }} [/INST]"
    "{% else %}{{ ' ' }}" + says("m.content", " {{ eos_token }}") + "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' }}"
    "{% if m.role == 'assistant' %}"
    + says("m.content | trim", "<end_of_turn>{{ '\n' }}")
    + "{% else %}{{ m.content | trim }}<end_of_turn>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PHI = ["<|endoftext|>", "<|assistant|>", "<|user|>", "<|system|>", "<|end|>"]
TURNS = ["<start_of_turn>", "<end_of_turn>"]
SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

DIALECTS = {
    "chatml": Dialect(
        lambda: byte_level([]),
        {"eos_token": "<|im_end|>"},
        CHATML,
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        "<|im_end|>",
    ),
    "llama3": Dialect(
        lambda: byte_level(HEADERS, HEADERS[0]),
        {"bos_token": HEADERS[0], "eos_token": "<|eot_id|>"},
        LLAMA3,
        HEADERS,
        "<|eot_id|>",
    ),
    "zephyr": Dialect(lambda: sentencepiece([]), SENTENCE, ZEPHYR, ["<s>", "</s>"], "</s>"),
    "phi3": Dialect(
        lambda: sentencepiece(PHI, rstrip=True), SENTENCE | {"eos_token": PHI[0]}, PHI3, [*PHI, "<s>"], "<|end|>"
    ),
    "llama2": Dialect(lambda: sentencepiece([]), SENTENCE, LLAMA2, ["<s>", "</s>"], " </s>"),
    "gemma": Dialect(
        lambda: sentencepiece(TURNS, spaces=False),
        SENTENCE | {"eos_token": TURNS[1]},
        GEMMA,
        [*TURNS, "<s>", "</s>"],
        TURNS[1],
    ),
}


def write(tiny: Path, folder: Path, dialect: Dialect, marked: bool = True) -> Path:
    """A checkpoint folder without weights. `tiny` lends its config.json."""
    folder.mkdir(parents=True)
    shutil.copy(tiny / "config.json", folder)
    dialect.make().save(str(folder / "tokenizer.json"))
    config = dialect.roles | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    template = dialect.template if marked else re.sub(r"{% (end)?generation %}", "", dialect.template)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
