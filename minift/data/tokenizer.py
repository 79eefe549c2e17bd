"""A checkpoint's tokenizer: text <-> token ids, its special tokens and its chat template.

The splitting itself (normalize, pre-tokenize, merge) is the `tokenizers` library. What is here is what the files of a
folder say about it:

    tokenizer.json                  vocabulary, merges, splitting, and what is put around a text (its post-processor)
    vocab.json + merges.txt         GPT-2's older pair (OPT): the splitting is known, the rest is in the next file
    tokenizer_config.json           which token begins, ends and pads a text; tokens that were added later
    special_tokens_map.json, added_tokens.json: the same in older checkpoints, unless it has an `added_tokens_decoder`
    chat_template.jinja             how messages are laid out (chat.py)

BOS and EOS come from the post-processor in tokenizer.json, whatever `add_bos_token` says (transformers 5 ignores it
there, too). Only with vocab.json + merges.txt do `add_bos_token` and `add_eos_token` count.

tokenizer.json is taken as it stands, as transformers 4 did when most checkpoints were trained. transformers 5 rebuilds
the splitting for classes that it knows (LlamaTokenizer, GPT2Tokenizer), with other ids in places: no space mark behind
a special token for Llama 2 and TinyLlama, no single digits for SmolLM2.

A special token is an ordinary id whose text is cut out before anything is merged. Two traps:
  - A token named in the configuration that the vocabulary lacks. transformers gives it the next free id, for which the
    model has no row; here it is refused by name.
  - A user who writes "<|im_end|>" ends their own turn. `encode(..., special_in_text=False)` reads it as plain letters.

Nothing in this library masks by the padding id, so a checkpoint whose pad token equals its end-of-turn token, such as
SmolLM2, is no trap.

Left out: SentencePiece's tokenizer.model. How it splits depends on the class that reads it (transformers 5.23 drops the
first space mark for Mistral), and the common checkpoints have a tokenizer.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Encoding, decoders, models, pre_tokenizers, processors

from minift.atomic import atomic_file
from minift.data.chat import Message, render
from minift.data.controls import Controls, encode_batch
from minift.sources.resolve import resolve

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GPT2_SPECIAL = "<|endoftext|>"  # begins, ends and stands for the unknown unless the configuration says otherwise
EXTRAS = ("additional_special_tokens", "extra_special_tokens")  # the name in transformers 4 and in 5
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
CONVERT = (
    "tokenizer.model alone is not enough: copy the tokenizer.json of the original checkpoint beside it, or make one: "
    'pip install "transformers<5" sentencepiece protobuf && '
    "python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{0}').save_pretrained('{0}')\""
)


class Tokenizer:
    """Tokenizer of a checkpoint folder. Not for two threads at once.

    Attributes:
        special: text of the tokens with a role, by role ("eos_token", ...); only those that the checkpoint names.
        bos_token, eos_token, pad_token, unk_token: the same, None where the checkpoint has none.
        bos_id, eos_id, pad_id, unk_id: their ids, None where the checkpoint has none (pad falls back to eos).
        template: Jinja source of the chat template, or None.
        backend: the `tokenizers` object that splits and merges.

    Raises:
        FileNotFoundError: none of the files that hold a vocabulary.
        ValueError: a broken file; files that contradict each other; a special token that the vocabulary lacks.
    """

    def __init__(self, folder: Path):
        self._config = _read_config(folder)
        whole = (folder / "tokenizer.json").is_file()
        self.backend = _from_json(folder) if whole else _from_pair(folder, self._config)
        if not whole and self.backend.token_to_id(GPT2_SPECIAL) is not None:
            self._config = dict.fromkeys(("bos_token", "eos_token", "unk_token"), GPT2_SPECIAL) | self._config
        # Saved settings of somebody's training run; a text must not be cut or filled up unasked.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.special = {role: _content(self._config[role]) for role in ROLES if self._config.get(role)}
        _register(self.backend, folder, self._config, self.special)
        if not whole:
            self.backend.post_processor = _around(self.backend, self._config, self.special)
        self.bos_token, self.eos_token = self.special.get("bos_token"), self.special.get("eos_token")
        self.pad_token, self.unk_token = self.special.get("pad_token"), self.special.get("unk_token")
        ids = {role: self.backend.token_to_id(token) for role, token in self.special.items()}
        self.bos_id, self.eos_id, self.unk_id = ids.get("bos_token"), ids.get("eos_token"), ids.get("unk_token")
        self.pad_id = ids.get("pad_token", self.eos_id)
        self.template = _template(folder, self._config)
        self._controls: Controls | None = None

    def __len__(self) -> int:
        """Number of tokens. The model may have more rows, never fewer (model/resize.py)."""
        return self.backend.get_vocab_size()

    @property
    def special_tokens(self) -> dict[str, int]:
        """Every special token, with or without a role, and its id; in the order of ids."""
        known = sorted(self.backend.get_added_tokens_decoder().items())
        return {token.content: index for index, token in known if token.special}

    def add_tokens(self, tokens: Sequence[str], special: bool = True) -> list[int]:
        """Make each text one token, and return the ids; what the vocabulary knows already keeps its id.

        Args:
            tokens: texts, such as "<|think|>". New ones get the next free ids: call `resize_embeddings` afterwards.
            special: left out by `skip_special_tokens`, read as letters by `special_in_text=False`.

        Raises:
            ValueError: a string in place of a list, or an empty text.
        """
        if isinstance(tokens, str) or not all(isinstance(token, str) and token for token in tokens):
            raise ValueError(f"tokens must be a list of texts that are not empty, got {tokens!r}")
        known = {token.content: token for token in self.backend.get_added_tokens_decoder().values()}
        added = [known.get(token) or AddedToken(token, normalized=False) for token in tokens]
        for token in added:  # those that are known keep their other flags: Phi-3's swallow the space behind them
            token.special = token.special or special
        self.backend.add_tokens(added)
        self._controls = None
        ids = (self.backend.token_to_id(token) for token in tokens)
        return [index for index in ids if index is not None]

    def encode(self, text: str, add_special_tokens: bool = True, special_in_text: bool = True) -> list[int]:
        """Text to ids.

        Args:
            add_special_tokens: let the tokenizer put its own tokens around (BOS for Llama).
            special_in_text: text that spells a special token becomes that token, as chat templates need it. False reads
                it as letters, as a user's words should be.

        Raises:
            ValueError: text that is not valid Unicode (half of a surrogate pair).
        """
        self.backend.encode_special_tokens = not special_in_text
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise ValueError("the text is not valid Unicode: it cannot be written as UTF-8") from None

    def encode_with_offsets(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[Encoding]:
        """Encode many texts at once. Each result has `.ids`, and `.offsets`: (start, end) of each token in characters.

        Several tokens of one character (bytes of an emoji) have the same offsets; a token that swallows the spaces
        beside it has them within its own.

        Raises:
            ValueError: text that is not valid Unicode.
        """
        return encode_batch(self.backend, texts, add_special_tokens)

    @property
    def controls(self) -> Controls:
        """The special tokens, and a way to keep users from writing them: see controls.py."""
        if self._controls is None:
            self._controls = Controls(self.backend, list(dict.fromkeys([*self.special_tokens, *self.special.values()])))
        return self._controls

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Ids to text."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Messages to the text that the model reads.

        Args:
            messages: each with "role" and "content".
            add_generation_prompt: go on with the assistant's header, where the model goes on.
            tools: JSON schemas of functions, for templates that offer them.
            variables: whatever else the template knows, such as `enable_thinking`.

        Raises:
            ValueError: the checkpoint has no template, or it refuses the messages.
        """
        if self.template is None:
            raise ValueError("this tokenizer has no chat template; use an instruct checkpoint, or rows of plain text")
        return render(self.template, messages, add_generation_prompt, tools=tools, **(self.special | variables))

    def save(self, folder: str | Path) -> Path:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, which AutoTokenizer reads to equal ids.

        Other files of the folder stay, so call it after `save_model`. Each file is replaced as a whole.
        """
        folder = Path(folder)  # tokenizer.json comes first: the configuration may name tokens that only it has
        with atomic_file(folder / "tokenizer.json") as path:
            self.backend.save(str(path))
        template = folder / "chat_template.jinja"
        if self.template is None:
            template.unlink(missing_ok=True)  # of another tokenizer
        else:
            with atomic_file(template) as path:
                path.write_text(self.template, encoding="utf-8")
        with atomic_file(folder / "tokenizer_config.json") as path:
            path.write_text(json.dumps(self._config_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return folder

    def _config_json(self) -> dict[str, Any]:
        dropped = {*ROLES, *EXTRAS, "add_bos_token", "add_eos_token", "chat_template"}
        config = {key: value for key, value in self._config.items() if key not in dropped} | self.special
        config[EXTRAS[0]] = [token for token in self.special_tokens if token not in self.special.values()]
        # tokenizer.json has them all; that the key is there keeps an old special_tokens_map.json from having a say.
        config["added_tokens_decoder"] = {}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the class that takes tokenizer.json as it stands
        return config


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load the tokenizer of a model; `name` as in `load_model`."""
    return Tokenizer(resolve(name))


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; the older files complete it where it has no `added_tokens_decoder`: id -> text, flags."""
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    config |= _read_json(folder / "special_tokens_map.json")
    special = {_content(config[role]) for role in ROLES if config.get(role)} | {*map(_content, _extras(config))}
    added = _read_json(folder / "added_tokens.json")
    config["added_tokens_decoder"] = {
        index: {"content": token, "normalized": token not in special, "special": token in special}
        for token, index in added.items()
    }
    return config


def _from_json(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer file: {error}") from None


def _from_pair(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE from vocab.json and merges.txt."""
    path, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not (vocabulary.is_file() and merges.is_file()):
        hint = f"; {CONVERT.format(folder)}" if (folder / "tokenizer.model").exists() else ""
        raise FileNotFoundError(f"{path} does not exist{hint}")
    kind = (config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if kind != "GPT2Tokenizer":
        raise ValueError(
            f"{path} does not exist, and {kind} splits text by rules that are not in vocab.json and merges.txt; "
            "copy the tokenizer.json of the original checkpoint"
        )
    try:
        model = models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:
        raise ValueError(f"{vocabulary} and {merges.name} are not a vocabulary and its merges: {error}") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _register(tokenizer: tokenizers.Tokenizer, folder: Path, config: dict[str, Any], special: dict[str, str]) -> None:
    """Make the tokens that the configuration adds or names single tokens, each with the id that it should have."""
    declared = {int(key): token for key, token in config["added_tokens_decoder"].items()}
    for index in sorted(declared):
        token = declared[index]
        tokenizer.add_tokens([_added_token(token)])
        found = tokenizer.token_to_id(token["content"])
        if found != index:
            raise ValueError(
                f"{folder}: the added token {token['content']!r} should have id {index}, but the vocabulary leads to "
                f"{found}; tokenizer.json and the added tokens do not belong together"
            )
    single = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for role, token in [(role, config[role]) for role in special] + [("a special token", x) for x in _extras(config)]:
        if tokenizer.token_to_id(_content(token)) is None:
            raise ValueError(
                f"{folder}: {role} is {_content(token)!r}, which is not in the vocabulary, so the model has no row for "
                "it; delete it from tokenizer_config.json (and special_tokens_map.json), and add it after loading "
                "(add_tokens, resize_embeddings) if it is needed"
            )
        if _content(token) not in single:
            tokenizer.add_special_tokens([_added_token(token)])


def _around(tokenizer: tokenizers.Tokenizer, config: dict[str, Any], special: dict[str, str]) -> Any:
    """GPT-2's post-processor: `add_bos_token` and `add_eos_token`, each where there is such a token."""
    wanted = {role: [token] for role, token in special.items() if config.get(f"add_{role}")}
    bos, eos = wanted.get("bos_token", []), wanted.get("eos_token", [])
    ids = [(token, tokenizer.token_to_id(token)) for token in {*bos, *eos}]
    return processors.TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=ids)


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


def _added_token(token: str | dict[str, Any]) -> AddedToken:
    flags = {"special": True} if isinstance(token, str) else {flag: token[flag] for flag in FLAGS if flag in token}
    return AddedToken(_content(token), **flags)


def _extras(config: dict[str, Any]) -> list[str | dict[str, Any]]:
    """Special tokens without a role: a list, or a dict of names in transformers 5."""
    extras = next((config[key] for key in reversed(EXTRAS) if config.get(key)), [])
    return list(extras.values() if isinstance(extras, dict) else extras)


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the key in tokenizer_config.json (a string, or a list of named ones)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
