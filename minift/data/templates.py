"""Ready chat templates: the same conversation in nine dialects.

    chatml     <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n             each turn has a header and an end
    llama-2    <s>[INST] <<SYS>>\\nBe brief.\\n<</SYS>>\\n\\nHi [/INST]               the system is in the first turn
    gemma      <bos><start_of_turn>user\\nHi<end_of_turn>\\n<start_of_turn>model\\n   there is no system
    harmony    <|start|>user<|message|>Hi<|end|><|start|>assistant                 the answer names its channel

A model only understands the dialect that it was trained in: take the checkpoint's own template if there is one, and one
of these for a base model. Each is written from the published format that its note names (dialects.py), gives the same
text, and marks what the assistant says.

A token such as <|im_start|> has to be *one* token. `use_template` registers those that the tokenizer lacks; new ones
need rows in the model (`resize_embeddings`, which does nothing where there is room).

Messages of a role that the dialect does not have are refused; some published templates drop them without a word. Left
out: definitions of tools. The dialects that have them (mistral, harmony, smollm3) refuse tools, the rest never had any.
"""

import re
from dataclasses import dataclass

from minift.data import dialects
from minift.data.chat import compile_template
from minift.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatTemplate:
    """A dialect.

    Attributes:
        source: the Jinja program.
        special_tokens: texts that must be one token each; plain text in between may look like them.
        end_of_turn: the token that ends the assistant's turn; "eos_token" is the tokenizer's own.
        roles: tokens of the tokenizer that the template writes ("bos_token", "eos_token").
        note: the published format it follows.
    """

    source: str
    special_tokens: tuple[str, ...] = ()
    end_of_turn: str = "eos_token"
    roles: tuple[str, ...] = ()
    note: str = ""


def use_template(tokenizer: Tokenizer, template: str | ChatTemplate) -> list[str]:
    """Give a tokenizer a template, and make the template's special tokens single tokens.

    Args:
        tokenizer: is changed.
        template: a name in TEMPLATES; a ChatTemplate of your own; or the Jinja source of one, whose texts of the form
            <|name|> are taken for its special tokens.

    Returns:
        The tokens that the vocabulary did not have. If there are any, call `resize_embeddings(model, len(tokenizer))`.

    Raises:
        ValueError: an unknown name, broken Jinja, or a template that writes a token that the tokenizer does not have.
    """
    chosen = template if isinstance(template, ChatTemplate) else _find(template)
    compile_template(chosen.source)
    if missing := [role for role in chosen.roles if role not in tokenizer.special]:
        raise ValueError(
            f"this template writes the tokenizer's {' and '.join(missing)}, and this tokenizer has none; "
            "name one in tokenizer_config.json, or use another template"
        )
    before = len(tokenizer)
    ids = tokenizer.add_tokens(chosen.special_tokens)
    tokenizer.template = chosen.source
    return [token for token, index in zip(chosen.special_tokens, ids, strict=True) if index >= before]


def _find(name_or_source: str) -> ChatTemplate:
    if name_or_source in TEMPLATES:
        return TEMPLATES[name_or_source]
    if "{{" not in name_or_source and "{%" not in name_or_source:
        raise ValueError(
            f"unknown chat template {name_or_source!r}: choose one of {', '.join(TEMPLATES)}, or pass Jinja"
        )
    return ChatTemplate(name_or_source, tuple(dict.fromkeys(re.findall(r"<\|[^|<>\s]+\|>", name_or_source))))


IM = ("<|im_start|>", "<|im_end|>")
BOTH = ("bos_token", "eos_token")
TEMPLATES = {
    "chatml": ChatTemplate(
        dialects.CHATML, IM, "<|im_end|>", note="OpenAI's Chat Markup Language, as Qwen and SmolLM2 use it"
    ),
    "llama-2": ChatTemplate(
        dialects.LLAMA2, roles=BOTH, note="chat_completion of facebookresearch/llama; [INST] is plain text"
    ),
    "llama-3": ChatTemplate(
        dialects.LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        roles=("bos_token",),
        note="Meta-Llama-3-8B-Instruct",
    ),
    "mistral": ChatTemplate(
        dialects.MISTRAL,
        ("[INST]", "[/INST]"),
        roles=BOTH,
        note="v3 of mistral-common (Mistral-7B-Instruct-v0.3): the system is part of the last user's turn",
    ),
    "phi-3": ChatTemplate(
        dialects.PHI3,
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
        roles=("eos_token",),
        note="Phi-3-mini-4k-instruct: the tokenizer's own eos_token ends the conversation",
    ),
    "zephyr": ChatTemplate(
        dialects.ZEPHYR, roles=("eos_token",), note="zephyr-7b-beta and TinyLlama-1.1B-Chat; <|user|> is plain text"
    ),
    "gemma": ChatTemplate(
        dialects.GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        roles=("bos_token",),
        note="gemma-7b-it and gemma-2: the assistant is called model",
    ),
    "harmony": ChatTemplate(
        dialects.HARMONY,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        "<|return|>",
        note="gpt-oss; variables: reasoning_effort, model_identity; messages may have thinking and tool_calls",
    ),
    "smollm3": ChatTemplate(
        dialects.SMOLLM3,
        IM,
        "<|im_end|>",
        note="SmolLM3-3B: /think or /no_think in the system message, or enable_thinking",
    ),
}
