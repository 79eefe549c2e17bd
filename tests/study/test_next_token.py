"""The next token, going on, and costs, against transformers on the same checkpoint."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

import minift
from minift.study.next_token import answer_costs, format_costs, go_on, next_tokens, short_answers, spell, token_costs

TEXT = "<|im_start|>user\nSay sea<|im_end|>\n"
ROW = {"messages": [{"role": "user", "content": "Say sea"}, {"role": "assistant", "content": "Sea"}]}
# Two programs add in another order; fp32 logits of a model of two layers differ by some 1e-6.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> minift.Tokenizer:
    return minift.load_tokenizer(tiny)


@pytest.fixture(scope="module")
def model(tiny: Path) -> minift.CausalLM:
    return minift.load_model(tiny, dtype=torch.float32)


@pytest.fixture(scope="module")
def peer(tiny: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def test_the_likeliest_tokens_are_those_of_transformers(model, tokenizer, peer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    with torch.no_grad():
        expected = peer(torch.tensor([ids])).logits[0, -1].softmax(-1).topk(4)
    found = next_tokens(model, tokenizer, TEXT, 4)
    assert [guess.id for guess in found] == expected.indices.tolist()
    assert [guess.probability for guess in found] == pytest.approx(expected.values.tolist(), rel=CLOSE)


def test_it_goes_on_as_transformers_does(model, tokenizer, peer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    out = peer.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=9, do_sample=False, pad_token_id=2
    )
    assert go_on(model, tokenizer, TEXT, 9) == tokenizer.decode(out[0, len(ids) :].tolist())


def test_going_on_ends_with_the_end_token_and_shows_it(model, tokenizer, monkeypatch: pytest.MonkeyPatch):
    logits_v = torch.zeros(model.config.vocab_size)
    logits_v[tokenizer.eos_id] = 1.0
    monkeypatch.setattr(model, "logits", lambda hidden: logits_v.expand(*hidden.shape[:-1], -1))
    assert go_on(model, tokenizer, TEXT, 9) == "<|im_end|>"


def test_costs_are_those_of_transformers_and_their_mean_is_its_loss(model, tokenizer, peer):
    example = minift.encode(tokenizer, ROW)
    ids, labels = (torch.tensor([values]) for values in (example.input_ids, example.labels))
    with torch.no_grad():
        answer = peer(ids, labels=labels)
    each = F.cross_entropy(answer.logits[0, :-1], labels[0, 1:], reduction="none", ignore_index=-100)
    costs = token_costs(model, tokenizer, example)
    assert [cost.id for cost in costs] == [label for label in example.labels if label != -100]
    assert [cost.nats for cost in costs] == pytest.approx(each[labels[0, 1:] != -100].tolist(), rel=CLOSE)
    assert sum(cost.nats for cost in costs) / len(costs) == pytest.approx(answer.loss.item(), rel=CLOSE)
    found = answer_costs(model, tokenizer, [ROW, ROW])
    end = next(cost.nats for cost in costs if cost.id == tokenizer.eos_id)
    assert (found.loss, found.first, found.end) == pytest.approx((answer.loss.item(), costs[0].nats, end), rel=CLOSE)


def test_the_table_of_costs(model, tokenizer):
    costs = token_costs(model, tokenizer, minift.encode(tokenizer, ROW))
    head, *lines, last = format_costs(costs).splitlines()
    assert head.split() == ["token", "p", "-log", "p"] and len(lines) == len(costs)
    p, nats = map(float, lines[0].split()[1:])
    assert p == pytest.approx(2.718281828**-nats, abs=0.006)  # both are rounded: p to 3 digits, nats to 2
    assert last.startswith("mean = loss")
    with pytest.raises(ValueError, match="no token is trained"):
        format_costs([])


def test_tokens_are_spelled_so_that_nothing_is_hidden(tokenizer):
    ids = tokenizer.encode("a b\n<|im_end|>", add_special_tokens=False)
    assert "".join(spell(tokenizer, ids)) == "a·b↵«<|im_end|>»"


def test_answers_without_an_end_have_no_end_to_cost(model, tiny: Path):
    endless = minift.load_tokenizer(tiny)
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    minift.use_template(endless, source + "{% if add_generation_prompt %}assistant: {% endif %}")
    with pytest.raises(ValueError, match="no control token ends the answers"):
        answer_costs(model, endless, [ROW])


def test_the_short_answers_can_all_be_trained_on(tokenizer):
    report = minift.examine(tokenizer, short_answers())
    assert len(report.examples) == 8 and sum(report.ends.values()) == 8
