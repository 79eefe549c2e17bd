"""Token ids and labels of encode against TRL's SFTTrainer on the same rows, template and tokenizer.

TRL has no "last assistant turn" for {messages}: there the same conversation is given to it split into prompt and
completion. For every assistant turn it needs a template with {% generation %} markers, and trains what stands between
them; ours needs no markers and trains up to the end of the turn as the template writes it, one newline further for
ChatML. That is the only difference, and the test says exactly where it is.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import peers
import pytest

from minift.data.drafts import BATCH
from minift.data.encode import IGNORE, Example, RowError, encode, encode_rows
from minift.data.tokenizer import Tokenizer

Pairs = list[tuple[list[int], list[int]]]

PIECES = [
    "the", "sea", " is", " wide", "\n", "\n\n", " ", "  ", "\t", "Paris.", "What is", "?", "12", "3", "don't", "\r\n",
    "Grüße", "世界", "🙂", "👩‍👩‍👧", "e\u0301", "\u2028", "assistant\n", "user", "```python\nx = 1\n```", "{{ x }}",
    "<|im_start", "|>", "</s>", "A longer piece of text about the capital of France.", "question", " answer",
]  # fmt: skip


def text(draw: random.Random, most: int = 8) -> str:
    return "".join(draw.choice(PIECES) for _ in range(draw.randint(1, most)))


def answer(draw: random.Random) -> str:
    """One that is not blank: an answer that says nothing is refused."""
    return next(said for said in iter(lambda: text(draw), None) if said.strip())


def conversation(draw: random.Random) -> list[dict[str, str]]:
    """One to four pairs of turns, sometimes with a system message."""
    messages = [{"role": "system", "content": text(draw)}] if draw.random() < 0.4 else []
    for _ in range(draw.choice([1, 1, 2, 3, 4])):
        messages += [
            {"role": "user", "content": text(draw)},
            {"role": "assistant", "content": answer(draw)},
        ]
    return messages


DRAW = random.Random(20240817)
CONVERSATIONS = [conversation(DRAW) for _ in range(80)]
MESSAGES = [{"messages": messages} for messages in CONVERSATIONS]
SPLIT = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in CONVERSATIONS]
# The completion may hold several turns, too.
SPLIT_EARLY = [
    {"prompt": messages[: -3 if len(messages) > 3 else -1], "completion": messages[-3 if len(messages) > 3 else -1 :]}
    for messages in CONVERSATIONS
]
STRINGS = [{"prompt": text(DRAW), "completion": text(DRAW)} for _ in range(60)]
STRINGS += [
    {"prompt": "What is ", "completion": "Paris."},  # the space merges with the first word of the answer
    {"prompt": "the capital of Fr", "completion": "ance"},
    {"prompt": "line\n", "completion": "\n\nanswer"},
    {"prompt": "", "completion": "all of it is trained"},
    {"prompt": "Hello", "completion": "ends already<|im_end|>"},
    {"prompt": "ends already<|im_end|>", "completion": "goes on"},
]
TEXTS = [{"text": text(DRAW, 20)} for _ in range(60)]
TEXTS += [{"text": "ends already<|im_end|>"}, {"text": "<|im_end|> in front"}, {"text": "ends<|im_end|>\n"}]


@pytest.fixture(scope="module", params=["tiny", "with_bos", "real"])
def folder(request: pytest.FixtureRequest) -> Path:
    """The tiny tokenizer merges almost nothing, the real one a lot, runs of newlines among it.

    One puts a begin token in front of plain text, which it must not do with rendered chats.
    """
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def pair(example: Example) -> tuple[list[int], list[int]]:
    return example.input_ids, example.labels


def assert_equal(ours: Pairs, theirs: Pairs, rows: list[Any]) -> None:
    assert len(ours) == len(theirs) == len(rows)
    for row, mine, other in zip(rows, ours, theirs, strict=True):
        assert mine == other, row


@pytest.mark.parametrize(
    ("rows", "completion_only"),
    [
        pytest.param(MESSAGES, None, id="messages-all"),
        pytest.param(SPLIT, False, id="split-all"),
        pytest.param(SPLIT, True, id="split-completion"),
        pytest.param(SPLIT_EARLY, None, id="several-turns-completion"),
        pytest.param(STRINGS, False, id="strings-all"),
        pytest.param(STRINGS, None, id="strings-completion"),
        pytest.param(TEXTS, None, id="text"),
    ],
)
def test_ids_and_labels_equal_trl(folder: Path, tokenizer: Tokenizer, rows: list[Any], completion_only: bool | None):
    """With control tokens in the text read as TRL does; rows without them do not need that (below)."""
    theirs = peers.peer_tokens(folder, rows, completion_only, max_length=None)
    loss_on = "completion" if completion_only or (completion_only is None and "prompt" in rows[0]) else "all"
    ours = [pair(encode(tokenizer, row, loss_on=loss_on, special_in_text=True)) for row in rows]
    assert_equal(ours, theirs, rows)
    assert ours == [pair(example) for example in encode_rows(tokenizer, rows, loss_on, special_in_text=True)]


def test_the_completion_of_messages_is_the_last_turn(folder: Path, tokenizer: Tokenizer):
    theirs = peers.peer_tokens(folder, SPLIT, completion_only=True, max_length=None)
    ours = [pair(encode(tokenizer, row, loss_on="completion")) for row in MESSAGES]
    assert_equal(ours, theirs, MESSAGES)


@pytest.mark.parametrize("rows", [STRINGS, TEXTS[:5]], ids=["strings", "text"])
def test_text_without_a_prompt_is_trained_whole(tokenizer: Tokenizer, rows: list[dict[str, str]]):
    for row in rows:
        if not row.get("prompt"):
            example = encode(tokenizer, row, loss_on="completion")
            assert example.labels[1:] == example.input_ids[1:]  # the first label never counts


# --- where prompt and answer meet


def merging(rows: list[Any], tokenizer: Tokenizer) -> list[Any]:
    """The rows whose prompt, encoded alone, is not how the whole begins: its last token merges with the answer."""
    chosen = []
    for row in rows:
        if isinstance(row["prompt"], str):
            prompt, whole = tokenizer.encode(row["prompt"]), tokenizer.encode(row["prompt"] + row["completion"])
        else:
            prompt = tokenizer.encode(tokenizer.apply_chat_template(row["prompt"], True), add_special_tokens=False)
            messages = row["prompt"] + row["completion"]
            whole = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
        if whole[: len(prompt)] != prompt:
            chosen.append(row)
    return chosen


def answer_begins(labels: list[int]) -> int:
    return next(index for index, label in enumerate(labels) if label != IGNORE)


ANSWERS = ["\nHi", "\n\nHi", "\n\n\nHi", " \n Hi", "\n  x", " Hi", "\u2028Hi", "\u0301Hi", "\r\nHi"]


def test_answers_that_merge_with_the_header(real: Path):
    tokenizer, question = Tokenizer(real), [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": question, "completion": [{"role": "assistant", "content": answer}]} for answer in ANSWERS]
    theirs = peers.peer_tokens(real, rows)
    assert_equal([pair(encode(tokenizer, row)) for row in rows], theirs, rows)
    assert_equal([pair(encode(tokenizer, row)) for row in peers.as_messages(rows)], theirs, rows)


def test_some_boundaries_do_merge(real: Path):
    """Otherwise the comparisons above would not reach the case: the answer then begins before the prompt's end."""
    tokenizer = Tokenizer(real)
    chats, strings = merging(SPLIT, tokenizer), merging(STRINGS, tokenizer)
    assert len(chats) >= 5 and len(strings) >= 5
    for row in chats:
        prompt = tokenizer.encode(tokenizer.apply_chat_template(row["prompt"], True), add_special_tokens=False)
        assert answer_begins(encode(tokenizer, row).labels) < len(prompt)
    for row in strings:
        assert answer_begins(encode(tokenizer, row).labels) < len(tokenizer.encode(row["prompt"]))


# --- every assistant turn


@pytest.fixture(scope="module")
def generation(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder for TRL, its template with markers around the assistant's words."""
    copy = tmp_path_factory.mktemp("generation")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, copy)
    config = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (copy / "chat_template.jinja").write_text(peers.CHATML_GENERATION, encoding="utf-8")
    return copy


def with_final_newlines(tokenizer: Tokenizer, ids: list[int], labels: list[int]) -> list[int]:
    """TRL's labels, and the newline behind the end token of each trained turn."""
    out = list(labels)
    for index in range(1, len(ids)):
        if labels[index - 1] != IGNORE and labels[index] == IGNORE:
            assert ids[index - 1] == tokenizer.eos_id and tokenizer.decode([ids[index]]) == "\n"
            out[index] = ids[index]
    return out


@pytest.mark.parametrize("rows", [MESSAGES, SPLIT], ids=["messages", "split"])
def test_assistant_turns_equal_trl_but_for_the_final_newlines(
    folder: Path, tokenizer: Tokenizer, generation: Path, rows: list[Any]
):
    turns = [sum(message["role"] == "assistant" for message in messages) for messages in CONVERSATIONS]
    assert max(turns) == 4
    theirs = peers.peer_tokens(generation, rows, completion_only=False, max_length=None, assistant_only=True)
    assert len(theirs) == len(rows)
    for row, (ids, labels), count in zip(rows, theirs, turns, strict=True):
        ours = encode(tokenizer, row, loss_on="assistant")
        assert ours.input_ids == ids, row
        assert ours.labels == with_final_newlines(tokenizer, ids, labels), row
        assert ours.trained_tokens == sum(label != IGNORE for label in labels) + count


def test_marks_in_the_template_decide_exactly_as_trl(generation: Path):
    theirs = peers.peer_tokens(generation, MESSAGES, completion_only=False, max_length=None, assistant_only=True)
    ours = [pair(example) for example in encode_rows(Tokenizer(generation), MESSAGES, "assistant")]
    assert_equal(ours, theirs, MESSAGES)


def trained_text(tokenizer: Tokenizer, example: Example) -> list[str]:
    """The runs of trained tokens, as text."""
    runs: list[list[int]] = [[]]
    for index, label in enumerate(example.labels):
        if label == IGNORE:
            runs.append([])
        else:
            assert label == example.input_ids[index]
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


def test_with_the_header_the_speakers_name_is_trained_as_well(tiny: Path, generation: Path):
    for tokenizer in (Tokenizer(tiny), Tokenizer(generation)):
        for row in MESSAGES:
            example = encode(tokenizer, row, loss_on="assistant_with_header")
            assert example.input_ids == encode(tokenizer, row, loss_on="assistant").input_ids
            said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
            expected = [f"<|im_start|>assistant\n{words}<|im_end|>\n" for words in said]
            assert trained_text(tokenizer, example) == expected


def test_assistant_and_completion_agree_on_a_single_turn(tokenizer: Tokenizer):
    for row in MESSAGES:
        if sum(message["role"] == "assistant" for message in row["messages"]) == 1:
            assert encode(tokenizer, row, loss_on="assistant") == encode(tokenizer, row, loss_on="completion")


# --- cutting


@pytest.mark.parametrize("length", [2, 21, 40, 41, 64, 100, 10_000])
def test_cutting_equals_trl_which_drops_what_we_refuse(tiny: Path, length: int):
    tokenizer = Tokenizer(tiny)
    theirs = peers.peer_tokens(tiny, SPLIT, max_length=length)
    ours, refused = [], 0
    for number, row in enumerate(SPLIT, start=1):
        try:
            ours.append(pair(encode(tokenizer, row, max_length=length, where=f"row {number}")))
        except ValueError as error:
            assert str(error).startswith(f"row {number}: its ") and f"cut to max_length {length}" in str(error)
            refused += 1
    assert ours == theirs
    assert refused == len(SPLIT) - len(theirs)


@pytest.mark.parametrize("rows", [TEXTS, MESSAGES], ids=["text", "messages"])
def test_cutting_with_loss_on_everything_equals_trl(tiny: Path, rows: list[Any]):
    theirs = peers.peer_tokens(tiny, rows, max_length=17)
    ours = [pair(example) for example in encode_rows(Tokenizer(tiny), rows, "all", 17, special_in_text=True)]
    assert_equal(ours, theirs, rows)


def test_the_last_trained_token_that_fits_is_kept(tiny: Path):
    tokenizer, row = Tokenizer(tiny), peers.as_messages(peers.demo_rows(1))[0]
    whole = encode(tokenizer, row)
    begin = answer_begins(whole.labels)
    cut = encode(tokenizer, row, max_length=begin + 1)
    assert cut.input_ids == whole.input_ids[: begin + 1] and cut.trained_tokens == 1
    with pytest.raises(ValueError, match="removes the whole answer"):
        encode(tokenizer, row, max_length=begin)


# --- other templates


def with_template(tiny: Path, to: Path, template: str | None) -> Path:
    to.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, to)
    if template is not None:
        (to / "chat_template.jinja").write_text(template, encoding="utf-8")
    return to


# As Qwen3's and DeepSeek's: what the model thought is dropped from all turns but the last.
FORGETS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if loop.last else message.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The prompt for generation ends with something that a finished conversation does not have there.
OPENS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>\n{% endif %}"
)
NO_PROMPT = "{% for message in messages %}[{{ message.role }}] {{ message.content }}<|im_end|>{% endfor %}"
WITH_BOS = (
    "{{ '<|endoftext|>' }}{% for message in messages %}[{{ message.role }}]{{ message.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
THOUGHTFUL = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "<think>hm</think>2"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "<think>yes</think>Yes"},
]


@pytest.mark.parametrize("template", [FORGETS, OPENS, NO_PROMPT, WITH_BOS], ids=["forgets", "opens", "none", "bos"])
def test_completion_equals_trl_with_other_templates(tiny: Path, tmp_path: Path, template: str):
    folder = with_template(tiny, tmp_path / "model", template)
    rows = [*SPLIT[:20], {"prompt": THOUGHTFUL[:3], "completion": THOUGHTFUL[3:]}]
    theirs = peers.peer_tokens(folder, rows)
    ours = [pair(encode(Tokenizer(folder), row)) for row in rows]
    assert_equal(ours, theirs, rows)


def test_a_template_that_rewrites_earlier_turns_is_refused_for_assistant_turns(tiny: Path, tmp_path: Path):
    tokenizer = Tokenizer(with_template(tiny, tmp_path / "model", FORGETS))
    with pytest.raises(ValueError, match=r"^row 7: the chat template writes the first 2 messages differently"):
        encode(tokenizer, {"messages": THOUGHTFUL}, loss_on="assistant", where="row 7")
    assert encode(tokenizer, {"messages": THOUGHTFUL[:2]}, loss_on="assistant").trained_tokens


def test_a_template_that_refuses_the_messages_names_the_row(tiny: Path, tmp_path: Path):
    template = "{{ raise_exception('Conversation roles must alternate') }}"
    tokenizer = Tokenizer(with_template(tiny, tmp_path / "model", template))
    with pytest.raises(ValueError, match=r"^row 7: .*roles must alternate"):
        encode(tokenizer, MESSAGES[0], where="row 7")


# --- refusals


@pytest.mark.parametrize("loss_on", ["all", "completion", "assistant"])
def test_a_tokenizer_without_template_names_the_row(tiny: Path, tmp_path: Path, loss_on: Any):
    tokenizer = Tokenizer(with_template(tiny, tmp_path / "model", None))
    with pytest.raises(ValueError, match=r"^row 7: .*no chat template"):
        encode(tokenizer, MESSAGES[0], loss_on=loss_on, where="row 7")
    assert encode(tokenizer, TEXTS[0], where="row 7").trained_tokens  # plain text needs none


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
EMPTY = {"role": "assistant", "content": " \n", "name": "Bot"}
KWARGS = {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"add_generation_prompt": True}}


@pytest.mark.parametrize(
    ("row", "loss_on", "max_length", "fault"),
    [
        pytest.param({"messages": [ASSISTANT, USER]}, "completion", None, "last message must be the assistant's"),
        pytest.param({"messages": [USER]}, "completion", None, "last message must be the assistant's"),
        pytest.param({"prompt": [USER], "completion": [USER]}, "completion", None, "last message must be"),
        pytest.param({"messages": [USER]}, "assistant", None, "no token to train on with loss_on='assistant'"),
        pytest.param({"text": "Hello"}, "assistant", None, "loss_on='assistant' needs messages"),
        pytest.param({"prompt": "a", "completion": "b"}, "assistant", None, "loss_on='assistant' needs messages"),
        pytest.param({"messages": [USER, ASSISTANT]}, "completion", 10, "cut to max_length 10.*whole answer"),
        pytest.param({"messages": [USER, ASSISTANT]}, "assistant", 10, "cut to max_length 10.*whole answer"),
        pytest.param({"prompt": "the sea " * 9, "completion": "b"}, "completion", 8, "cut to max_length 8"),
        pytest.param({"messages": [USER, EMPTY]}, "completion", None, "says nothing in message 2"),
        pytest.param({"messages": [USER, EMPTY, USER, ASSISTANT]}, "assistant", None, "says nothing in message 2"),
        pytest.param({"prompt": "a", "completion": ""}, "completion", None, "the completion is empty"),
        pytest.param(KWARGS, "all", None, "chat_template_kwargs may not set add_generation_prompt"),
        pytest.param({"text": ""}, "all", None, "no token to train on with loss_on='all'"),
        pytest.param({"text": "Hello"}, "all", 1, "cut to max_length 1"),
        pytest.param({"messages": []}, "all", None, "non-empty list"),
        pytest.param({"text": "half an emoji: \ud83d"}, "all", None, "half a character"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_the_row_named(
    tiny: Path, row: Any, loss_on: Any, max_length: int | None, fault: str
):
    with pytest.raises(ValueError, match=fault) as caught:
        encode(Tokenizer(tiny), row, loss_on=loss_on, max_length=max_length, where="row 7")
    assert str(caught.value).startswith("row 7: ")


def test_a_turn_that_only_calls_a_tool_or_thinks_is_not_empty(tiny: Path):
    for extra in ({"tool_calls": [{"name": "clock"}]}, {"reasoning_content": "hm"}):
        row = {"messages": [USER, EMPTY | extra]}
        assert encode(Tokenizer(tiny), row).trained_tokens


def test_an_empty_turn_that_is_not_trained_is_no_fault(tiny: Path):
    messages = [USER, EMPTY, USER, ASSISTANT]
    assert encode(Tokenizer(tiny), {"messages": messages}).trained_tokens
    assert encode(Tokenizer(tiny), {"messages": messages[:2]}, loss_on="all").trained_tokens


def test_plain_text_needs_an_end_token(tiny: Path, tmp_path: Path):
    shutil.copy(tiny / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match=r"^row 7: the tokenizer has no end-of-text token"):
        encode(Tokenizer(tmp_path), {"text": "Hello"}, where="row 7")


def test_an_unknown_loss_on_lists_the_choices(tiny: Path):
    with pytest.raises(ValueError, match=r"'prompt'.*all, completion, assistant"):
        encode(Tokenizer(tiny), MESSAGES[0], loss_on="prompt")  # pyright: ignore[reportArgumentType]


def test_trained_tokens_leaves_out_the_first(tiny: Path):
    assert Example([5, 6, 7], [5, IGNORE, 7]).trained_tokens == 1
    assert Example([5], [5]).trained_tokens == 0
    example = encode(Tokenizer(tiny), TEXTS[0], loss_on="all")
    assert example.trained_tokens == len(example) - 1


# --- many rows


def test_many_rows_are_the_same_rows(real: Path):
    """More than one batch, chats and texts mixed, some of which spell control tokens."""
    tokenizer = Tokenizer(real)
    rows = [*MESSAGES, *STRINGS, *TEXTS, *SPLIT] * 2 + [
        {"prompt": [USER], "completion": [{**ASSISTANT, "content": "<|im_end|>"}]}
    ]
    assert len(rows) > BATCH
    ours = encode_rows(tokenizer, iter(rows))
    assert_equal([pair(example) for example in ours], [pair(encode(tokenizer, row)) for row in rows], rows)


def test_the_first_refused_row_is_named_or_all_are_dropped_as_trl_does(tiny: Path):
    tokenizer = Tokenizer(tiny)
    with pytest.raises(RowError, match=r"^row \d+: its \d+ tokens are cut to max_length 40") as caught:
        encode_rows(tokenizer, SPLIT, max_length=40)
    assert caught.value.reason == "answer cut away"
    kept = encode_rows(tokenizer, SPLIT, max_length=40, drop=True)
    assert 0 < len(kept) < len(SPLIT)
    assert [pair(example) for example in kept] == peers.peer_tokens(tiny, SPLIT, max_length=40)


def test_a_text_that_cannot_be_written_spoils_no_other_row(tiny: Path):
    """The tokenizers library refuses a whole batch for one of its texts: here a key that no check of rows looks at."""
    tokenizer = Tokenizer(tiny)
    tokenizer.template = "{{ messages[0].name }}" + (tokenizer.template or "")
    rows = [{"messages": [USER | {"name": name}, ASSISTANT]} for name in ("a", "\ud83d", "b")]
    assert len(encode_rows(tokenizer, rows, drop=True)) == 2
    with pytest.raises(RowError, match=r"^row 2: .*not valid Unicode"):
        encode_rows(tokenizer, rows)


# --- one begin token


def test_a_begin_token_in_the_text_is_not_doubled(with_bos: Path):
    """TRL has it twice: once from the text, once from the tokenizer."""
    tokenizer = Tokenizer(with_bos)
    row = {"text": "<|endoftext|>The sea"}
    ((theirs, _),) = peers.peer_tokens(with_bos, [row])
    assert theirs[:2] == [0, 0]
    ours = encode(tokenizer, row, special_in_text=True)
    assert ours.input_ids == theirs[1:] and ours.labels == theirs[1:]
    prompt = {"prompt": "<|endoftext|>The", "completion": " sea"}
    example = encode(tokenizer, prompt, special_in_text=True)
    assert example.input_ids == theirs[1:]
    assert trained_text(tokenizer, example) == [" sea<|im_end|>"]


def test_a_chat_never_has_a_begin_token_that_the_template_did_not_write(tiny: Path, with_bos: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(with_bos, folder)
    (folder / "chat_template.jinja").write_text(WITH_BOS, encoding="utf-8")
    ids = encode(Tokenizer(folder), {"messages": [USER, ASSISTANT]}).input_ids
    assert ids[0] == 0 and ids.count(0) == 1
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + WITH_BOS, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^row: the chat begins with '<\|endoftext\|>' twice; take one"):
        encode(Tokenizer(folder), {"messages": [USER, ASSISTANT]})
