"""The excerpt of Llama 2's vocabulary gives the ids that the book prints (chapter 4)."""

import pytest

from minift.study.response_template import ids_in_context, response_template_labels
from minift.study.toy_tokenizer import llama2_excerpt

RESPONSE = "### Assistant:"


def test_the_ids_of_the_book():
    tokenizer = llama2_excerpt()
    assert len(tokenizer) == 32_000
    assert tokenizer.encode(RESPONSE) == [835, 4007, 22137, 29901]
    assert (
        tokenizer.encode("\n" + RESPONSE)[2:]
        == [2277, 29937, 4007, 22137, 29901]
        == ids_in_context(tokenizer, RESPONSE)
    )
    assert tokenizer.add_tokens([RESPONSE]) == [32_000]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)


@pytest.mark.parametrize("text", ["### User: Hello\n### Assistant: No.", "a  b", "naïve — 3 ✓\n", "#### x", ""])
def test_any_text_comes_back(text: str):
    tokenizer = llama2_excerpt()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == (f" {text}" if text else "")  # the space mark that is put in front
    assert not any((tokenizer.backend.id_to_token(index) or "").startswith("<unused") for index in ids)


def test_the_search_fails_alone_and_works_as_one_token():
    tokenizer, row = llama2_excerpt(), "### User: Hello\n### Assistant: No."
    with pytest.raises(ValueError, match="every label would be -100"):
        response_template_labels(tokenizer, tokenizer.encode(row), RESPONSE)
    tokenizer.add_tokens([RESPONSE])
    labels = response_template_labels(tokenizer, tokenizer.encode(row), RESPONSE)
    assert tokenizer.decode([label for label in labels if label != -100]).strip() == "No."
