"""The search for a response template, its famous failure and both ways out, on a tokenizer made to show them.

The tokenizer splits as Llama 2's does: BPE over pieces with a space mark, one put in front of every text; it knows
"_###" from where it stands behind a space, and "##" and "#" from elsewhere.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from minift.data.encode import IGNORE, encode
from minift.data.tokenizer import Tokenizer
from minift.study.response_template import ids_in_context, response_template_labels

RESPONSE, QUESTION = "### Assistant:", "### User:"
MARK = "\u2581"
MERGES = [
    ("#", "#"), (MARK, "##"), (MARK + "##", "#"), (MARK, "A"), (MARK + "A", "s"), (MARK + "As", "s"), ("i", "s"),
    ("is", "t"), ("ist", "a"), ("ista", "n"), ("istan", "t"), (MARK, "U"), (MARK + "U", "s"), (MARK + "Us", "e"),
    (MARK + "Use", "r"),
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}### {{ 'Assistant' if m.role == 'assistant' else 'User' }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{% endif %}"
)


@pytest.fixture()
def tokenizer(tmp_path: Path) -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), MARK]
    pieces += [chr(code) for code in range(33, 127)] + ["".join(pair) for pair in MERGES]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer(tmp_path)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([index]) for index in ids]


ROW = "### User: Hello\n### Assistant: Sure, I can"


def test_the_template_alone_is_not_what_it_is_in_a_row(tokenizer: Tokenizer):
    """The book's table for Llama 2: 835 4007 22137 29901 alone, 2277 29937 4007 22137 29901 in context."""
    alone = tokenizer.encode(RESPONSE)
    assert pieces(tokenizer, alone) == [" ###", " Ass", "istant", ":"]
    row = tokenizer.encode(ROW)
    assert pieces(tokenizer, row)[-17:-12] == ["##", "#", " Ass", "istant", ":"]


def test_the_search_fails_and_says_so_instead_of_masking_everything(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="every label would be -100") as caught:
        response_template_labels(tokenizer, tokenizer.encode(ROW), RESPONSE)
    a, b, c, d = tokenizer.encode(RESPONSE)
    assert f"The template is {a} ' ###' {b} ' Ass' {c} 'istant' {d} ':'; the row has" in str(caught.value)
    two, one = tokenizer.encode("x##")[-1], tokenizer.encode("x#")[-1]
    assert f"the row has {two} '##' {one} '#' {b} ' Ass' {c} 'istant' {d} ':'. Give" in str(caught.value)


def test_a_row_without_the_words_shows_its_beginning(tokenizer: Tokenizer):
    ids = tokenizer.encode("Hi all")
    with pytest.raises(ValueError, match=rf"the row has {ids[0]} ' ' {ids[1]} 'H' .*\. Give"):
        response_template_labels(tokenizer, ids, RESPONSE)


def trained(tokenizer: Tokenizer, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORE])


def test_first_way_out_ids_in_context(tokenizer: Tokenizer):
    """The book writes tokenizer.encode("\\n### Assistant:", add_special_tokens=False)[2:]."""
    ids = ids_in_context(tokenizer, RESPONSE)
    assert ids == tokenizer.encode("\n" + RESPONSE, add_special_tokens=False)[2:]
    row = tokenizer.encode(ROW)
    labels = response_template_labels(tokenizer, row, ids)
    assert trained(tokenizer, labels) == " Sure, I can"
    assert labels[-12:] == row[-12:] and set(labels[:-12]) == {IGNORE}


def test_second_way_out_one_special_token(tokenizer: Tokenizer):
    size = len(tokenizer)
    assert tokenizer.add_tokens([RESPONSE]) == [size]
    row = tokenizer.encode(ROW)
    assert row.count(size) == 1
    labels = response_template_labels(tokenizer, row, RESPONSE)
    assert trained(tokenizer, labels) == "  Sure, I can"  # the tokenizer puts a space behind a special token, too


def chat(tokenizer: Tokenizer, *turns: str) -> tuple[dict[str, Any], list[int]]:
    messages = [{"role": ("user", "assistant")[number % 2], "content": words} for number, words in enumerate(turns)]
    text = tokenizer.apply_chat_template(messages)
    return {"messages": messages}, tokenizer.encode(text, add_special_tokens=False)


def test_without_an_instruction_template_only_the_last_answer_is_trained(tokenizer: Tokenizer):
    _, ids = chat(tokenizer, "a", "One", "b", "Two")
    response, question = ids_in_context(tokenizer, RESPONSE), ids_in_context(tokenizer, QUESTION)
    assert trained(tokenizer, response_template_labels(tokenizer, ids, response)) == " Two</s> \n"
    both = response_template_labels(tokenizer, ids, response, question)
    assert trained(tokenizer, both) == " One</s> \n Two</s> \n"


def test_a_question_at_the_end_is_not_trained(tokenizer: Tokenizer):
    _, ids = chat(tokenizer, "a", "One", "b")
    response, question = ids_in_context(tokenizer, RESPONSE), ids_in_context(tokenizer, QUESTION)
    assert trained(tokenizer, response_template_labels(tokenizer, ids, response, question)) == " One</s> \n"


def test_structure_gives_the_same_labels_without_any_template(tokenizer: Tokenizer):
    row, ids = chat(tokenizer, "a", "One", "b", "Two")
    response, question = ids_in_context(tokenizer, RESPONSE), ids_in_context(tokenizer, QUESTION)
    searched = response_template_labels(tokenizer, ids, response, question)
    assert encode(tokenizer, row, loss_on="assistant").labels == searched
    assert encode(tokenizer, row).labels == response_template_labels(tokenizer, ids, response)


def collator(ids: list[int], response: list[int], instruction: list[int] | None) -> list[int]:
    """TRL 0.19's rule, told from its description: pairs of places where a question and an answer begin."""
    labels = list(ids)

    def places(of: list[int]) -> list[int]:
        return [i for i in range(len(ids) - len(of) + 1) if ids[i : i + len(of)] == of]

    answers = [place + len(response) for place in places(response)]
    if instruction is None:
        return [IGNORE] * answers[-1] + labels[answers[-1] :]
    questions = places(instruction)
    if questions[0] > answers[0]:
        questions = [0, *questions]
    for number, (question, answer) in enumerate(zip(questions, answers, strict=False)):
        labels[question if number else 0 : answer] = [IGNORE] * (answer - (question if number else 0))
    if len(answers) < len(questions):
        labels[questions[-1] :] = [IGNORE] * (len(labels) - questions[-1])
    return labels


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    turns=st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=2, max_size=8),
    only_last=st.booleans(),
)
def test_equals_the_old_collator_where_turns_alternate(turns: list[list[int]], only_last: bool):
    """Ids as such: the question's template is 7 8, the answer's 7 9."""
    turns[1] = [*turns[1], 1]  # something to train
    turns[-1] = [*turns[-1], 1]
    ids = [index for number, words in enumerate(turns) for index in ([7, 9] if number % 2 else [7, 8]) + words]
    instruction = None if only_last else [7, 8]
    tokenizer: Any = None  # nothing is text here
    assert response_template_labels(tokenizer, ids, [7, 9], instruction) == collator(ids, [7, 9], instruction)


def test_templates_that_cannot_work_are_refused(tokenizer: Tokenizer):
    ids = tokenizer.encode("a" + RESPONSE)
    with pytest.raises(ValueError, match="the response template is empty"):
        response_template_labels(tokenizer, ids, [])
    with pytest.raises(ValueError, match="the instruction template is not in the row"):
        response_template_labels(tokenizer, ids, ids[-1:], QUESTION)
    with pytest.raises(ValueError, match="nothing follows the response template"):
        response_template_labels(tokenizer, ids, ids[-1:])
    with pytest.raises(ValueError, match=r"'#' merges with '# Assistant:'.*or one token"):
        ids_in_context(tokenizer, "# Assistant:", before="#")
