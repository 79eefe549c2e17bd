"""e15 Chat template: the conversation as one text, and that text as ids, in one go."""

from collections.abc import Callable

SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>")
ROLES = ("system", "user", "assistant")
DEFAULT = {"role": "system", "content": "You are a helpful assistant."}


def pieces(messages: list[dict[str, str]], add_generation_prompt: bool) -> list[str]:
    """What the text is made of, in order."""
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"the role is {message['role']!r}, not one of {', '.join(ROLES)}")
        if any(token in message["content"] for token in SPECIAL):
            raise ValueError("a message contains the text of a special token")
    if messages[0]["role"] != "system":
        messages = [DEFAULT, *messages]
    parts = ["<s>"]
    for message in messages:
        content = message["content"]
        parts += ["<|im_start|>" + message["role"] + "\n", content, "<|im_end|>", "\n"]
    if add_generation_prompt:
        parts += ["<|im_start|>assistant\n"]
    return parts


def render(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """Returns the text of a conversation, with the turn of the assistant opened at the end if asked for."""
    return "".join(pieces(messages, add_generation_prompt))


def training_ids(messages: list[dict[str, str]], tokenizer: Callable[..., list[int]]) -> list[int]:
    """Returns the ids of a conversation to train on."""
    return tokenizer(render(messages), add_special_tokens=False)


def prompt_ids(messages: list[dict[str, str]], tokenizer: Callable[..., list[int]]) -> list[int]:
    """Returns the ids of a conversation that is to be answered."""
    return tokenizer(render(messages, add_generation_prompt=True), add_special_tokens=False)
