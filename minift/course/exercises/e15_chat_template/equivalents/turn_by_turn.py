"""Encodes whole turns: each begins with a special token, where nothing can merge and no space is added."""


def turns(messages):
    start = "<s>"
    if messages[0]["role"] != "system":
        yield start + "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        start = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ("user", "assistant", "system"):
            raise ValueError(role)
        for token in ("<|im_end|>", "<|im_start|>", "<s>"):
            if content.find(token) >= 0:
                raise ValueError(token)
        yield "".join((start, "<|im_start|>", role, "\n", content, "<|im_end|>", "\n"))
        start = ""


def render(messages, add_generation_prompt=False):
    text = "".join(turns(messages))
    return f"{text}<|im_start|>assistant\n" if add_generation_prompt else text


def training_ids(messages, tokenizer):
    ids = []
    for turn in turns(messages):
        ids.extend(tokenizer(turn, add_special_tokens=False))
    return ids


def prompt_ids(messages, tokenizer):
    return training_ids(messages, tokenizer) + tokenizer("<|im_start|>assistant\n", add_special_tokens=False)
