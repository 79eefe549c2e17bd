"""Our Tokenizer against transformers' AutoTokenizer on the same folder: ids, text, special tokens, chat template.

Folders are written as they occur: a template in its own file or in tokenizer_config.json, special tokens as strings or
as objects, a post-processor that puts the begin token in front.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from minift.data.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "",
    " ",
    "\n",
    "The capital of France is Paris.",
    "  two  spaces\tand a tab ",
    "\n\n\n three lines\r\n",
    "1234567890 3.14 12,000",
    "don't WE'LL it's",
    "Grüße 世界 🙂 👩‍👩‍👧 e\u0301 \u00e9 \u2028 \ufeff \u0000 \U0010ffff",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    " <|im_end|> <|endoftext|><|im_end|>x",
    "<|im_start|",
    "<|unknown|> </s> <s>",
    "a" * 1000,
    "def f(x):\n    return x ** 2  # {{ jinja }}\n",
]


@pytest.fixture(params=["tiny", "with_bos", "real"], scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_and_text_equal_transformers(ours: Tokenizer, theirs: Any, text: str, special: bool):
    ids = theirs(text, add_special_tokens=special)["input_ids"]
    assert ours.encode(text, add_special_tokens=special) == ids
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_special_tokens_length_and_template_equal_transformers(ours: Tokenizer, theirs: Any):
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.special == {key: theirs.special_tokens_map[key] for key in ours.special}
    assert set(ours.special) == {"bos_token", "eos_token", "pad_token", "unk_token"} & set(theirs.special_tokens_map)
    assert len(ours) == len(theirs)
    assert ours.template == theirs.chat_template


def test_a_conversation_equals_transformers_as_text_and_as_ids(ours: Tokenizer, theirs: Any):
    messages = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "\nHello"}]
    for part, prompt in ((messages, False), (messages[:1], True)):
        text = ours.apply_chat_template(part, add_generation_prompt=prompt)
        assert text == theirs.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)
        ids = theirs.apply_chat_template(part, add_generation_prompt=prompt)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == ids


def test_decode_takes_any_sequence_of_ids(tiny: Path):
    tokenizer = Tokenizer(tiny)
    ids = tokenizer.encode("The sea is wide")
    assert tokenizer.decode(tuple(ids)) == "The sea is wide"
    assert tokenizer.decode([]) == ""


def test_a_begin_token_comes_from_the_post_processor_only(with_bos: Path):
    tokenizer = Tokenizer(with_bos)
    assert tokenizer.encode("a")[0] == tokenizer.bos_id == 0
    assert tokenizer.encode("a", add_special_tokens=False) == tokenizer.encode("a")[1:]


# --- how the files spell it


def respell(tiny: Path, to: Path, change: Callable[[dict[str, Any], Path], None]) -> Path:
    """A copy of the tiny tokenizer whose tokenizer_config.json, or other files, `change` has rewritten."""
    to.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, to)
    config = json.loads((to / "tokenizer_config.json").read_text(encoding="utf-8"))
    change(config, to)
    (to / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return to


def in_config(config: dict[str, Any], folder: Path) -> None:
    config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()


def in_both(config: dict[str, Any], folder: Path) -> None:
    config["chat_template"] = "{{ 'the file wins' }}"


def named(config: dict[str, Any], folder: Path) -> None:
    config["chat_template"] = [
        {"name": "tool_use", "template": "{{ 'tools' }}"},
        {"name": "default", "template": "{{ messages[0].content }}"},
    ]
    (folder / "chat_template.jinja").unlink()


def without(config: dict[str, Any], folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def as_objects(config: dict[str, Any], folder: Path) -> None:
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        config[key] = {"__type": "AddedToken", "content": config[key], "lstrip": False, "special": True}


def with_null(config: dict[str, Any], folder: Path) -> None:
    config["bos_token"] = None


def in_special_tokens_map(config: dict[str, Any], folder: Path) -> None:
    """How older checkpoints, and some converted ones, name them."""
    tokens = {key: config.pop(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    tokens["eos_token"] = {"content": tokens["eos_token"], "lstrip": False, "rstrip": False}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens), encoding="utf-8")


SPELLINGS = [in_config, in_both, named, without, as_objects, with_null, in_special_tokens_map]


@pytest.mark.parametrize("change", SPELLINGS, ids=lambda change: change.__name__)
def test_every_spelling_reads_as_in_transformers(tiny: Path, tmp_path: Path, change: Any):
    folder = respell(tiny, tmp_path / "model", change)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    template = theirs.chat_template
    assert ours.template == (template["default"] if isinstance(template, dict) else template)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    if ours.template is not None:
        messages = [{"role": "user", "content": "Hi"}]
        assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages, tokenize=False)


def test_padding_falls_back_to_the_end_token(tiny: Path, tmp_path: Path):
    def no_pad(config: dict[str, Any], folder: Path) -> None:
        del config["pad_token"]

    tokenizer = Tokenizer(respell(tiny, tmp_path / "model", no_pad))
    assert tokenizer.pad_id == tokenizer.eos_id is not None


def test_without_tokenizer_config_there_are_no_special_tokens(tiny: Path, tmp_path: Path):
    shutil.copy(tiny / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.template) == (None, None, None, None)
    assert tokenizer.encode("Hi") == Tokenizer(tiny).encode("Hi")


def test_no_template_is_refused_with_advice(tiny: Path, tmp_path: Path):
    tokenizer = Tokenizer(respell(tiny, tmp_path / "model", without))
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_missing_and_broken_files_are_named(tiny: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist$"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist.*fast tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer file"):
        Tokenizer(tmp_path)
    shutil.copy(tiny / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path)
