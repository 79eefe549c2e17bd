"""e15 Chat template: README.md says what to write. Check with: minift-course check e15"""

from collections.abc import Callable


def render(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """Returns the text of a conversation, with the turn of the assistant opened at the end if asked for."""
    # TODO: refuse unknown roles and special tokens in content; then <s>, the turns, the generation prompt
    raise NotImplementedError


def training_ids(messages: list[dict[str, str]], tokenizer: Callable[..., list[int]]) -> list[int]:
    """Returns the ids of a conversation to train on."""
    # TODO
    raise NotImplementedError


def prompt_ids(messages: list[dict[str, str]], tokenizer: Callable[..., list[int]]) -> list[int]:
    """Returns the ids of a conversation that is to be answered."""
    # TODO
    raise NotImplementedError
