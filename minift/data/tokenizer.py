"""A checkpoint's tokenizer: text <-> token ids, its special tokens and its chat template.

The splitting itself (normalize, pre-tokenize, merge) is the `tokenizers` library reading tokenizer.json. What is here
is what the other files of the folder add: which token begins and ends a text, and how messages are laid out.

Nothing in this library masks by the padding id, so a checkpoint whose pad token equals its end-of-turn token, such as
SmolLM2, is no trap.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from minift.data.chat import Message, render
from minift.sources.resolve import resolve


class Tokenizer:
    """Tokenizer of a checkpoint folder.

    Attributes:
        bos_id, eos_id, pad_id: ids of the special tokens, None where the checkpoint has none (pad falls back to eos).
        template: Jinja source of the chat template, or None.
    """

    def __init__(self, folder: Path):
        path = folder / "tokenizer.json"
        if not path.is_file():
            hint = " (tokenizer.model alone is not enough: save it once with a fast tokenizer)"
            raise FileNotFoundError(f"{path} does not exist{hint if (folder / 'tokenizer.model').exists() else ''}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer file: {error}") from None
        # Older checkpoints name their special tokens in a file of its own.
        config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        self.special = {
            key: _content(config[key])
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
            if config.get(key)
        }
        self.bos_id, self.eos_id = self._id("bos_token"), self._id("eos_token")
        self.pad_id = self._id("pad_token") if "pad_token" in self.special else self.eos_id
        self.template = _template(folder, config)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to ids. `add_special_tokens` lets the tokenizer put its own tokens around (BOS for Llama).

        Raises:
            ValueError: text that is not valid Unicode (half of a surrogate pair).
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise ValueError("the text is not valid Unicode: it cannot be written as UTF-8") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Ids to text."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Messages to the text that the model reads.

        Raises:
            ValueError: the checkpoint has no template, or it refuses the messages.
        """
        if self.template is None:
            raise ValueError("this tokenizer has no chat template; use an instruct checkpoint, or rows of plain text")
        return render(self.template, messages, add_generation_prompt, **self.special)

    def _id(self, key: str) -> int | None:
        return self._tokenizer.token_to_id(self.special[key]) if key in self.special else None


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load the tokenizer of a model; `name` as in `load_model`."""
    return Tokenizer(resolve(name))


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file that may be missing."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _content(token: str | dict[str, Any]) -> str:
    """Special tokens are written as a string, or as an AddedToken object."""
    return token if isinstance(token, str) else token["content"]


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the key in tokenizer_config.json (a string, or a list of named ones)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
