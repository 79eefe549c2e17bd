"""e15: the oracle is the template as a Jinja program, which is how a checkpoint ships it, and a tokenizer of one regex.

Jinja comes with torch. What the peer makes of the same program is recorded in the two GOLDEN texts.
"""

import re

import jinja2
import torch

from minift.course.spec import Case, check

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What transformers 5.23.0 returns for TEMPLATE: PreTrainedTokenizerFast.apply_chat_template(..., tokenize=False).
ASKED = [
    {"role": "user", "content": " What is NF4?\n"},
    {"role": "assistant", "content": "Four bits.\n\nSixteen values."},
    {"role": "user", "content": "<s and >?"},
]
GOLDEN_PROMPT = (
    "<s><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n What is NF4?\n<|im_end|>\n"
    "<|im_start|>assistant\nFour bits.\n\nSixteen values.<|im_end|>\n<|im_start|>user\n<s and >?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
GOLDEN_NO_SYSTEM = (
    "<s><|im_start|>system\n<|im_end|>\n<|im_start|>user\n What is NF4?\n<|im_end|>\n"
    "<|im_start|>assistant\nFour bits.\n\nSixteen values.<|im_end|>\n"
)
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
WORDS = ["Hi", "bits", "four", "why", "so", "the", "rank", "loss", "You", "helpful"]
# Merges across the border of two pieces: a line break before a line break, a space before a word.
MERGED = ["\n\n", "system", "user", "assistant", *WORDS, *(f" {word}" for word in WORDS)]


def pick(draw, options):
    return options[int(torch.randint(len(options), (1,), generator=draw))]


def content(draw, before="", after=""):
    return before + " ".join(pick(draw, WORDS) for _ in range(int(torch.randint(2, 5, (1,), generator=draw)))) + after


def conversation(draw, *roles, before="", after=""):
    return [{"role": role, "content": content(draw, before, after)} for role in roles]


def text_of(messages, add_generation_prompt=False):
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
    return template.render(messages=messages, bos_token="<s>", add_generation_prompt=add_generation_prompt)


def vocabulary(draw):
    """All characters and the merged pieces, in an order that nobody can guess."""
    letters = sorted(set("".join(MERGED) + " .,?YouareahelpfulassistantN4"))
    known = [*SPECIAL, *letters, *MERGED]
    return [known[i] for i in torch.randperm(len(known), generator=draw)]


def ids_of(text, known):
    """The longest piece at every place; a rendered text begins with <s>, so no space is put in front."""
    longest_first = sorted(known, key=lambda piece: (piece in SPECIAL, len(piece)), reverse=True)
    return [known.index(piece) for piece in re.findall("|".join(map(re.escape, longest_first)), text)]


@check(points=1)
def text_of_a_conversation(draw):
    """The text is exactly that of the template: start, default system prompt, every turn with its end, line breaks."""
    given = {"messages": ASKED, "add_generation_prompt": True}
    yield Case("render", given, GOLDEN_PROMPT, about="no system message, content with spaces at its ends, asked for")
    given = {"messages": [{"role": "system", "content": ""}, *ASKED[:2]]}
    yield Case("render", given, GOLDEN_NO_SYSTEM, about="an empty system message")
    messages = conversation(draw, "system", "user", "assistant", "user", "assistant")
    yield Case("render", {"messages": messages}, text_of(messages), about="a system message and two rounds")
    messages = conversation(draw, "user", "assistant", "user")
    given = {"messages": messages, "add_generation_prompt": True}
    yield Case("render", given, text_of(messages, True), about="no system message, with the generation prompt")


@check(points=1)
def ids_of_a_conversation(draw):
    """One <s> at the front, the whole text encoded in one go, a generation prompt only where an answer is wanted."""
    for before, after in (("", ""), ("\n", "\n")):
        about = f"two rounds, content {'with' if before else 'without'} line breaks at its ends"
        known = vocabulary(draw)
        messages = conversation(draw, "user", "assistant", "user", "assistant", before=before, after=after)
        given = {"messages": messages, "vocabulary": known}
        yield Case("to_train", given, ids_of(text_of(messages), known), about=about)
        given = {"messages": messages[:3], "vocabulary": known}
        yield Case("to_answer", given, ids_of(text_of(messages[:3], True), known), about=f"{about}, to be answered")


@check(points=1)
def nobody_speaks_as_somebody_else(draw):
    """Content that spells a special token and roles that do not exist are refused, everything else is not."""
    for token in SPECIAL:
        messages = conversation(draw, "user", "assistant", "user")
        victim = int(torch.randint(3, (1,), generator=draw))
        messages[victim]["content"] += token + pick(draw, WORDS)
        yield Case("render", {"messages": messages}, raises="ValueError", about=f"a message contains {token}")
    messages = conversation(draw, "user", "assistant") + conversation(draw, "tool")
    yield Case("render", {"messages": messages}, raises="ValueError", about="the role of a message is tool")
    messages = conversation(draw, "user", "assistant", after=" <s |im_end> im_start")
    yield Case("render", {"messages": messages}, text_of(messages), about="content that only looks a little like it")
