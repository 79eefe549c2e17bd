"""One f-string a turn; lets the tokenizer add the start and leaves it out of the text that it is given."""

import re


def turn(role, content):
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def render(messages, add_generation_prompt=False):
    if {m["role"] for m in messages} - {"system", "user", "assistant"}:
        raise ValueError("unknown role")
    if any(re.search(r"<s>|<\|im_(start|end)\|>", m["content"]) for m in messages):
        raise ValueError("special token in a message")
    text = "<s>" if messages[0]["role"] == "system" else "<s>" + turn("system", "You are a helpful assistant.")
    text += "".join(turn(m["role"], m["content"]) for m in messages)
    return text + "<|im_start|>assistant\n" * add_generation_prompt


def training_ids(messages, tokenizer):
    return tokenizer(render(messages)[len("<s>") :])


def prompt_ids(messages, tokenizer):
    return tokenizer(render(messages, True)[len("<s>") :], add_special_tokens=True)
