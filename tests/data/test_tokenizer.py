"""Our Tokenizer against transformers' AutoTokenizer on the same folder: ids, text, special tokens, chat template.

Folders are written as they occur: a template in its own file or in tokenizer_config.json, special tokens as strings or
as objects, a post-processor that puts the begin token in front; vocab.json with merges.txt as OPT has it; vocabularies
in the manner of Llama 2, Llama 3 and Gemma, trained here on a few lines.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
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
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer\.json does not exist; tokenizer\.model alone.*save_pretrained"
    ):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer file"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    (tmp_path / "merges.txt").write_text("x y z\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt are not a vocabulary and its merges"):
        Tokenizer(tmp_path)
    shutil.copy(tiny / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path)


# --- other vocabularies


def write(folder: Path, **contents: Any) -> Path:
    """A folder of JSON files: tokenizer_config={...} is tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    for name, content in ({"config": {"model_type": "llama"}} | contents).items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def assert_equal(ours: Tokenizer, theirs: Any, texts: list[str] = TEXTS) -> None:
    for text in texts:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert len(ours) == len(theirs)
    pad = theirs.eos_token_id if theirs.pad_token_id is None else theirs.pad_token_id
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id)
    assert ours.pad_id == pad
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert (ours.pad_token, ours.unk_token) == (theirs.pad_token, theirs.unk_token)
    assert ours.special == theirs.special_tokens_map
    assert (
        ours.special_tokens.items() >= dict(zip(theirs.all_special_tokens, theirs.all_special_ids, strict=True)).items()
    )
    assert ours.special_tokens == {
        token.content: index for index, token in theirs.added_tokens_decoder.items() if token.special
    }


OPT_TEXTS = [*TEXTS, "The sea</s> is <pad>deep", " <mask> x<mask>y", "</s>The", "[PAD]<unk>"]


def opt(token: str) -> dict[str, Any]:
    """How OPT writes a special token."""
    return {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": True, "rstrip": False}


OPT = {
    "tokenizer_class": "GPT2Tokenizer", "errors": "replace", "add_prefix_space": False, "add_bos_token": True,
    "bos_token": opt("</s>"), "eos_token": opt("</s>"), "unk_token": opt("</s>"), "pad_token": opt("<pad>"),
}  # fmt: skip
DECODER = {"1": {"content": "<pad>", "lstrip": True, "rstrip": False, "normalized": False, "special": True}}
PAIRS: dict[str, dict[str, Any]] = {
    "opt": {"tokenizer_config": OPT},
    "no class": {"tokenizer_config": {key: value for key, value in OPT.items() if key != "tokenizer_class"}},
    "fast class": {"tokenizer_config": OPT | {"tokenizer_class": "GPT2TokenizerFast"}},
    "end token": {"tokenizer_config": OPT | {"add_bos_token": False, "add_eos_token": True}},
    "both": {"tokenizer_config": OPT | {"add_eos_token": True, "bos_token": "<s>"}},
    "neither": {"tokenizer_config": {key: value for key, value in OPT.items() if key != "add_bos_token"}},
    "no begin token to add": {"tokenizer_config": OPT | {"bos_token": None}},
    "prefix space": {"tokenizer_config": OPT | {"add_prefix_space": True}},
    "map wins": {"tokenizer_config": OPT, "special_tokens_map": {"pad_token": "<unk>", "cls_token": opt("<s>")}},
    "map has no say": {
        "tokenizer_config": OPT | {"added_tokens_decoder": DECODER}, "special_tokens_map": {"pad_token": "<unk>"}
    },
    "added tokens": {
        "tokenizer_config": OPT | {"pad_token": "[PAD]"}, "added_tokens": {"[PAD]": 321, "<mask>": 320}
    },
    "added, in the configuration": {
        "tokenizer_config": OPT | {"added_tokens_decoder": DECODER | {"320": {"content": "<mask>", "rstrip": True}}}
    },
    "extra": {"tokenizer_config": OPT | {"additional_special_tokens": ["<s>", opt("<unk>") | {"special": True}]}},
    "extra in transformers 5": {"tokenizer_config": OPT | {"extra_special_tokens": ["<s>", "<unk>"]}},
    "defaults": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary() -> models.BPE:
    """Byte-level BPE with OPT's first four ids and 320 tokens, <|endoftext|> among them."""
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(peers.LINES * 2, trainer)
    return tokenizer.model


def pair(vocabulary: models.BPE, folder: Path, **contents: Any) -> Path:
    write(folder, **{"config": {"model_type": "opt"}} | contents)
    vocabulary.save(str(folder))
    return folder


@pytest.mark.parametrize("case", PAIRS)
def test_vocabulary_and_merges_equal_transformers(vocabulary: models.BPE, tmp_path: Path, case: str):
    folder = pair(vocabulary, tmp_path / "opt", **PAIRS[case])
    assert_equal(load_tokenizer(folder), AutoTokenizer.from_pretrained(folder), OPT_TEXTS)


def test_opt_begins_with_its_end_token(vocabulary: models.BPE, tmp_path: Path):
    tokenizer = load_tokenizer(pair(vocabulary, tmp_path / "opt", tokenizer_config=OPT))
    ids = tokenizer.encode("The sea")
    assert (ids[0], tokenizer.pad_id) == (2, 1)
    assert tokenizer.encode("") == [2]


def test_a_vocabulary_of_another_class_is_refused(vocabulary: models.BPE, tmp_path: Path):
    folder = pair(vocabulary, tmp_path / "qwen", tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    with pytest.raises(ValueError, match=r"Qwen2Tokenizer splits text by rules.*copy the tokenizer\.json"):
        load_tokenizer(folder)


def llama2(splitting: str = "normalizer") -> Backend:
    """BPE over pieces with a space mark and bytes to fall back to. `splitting`: the file as transformers 4 wrote it for
    Llama 2, as transformers 5 writes it ("first"), or as Gemma has it."""
    names = ["<unk>", "<s>", "</s>"]
    trained = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = [*names, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=pieces, show_progress=False)
    trained.train_from_iterator(peers.LINES * 2, trainer)
    tokenizer = Backend(trained.model)
    space = normalizers.Replace(" ", "\u2581")
    if splitting == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif splitting == "gemma":
        tokenizer.normalizer = space
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * (splitting != "gemma"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(names)
    return tokenizer


def llama3() -> Backend:
    """Byte-level BPE that looks whole words up first; ByteLevel and a template as post-processors."""
    tokenizer = peers.tiny_tokenizer().backend_tokenizer
    model = json.loads(tokenizer.to_str())
    model["model"]["ignore_merges"] = True
    tokenizer = Backend.from_str(json.dumps(model))
    begin = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    return tokenizer


ROLES2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ROLES3 = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
WHOLE: dict[str, tuple[Callable[[], Backend], dict[str, Any]]] = {
    "llama2, phi3": (llama2, ROLES2 | {"tokenizer_class": "LlamaTokenizer", "model_type": "phi3"}),
    "llama2": (llama2, ROLES2 | {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "llama2, saved by transformers 5": (lambda: llama2("first"), ROLES2 | {"tokenizer_class": "LlamaTokenizer"}),
    "gemma": (
        lambda: llama2("gemma"),
        ROLES2
        | {"tokenizer_class": "GemmaTokenizer", "model_type": "gemma", "pad_token": "<unk>", "mask_token": "<s>"},
    ),
    "llama3": (llama3, ROLES3 | {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "llama3, wrong class": (llama3, ROLES3 | {"tokenizer_class": "LlamaTokenizer"}),
}


def whole(folder: Path, make: Callable[[], Backend], config: dict[str, Any]) -> Path:
    settings = {key: value for key, value in config.items() if key != "model_type"}
    write(folder, config={"model_type": config.get("model_type", "llama")}, tokenizer_config=settings)
    make().save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("wish", [None, True, False], ids=["no word", "add_bos", "no bos"])
@pytest.mark.parametrize("case", WHOLE)
def test_other_vocabularies_equal_transformers(tmp_path: Path, case: str, wish: bool | None):
    """What stands around a text is in tokenizer.json; the configuration's word on it counts neither here nor there."""
    make, config = WHOLE[case]
    wishes = {} if wish is None else {"add_bos_token": wish, "add_eos_token": wish}
    folder = whole(tmp_path / "model", make, config | wishes)
    texts = [*TEXTS, "The sea</s>\nis <s> wide", "<s>A", "</s></s> a"]
    ours = load_tokenizer(folder)
    assert_equal(ours, AutoTokenizer.from_pretrained(folder), texts)
    assert ours.encode("a")[0] == ours.bos_id


def test_where_transformers_5_rebuilds_the_splitting_the_file_stands(tmp_path: Path):
    """LlamaTokenizer of transformers 5 has no space mark behind a special token, nor a second one before a space."""
    folder = whole(tmp_path / "model", llama2, ROLES2 | {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    mark = theirs.convert_tokens_to_ids("\u2581")
    for text in ("The sea is wide", "1 2  3\n\n\t4 ", "Gr\u00fc\u00dfe"):
        assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.encode("A</s>\nB") == [*(ids := theirs("A</s>\nB")["input_ids"])[:-2], mark, *ids[-2:]]
    assert ours.encode(" 12") == [ours.bos_id, mark, *theirs(" 12")["input_ids"][1:]]


# --- special tokens


def test_a_named_token_that_the_file_does_not_register_becomes_a_single_token(tmp_path: Path):
    """Some converters leave `added_tokens` empty: <s> is in the vocabulary, but no text would become it."""
    folder = whole(tmp_path / "model", llama2, ROLES2 | {"tokenizer_class": "PreTrainedTokenizerFast"})
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    ours = load_tokenizer(folder)
    assert_equal(ours, AutoTokenizer.from_pretrained(folder), [*TEXTS, "a</s>b"])
    assert ours.encode("</s>", add_special_tokens=False) == [2]


@pytest.mark.parametrize("key", ["pad_token", "bos_token", "cls_token", "additional_special_tokens"])
def test_a_special_token_that_is_not_in_the_vocabulary_is_refused(tiny: Path, tmp_path: Path, key: str):
    def change(config: dict[str, Any], folder: Path) -> None:
        config[key] = ["<|im_end|>", "[PAD]"] if key.startswith("additional") else "[PAD]"

    with pytest.raises(ValueError, match=r"\[PAD\]', which is not in the vocabulary.*delete it from tokenizer_config"):
        load_tokenizer(respell(tiny, tmp_path / "model", change))


@pytest.mark.parametrize(("token", "index"), [("<|new|>", 400), ("<|im_end|>", 384)])
def test_added_tokens_with_another_id_are_refused(tiny: Path, tmp_path: Path, token: str, index: int):
    def change(config: dict[str, Any], folder: Path) -> None:
        (folder / "added_tokens.json").write_text(json.dumps({token: index}), encoding="utf-8")

    with pytest.raises(ValueError, match=rf"the added token '{re.escape(token)}' should have id {index}"):
        load_tokenizer(respell(tiny, tmp_path / "model", change))


def test_special_tokens_are_listed_with_their_ids(tiny: Path):
    assert Tokenizer(tiny).special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


def test_adding_tokens_equals_transformers(folder: Path):
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    new = ["<|think|>", "<|im_end|>", "</think>", "<|think|>"]
    size = len(ours)
    assert ours.add_tokens(new) == [size, ours.encode("<|im_end|>", False)[0], size + 1, size]
    theirs.add_special_tokens({"extra_special_tokens": new})
    assert ours.add_tokens(["blue sky"], special=False) == [size + 2]
    theirs.add_tokens([AddedToken("blue sky", normalized=False)])
    texts = [*TEXTS, "<|think|> so</think>\n", "a blue sky, <|think|>blue sky", "x</think>"]
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert len(ours) == len(theirs) == size + 3
    assert "<|think|>" in ours.special_tokens and "blue sky" not in ours.special_tokens


def test_a_known_token_keeps_what_it_does_to_its_neighbours(tmp_path: Path):
    """Phi-3's <|end|> takes the white space behind it along."""
    tokenizer = llama3()
    tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=True)])
    tokenizer.add_tokens([AddedToken("word", lstrip=True, normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path)
    text = "a <|end|>  b <|end|>\n word"
    before = ours.encode(text)
    ids = ours.add_tokens(["<|end|>", "word"])
    assert ours.encode(text) == before
    assert ours.special_tokens.keys() >= {"<|end|>", "word"}
    assert ours.add_tokens(["<|end|>"], special=False) == ids[:1]
    assert "<|end|>" in ours.special_tokens


@pytest.mark.parametrize("wrong", ["<|think|>", [""], [3], ["a", None]])
def test_wrong_tokens_are_refused(tiny: Path, wrong: Any):
    with pytest.raises(ValueError, match="tokens must be a list of texts"):
        Tokenizer(tiny).add_tokens(wrong)


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
def test_control_tokens_in_a_users_text_can_be_read_as_letters(ours: Tokenizer, theirs: Any, special: bool):
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=special, special_in_text=False)
        assert ids == theirs(text, add_special_tokens=special, split_special_tokens=True)["input_ids"]
        assert not set(ids[1 if special and ids and ids[0] == ours.bos_id else 0 :]) & set(ours.special_tokens.values())
        assert ours.decode(ids, skip_special_tokens=True) == text
        # The setting is of this call alone.
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_truncation_and_padding_of_a_saved_run_are_ignored(tiny: Path, tmp_path: Path):
    backend = Backend.from_file(str(tiny / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert Tokenizer(tmp_path).encode(text) == Tokenizer(tiny).encode(text)


# --- saving


def assert_saved(ours: Tokenizer, folder: Path, texts: list[str]) -> None:
    again, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert_equal(again, theirs, texts)
    for text in texts:
        assert again.encode(text) == ours.encode(text)
        assert again.encode(text, special_in_text=False) == ours.encode(text, special_in_text=False)
    assert (again.special, again.special_tokens, again.template) == (ours.special, ours.special_tokens, ours.template)
    assert theirs.chat_template == ours.template


@pytest.mark.parametrize("case", WHOLE)
def test_what_is_saved_loads_with_equal_ids(tmp_path: Path, case: str):
    make, config = WHOLE[case]
    folder = whole(tmp_path / "model", make, config)
    ours = load_tokenizer(folder)
    ours.add_tokens(["<|think|>", "[PAD]"])
    ours.template = "{{ messages[0].content }}<|think|>"
    saved = write(tmp_path / "saved", config={"model_type": config.get("model_type", "llama")})
    if case == "gemma":  # transformers 5 rebuilds Gemma's splitting whatever the class; it is the same
        assert "Split" in (folder / "tokenizer.json").read_text(encoding="utf-8")
    assert ours.save(saved) == saved
    assert_saved(ours, saved, [*TEXTS, "The sea</s>\nis <|think|> [PAD]wide"])


def test_opt_is_saved_as_one_file_with_its_begin_token(vocabulary: models.BPE, tmp_path: Path):
    ours = load_tokenizer(pair(vocabulary, tmp_path / "opt", tokenizer_config=OPT))
    saved = write(tmp_path / "saved", config={"model_type": "opt"})
    ours.save(saved)
    assert_saved(ours, saved, OPT_TEXTS)


def test_saving_replaces_the_tokenizer_in_a_model_folder_and_nothing_else(tiny: Path, tmp_path: Path):
    folder = respell(tiny, tmp_path / "model", in_special_tokens_map)
    (folder / "model.safetensors").write_bytes(b"weights")
    ours = Tokenizer(respell(tiny, tmp_path / "other", without))
    ours.add_tokens(["<|pad|>"])
    ours.special["pad_token"] = "<|pad|>"
    ours.save(folder)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not (folder / "chat_template.jinja").exists()
    again = Tokenizer(folder)  # special_tokens_map.json still says <|im_end|>
    assert again.pad_token == AutoTokenizer.from_pretrained(folder).pad_token == "<|pad|>"
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]
