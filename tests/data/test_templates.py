"""The ready templates: against the ones that TRL ships, against the published formats in Python, and on a tokenizer."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
import trl
from transformers.utils import chat_template_utils as theirs
from trl.chat_template_utils import is_chat_template_stop_token_trained

import minift
from minift.data import chat
from minift.data.chat import render, render_marked
from minift.data.templates import TEMPLATES, ChatTemplate, use_template
from minift.data.tokenizer import Tokenizer
from minift.model.resize import resize_embeddings

Messages = list[dict[str, Any]]
SPECIAL: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
WORDS = [
    "Hello",
    " world ",
    "\n",
    "",
    "Grüße",
    "世界",
    "👩‍👩‍👧",
    "e\u0301",
    "<b>&amp;\"'",
    "{{ x }}",
    "{% if %}",
    "1+1=2",
    "\t",
    "\u2028",
]


def text(generator: random.Random) -> str:
    return "".join(generator.choice(WORDS) for _ in range(generator.randint(0, 6)))


def conversations(system: str = "some", seed: int = 0) -> list[Messages]:
    """200 conversations of 1 to 9 turns; some or all or none with a system message; unicode, empty, spaces around."""
    generator = random.Random(seed)
    made: list[Messages] = []
    for index in range(200):
        roles = ["user", "assistant"] * 5
        head = ["system"] if system == "all" or (system == "some" and index % 2) else []
        roles = head + roles[: generator.randint(1, 9)]
        made.append([{"role": role, "content": text(generator)} for role in roles])
    return made


def shipped(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


RENDER: Callable[..., Any] = theirs.render_jinja_template  # its return type is declared as text


def their_render(source: str, messages: Messages, prompt: bool, **variables: Any) -> tuple[str, list[tuple[int, int]]]:
    """transformers' own rendering, with its own spans of the generation blocks."""
    texts, spans = RENDER(
        [messages],
        chat_template=source,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=True,
        **SPECIAL,
        **variables,
    )
    return texts[0], [(start, end) for start, end in spans[0]]


# --- the templates that TRL ships -------------------------------------------------------------------------------------

SHIPPED = {  # ours: theirs, system messages, what their marks have more than ours: in front, behind
    "chatml": ("qwen2_5", "all", "\n", "\n"),  # without a system message Qwen writes its own
    "llama-3": ("llama3", "some", "", ""),
    "phi-3": ("phi3", "some", "", "\n"),
    "gemma": ("gemma", "none", "", "\n"),
    "harmony": ("gptoss", "some", "<|start|>assistant", ""),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_text_equals_the_template_that_trl_ships(name: str):
    source, system, _, _ = SHIPPED[name]
    for messages in conversations(system):
        for prompt in (False, True):
            expected, _ = their_render(shipped(source), messages, prompt)
            assert render(TEMPLATES[name].source, messages, prompt, **SPECIAL) == expected


@pytest.mark.parametrize("name", SHIPPED)
def test_marks_are_trls_without_header_and_line_break(name: str):
    """TRL trains the rest of the header, and the line break after the end of the turn, which no model has to write."""
    source, system, front, behind = SHIPPED[name]
    for messages in conversations(system, seed=1):
        whole, spans = their_render(shipped(f"{source}_training"), messages, False)
        expected = []
        for start, end in spans:
            if whole[start:end] != SPECIAL["eos_token"]:  # Phi-3 ends the conversation with a block of one token
                assert whole.startswith(front, start) and whole[:end].endswith(behind)
                start, end = start + len(front), end - len(behind)
            expected.append((start, end))
        assert render_marked(TEMPLATES[name].source, messages, **SPECIAL) == (whole, expected)


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
HARMONY = {
    "thinking, last turn": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "thinking": "because"},
    ],
    "thinking, forgotten": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "forgotten"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning": "kept"},
    ],
    "no thoughts": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": ""}],
    "call": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}],
    "call with thinking": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [CALL], "thinking": "I add"},
        {"role": "tool", "content": "3"},
    ],
    "call with content": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [CALL["function"] | {"content_type": "text"}], "content": "I add"},
        {"role": "tool", "content": {"sum": 3}},
    ],
    "call, then answered": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [CALL], "thinking": "forgotten"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3.", "thinking": "kept"},
    ],
}


@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
@pytest.mark.parametrize("case", HARMONY)
def test_harmony_channels_equal_gpt_oss(case: str, prompt: bool):
    expected, _ = their_render(shipped("gptoss"), HARMONY[case], prompt)
    assert render(TEMPLATES["harmony"].source, HARMONY[case], prompt) == expected


def test_harmony_variables_equal_gpt_oss():
    variables = {"reasoning_effort": "high", "model_identity": "You are a parrot."}
    messages = HARMONY["thinking, last turn"]
    expected, _ = their_render(shipped("gptoss"), messages, True, **variables)
    assert "Reasoning: high" in expected and "parrot" in expected
    assert render(TEMPLATES["harmony"].source, messages, True, **variables) == expected


def test_harmony_says_what_trains_a_call():
    source, messages = TEMPLATES["harmony"].source, HARMONY["call with thinking"]
    whole, spans = render_marked(source, messages)
    said = [whole[start:end] for start, end in spans]
    assert said == [
        "<|channel|>analysis<|message|>I add<|end|>"
        "<|start|>assistant to=functions.add<|channel|>commentary json<|message|>"
        '{"a": 1, "b": "ü"}<|call|>'
    ]


# --- the published formats, written down in Python --------------------------------------------------------------------


def alternating(messages: Messages) -> tuple[str | None, list[str]]:
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    return system, [message["content"] for message in messages if message["role"] != "system"]


def llama2(messages: Messages, prompt: bool) -> str:
    """Meta's `chat_completion`: the system goes into the first turn, and each pair is a sequence of its own."""
    system, turns = alternating(messages)
    if system is not None:
        turns[0] = "<<SYS>>\n" + system + "\n<</SYS>>\n\n" + turns[0]
    pairs = [
        f"<s>[INST] {question.strip()} [/INST] {answer.strip()} </s>"
        for question, answer in zip(turns[::2], turns[1::2], strict=False)
    ]
    return "".join(pairs) + (f"<s>[INST] {turns[-1].strip()} [/INST]" if len(turns) % 2 else "")


def mistral(messages: Messages, prompt: bool) -> str:
    """mistral-common v3: <s>[INST] user message[/INST] assistant message</s>[INST] new user message[/INST]."""
    system, turns = alternating(messages)
    last = len(turns) - 1 if len(turns) % 2 else len(turns) - 2
    if system:
        turns[last] = system + "\n\n" + turns[last]
    return "<s>" + "".join(f" {one}</s>" if i % 2 else f"[INST] {one}[/INST]" for i, one in enumerate(turns))


def zephyr(messages: Messages, prompt: bool) -> str:
    turns = [f"<|{message['role']}|>\n{message['content']}</s>\n" for message in messages]
    return "".join(turns) + "<|assistant|>\n" * prompt


def chatml(messages: Messages, prompt: bool) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n" * prompt


@pytest.mark.parametrize(
    ("name", "published"), [("llama-2", llama2), ("mistral", mistral), ("zephyr", zephyr), ("chatml", chatml)]
)
def test_text_equals_the_published_format(name: str, published: Callable[[Messages, bool], str]):
    for messages in conversations():
        for prompt in (False, True):
            expected = published(messages, prompt)
            assert render(TEMPLATES[name].source, messages, prompt, **SPECIAL) == expected


DAY = "06 October 2026"
NAME = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."


@pytest.fixture
def same_day(monkeypatch: pytest.MonkeyPatch):
    class Day(chat.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2026, 10, 6)

    monkeypatch.setattr(chat, "datetime", Day)
    monkeypatch.setattr(theirs, "datetime", Day)


def smollm3(messages: Messages, prompt: bool, think: bool, instructions: str) -> str:
    """As the model's page describes it: metadata, instructions, and no end of the system turn without tools."""
    mode, header = ("/think", "") if think else ("/no_think", "<think>\n\n</think>\n")
    written = f"<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: {DAY}\n"
    written += f"Reasoning Mode: {mode}\n\n## Custom Instructions\n\n{instructions}\n\n"
    for message in messages:
        if message["role"] == "user":
            written += f"<|im_start|>user\n{message['content']}<|im_end|>\n"
        elif message["role"] == "assistant":
            answer = message["content"]
            while answer.startswith("\n"):
                answer = answer[1:]
            written += f"<|im_start|>assistant\n{header}{answer}<|im_end|>\n"
    return written + f"<|im_start|>assistant\n{header}" * prompt


@pytest.mark.usefixtures("same_day")
def test_smollm3_instructions_and_turns():
    for messages in conversations("all"):
        messages[0]["content"] = "Be " + messages[0]["content"]  # empty instructions are the next test
        for prompt in (False, True):
            expected = smollm3(messages, prompt, True, messages[0]["content"].rstrip())
            assert render(TEMPLATES["smollm3"].source, messages, prompt) == expected


@pytest.mark.usefixtures("same_day")
@pytest.mark.parametrize(
    ("system", "variables", "think", "instructions"),
    [
        (None, {"enable_thinking": False}, False, NAME),
        ("/no_think", {}, False, NAME),
        ("/no_think", {"enable_thinking": True}, False, NAME),  # the message has the last word
        ("Be brief. /think  ", {"enable_thinking": False}, True, "Be brief."),
        ("/no_think Be brief.", {}, False, " Be brief."),
        ("Be brief.", {"enable_thinking": False}, False, "Be brief."),
    ],
)
def test_smollm3_flags(system: str | None, variables: dict[str, Any], think: bool, instructions: str):
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nHello"}]
    for prompt in (False, True):
        expected = smollm3(messages, prompt, think, instructions)
        assert render(TEMPLATES["smollm3"].source, messages, prompt, **variables) == expected


@pytest.mark.usefixtures("same_day")
def test_smollm3_thinks_by_default_and_can_be_overridden():
    source = TEMPLATES["smollm3"].source
    thinking = render(source, [{"role": "user", "content": "Hi"}], True)
    assert f"Reasoning Mode: /think\n\n## Custom Instructions\n\n{NAME} Your role as an assistant involves" in thinking
    assert thinking.endswith(
        "needed to reach the conclusion.\n\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    system = {"role": "system", "content": "Only this. /no_think /system_override"}
    assert render(source, [system, {"role": "tool", "content": "3"}], True) == (
        "<|im_start|>system\nOnly this.<|im_end|>\n<|im_start|>user\n3<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n"
    )


# --- every template ---------------------------------------------------------------------------------------------------


def allowed(name: str, seed: int) -> list[Messages]:
    return conversations("none" if name == "gemma" else "some", seed)[:60]


@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_renders_and_marks_the_same(name: str):
    source = TEMPLATES[name].source
    for messages in allowed(name, 2):
        for prompt in (False, True):
            assert render_marked(source, messages, prompt, **SPECIAL) == their_render(source, messages, prompt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_answer_is_marked_from_the_prompt_to_the_end_of_turn(name: str):
    """The mark begins where the prompt for that answer ends, and ends with the token that stops generation."""
    template = TEMPLATES[name]
    end_of_turn = SPECIAL.get(template.end_of_turn, template.end_of_turn)
    for messages in allowed(name, 3):
        if messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": "Yes."})
        whole, spans = render_marked(template.source, messages, **SPECIAL)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if name == "phi-3":  # its last token stands apart, behind a line break that is not trained
            assert whole[slice(*spans.pop())] == SPECIAL["eos_token"]
        assert len(spans) == len(answers)
        prompt = render(template.source, messages[:-1], True, **SPECIAL)
        assert whole.startswith(prompt) and spans[-1][0] == len(prompt)
        assert whole[: spans[-1][1]].endswith(end_of_turn)
        for answer, (start, end) in zip(answers, spans, strict=True):
            assert answer.strip() in whole[start:end]


REFUSED = {
    "llama-2": ["user user", "assistant", "system assistant", "user tool"],
    "mistral": ["user user", "assistant", "system assistant", "user tool"],
    "phi-3": ["tool", "user developer"],
    "zephyr": ["tool", "user developer"],
    "gemma": ["system user", "user user", "assistant", "user tool"],
    "harmony": ["user system", "tool", "user assistant tool"],
    "smollm3": ["user system", "developer"],
}


@pytest.mark.parametrize(("name", "roles"), [(name, roles) for name in REFUSED for roles in REFUSED[name]])
def test_roles_that_a_dialect_does_not_have_are_refused(name: str, roles: str):
    messages = [{"role": role, "content": "a"} for role in roles.split()]
    with pytest.raises(ValueError, match=r"refuses these messages: (there is no|user and|after the)"):
        render(TEMPLATES[name].source, messages, False, **SPECIAL)


@pytest.mark.parametrize("name", ["mistral", "harmony", "smollm3"])
def test_tools_are_refused_where_the_published_template_writes_them(name: str):
    with pytest.raises(ValueError, match="does not write tools"):
        render(TEMPLATES[name].source, [{"role": "user", "content": "a"}], False, tools=[{"name": "add"}], **SPECIAL)


def test_harmony_refuses_two_calls_in_a_message():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL, CALL]}]
    with pytest.raises(ValueError, match="one call"):
        render(TEMPLATES["harmony"].source, messages, False)


# --- on a tokenizer ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer(tiny)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_token_of_the_template_is_one_token(tokenizer: Tokenizer, name: str):
    template = TEMPLATES[name]
    known, before = tokenizer.special_tokens, len(tokenizer)
    added = use_template(tokenizer, name)
    assert added == [token for token in template.special_tokens if token not in known]
    assert len(tokenizer) == before + len(added)
    assert [tokenizer.encode(token)[0] for token in added] == list(range(before, before + len(added)))
    for token in template.special_tokens:
        assert tokenizer.encode(token) == [tokenizer.special_tokens[token]]
    assert use_template(tokenizer, name) == []  # a second time, nothing is new
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    ids = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
    end_of_turn = tokenizer.special.get(template.end_of_turn, template.end_of_turn)
    assert tokenizer.special_tokens[end_of_turn] in ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_trl_finds_the_stop_token_trained(name: str):
    """TRL's own check, with the end of turn as the stop token; it needs marks, and the marks need that token."""
    template, peer = TEMPLATES[name], peers.tiny_tokenizer()
    peer.add_special_tokens({"additional_special_tokens": list(template.special_tokens)})
    peer.chat_template = template.source
    peer.eos_token = {"eos_token": peer.eos_token}.get(template.end_of_turn, template.end_of_turn)
    assert is_chat_template_stop_token_trained(peer)


def test_a_saved_tokenizer_keeps_template_and_tokens(tokenizer: Tokenizer, tmp_path: Path):
    use_template(tokenizer, "llama-3")
    again = Tokenizer(tokenizer.save(tmp_path))
    assert again.template == TEMPLATES["llama-3"].source
    assert use_template(again, "llama-3") == []


def test_a_template_of_your_own(tokenizer: Tokenizer):
    source = "{% for message in messages %}##[{{ message.role | upper }}]##>{{ message.content }}{% endfor %}"
    own = ChatTemplate(source, special_tokens=("##[YODA]##>", "<|im_end|>"))
    assert use_template(tokenizer, own) == ["##[YODA]##>"]
    text = tokenizer.apply_chat_template([{"role": "yoda", "content": "Hmm"}])
    assert tokenizer.encode(text)[0] == len(tokenizer) - 1


def test_tokens_of_a_plain_source_are_found_by_their_form(tokenizer: Tokenizer):
    source = "{% for m in messages %}{{ '<|turn|>' + m.content + '<|im_end|>' }} <|a b|> <turn> |{% endfor %}<|turn|>"
    assert use_template(tokenizer, source) == ["<|turn|>"]


def test_the_model_grows_only_if_it_must(tokenizer: Tokenizer, tiny: Path):
    model = minift.load_model(tiny, quantize=None, dtype=torch.float32, device="cpu")
    assert use_template(tokenizer, "chatml") == []
    assert resize_embeddings(model, len(tokenizer)).added == 0
    assert use_template(tokenizer, "gemma") == ["<start_of_turn>", "<end_of_turn>"]
    assert resize_embeddings(model, len(tokenizer)).added == 2


@pytest.mark.parametrize("name", ["chatlm", "", "llama3"])
def test_an_unknown_name_lists_the_names(tokenizer: Tokenizer, name: str):
    before = tokenizer.template
    with pytest.raises(ValueError, match="choose one of chatml, llama-2, llama-3, mistral, phi-3"):
        use_template(tokenizer, name)
    assert tokenizer.template == before


def test_a_broken_source_changes_nothing(tokenizer: Tokenizer):
    before = tokenizer.template, len(tokenizer)
    with pytest.raises(ValueError, match="not valid Jinja"):
        use_template(tokenizer, "<|new|>{% for message in messages %}")
    assert (tokenizer.template, len(tokenizer)) == before


@pytest.mark.parametrize(("name", "role"), [("zephyr", "eos_token"), ("gemma", "bos_token"), ("llama-2", "bos_token")])
def test_a_token_that_the_tokenizer_lacks_is_named(tokenizer: Tokenizer, name: str, role: str):
    """Jinja would write nothing in its place: a text without a beginning, or turns without an end."""
    del tokenizer.special[role]
    with pytest.raises(ValueError, match=f"writes the tokenizer's {role}"):
        use_template(tokenizer, name)


def test_roles_are_what_the_sources_read():
    for template in TEMPLATES.values():
        assert template.roles == tuple(role for role in ("bos_token", "eos_token") if role in template.source)
        assert template.note
