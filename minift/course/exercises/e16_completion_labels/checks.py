"""e16: the judge writes the row, so it knows of every character whether it belongs to an answer; nothing is searched.

That a token on the border is trained is what transformers does, recorded in GOLDEN.
"""

import re

import torch

from minift.course.spec import Case, check

RESPONSE, END = "### Answer:\n", "<e>"
WORDS = ["Why", "So", "No", "bits", "rank", "four", "yes", "loss"]
# The pieces a row is cut into if nothing merges across the borders of the template.
PLAIN = [END, "\n", "###", " Question", " Answer", ":", ":\n", ".", "?", *WORDS, *(f" {word}" for word in WORDS)]
LEFT, RIGHT = ["\n###"], [":\n\n"]  # these merge with the line break before the template, and after it
# transformers 5.23.0, apply_chat_template(return_assistant_tokens_mask=True) on a Unigram tokenizer of these pieces.
GOLDEN_PIECES = [
    "<e>", "\n", "\n\n", "###", "\n###", " ", " Question", " Answer", ":", ":\n", ":\n\n", "Why", "So", "No", " so",
    "?", ".",
]  # fmt: skip
GOLDEN_IDS = [4, 6, 9, 11, 15, 0, 4, 7, 9, 12, 16, 0, 4, 6, 9, 11, 14, 15, 0, 4, 7, 10, 13, 16, 0]
GOLDEN_MASK = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
NAMES = ("input_ids", "labels", "attention_mask")


def number(draw, low, high):
    return int(torch.randint(low, high, (1,), generator=draw))


def sentence(draw, end):
    return " ".join(WORDS[number(draw, 0, len(WORDS))] for _ in range(number(draw, 2, 5))) + end


def row(draw, rounds, pieces, before="", cut_off=False, empty=False, bare=False):
    """The ids of a conversation and its labels; `before` stands at the start of every answer."""
    parts = []  # text, whether it belongs to an answer
    for _ in range(rounds):
        answer = before + sentence(draw, "") + "." + END
        parts += [("\n### Question:\n" + sentence(draw, "?") + END, False), ("\n" + RESPONSE, False), (answer, True)]
    if cut_off:
        parts[-1] = (before + sentence(draw, "."), True)
    if bare:
        parts = [(RESPONSE, False), *parts[2:]]
    if empty:
        parts = [(text, part) for text, part in parts if not part and RESPONSE not in text]
    known = [pieces[i] for i in torch.randperm(len(pieces), generator=draw)]
    ids, labels, place = [], [], 0
    flags = [flag for text, flag in parts for _ in text]
    longest_first = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    for piece in re.findall(longest_first, "".join(text for text, _ in parts)):
        ids.append(known.index(piece))
        labels.append(ids[-1] if any(flags[place : place + len(piece)]) else -100)
        place += len(piece)
    return {"ids": ids, "vocabulary": known, "response": RESPONSE, "end_id": known.index(END)}, labels


def labels_case(draw, about, *args, **kwargs):
    given, labels = row(draw, *args, **kwargs)
    return Case("labels_of", given, labels, about=about)


@check(points=2)
def every_answer_and_its_end(draw):
    """Exactly the answers are trained, every one of them, from the first token to the end token."""
    yield labels_case(draw, "one round", 1, PLAIN)
    yield labels_case(draw, "three rounds", 3, PLAIN)
    yield labels_case(draw, "the row begins with the template", 2, PLAIN, bare=True)
    yield labels_case(draw, "two rounds, the row cut off in the second answer", 2, PLAIN, cut_off=True)


@check(points=1)
def tokens_across_the_border(draw):
    """It does not matter which tokens the template has become: one that reaches into an answer is trained."""
    yield labels_case(draw, "the template's first token has merged with a line break", 2, PLAIN + LEFT)
    about = "the template's last token has merged with the line break that the answer begins with"
    yield labels_case(draw, about, 2, PLAIN + RIGHT, before="\n")
    yield labels_case(draw, f"both, and {about}", 3, PLAIN + LEFT + RIGHT, before="\n", cut_off=True)
    given = {"ids": GOLDEN_IDS, "vocabulary": GOLDEN_PIECES, "response": RESPONSE, "end_id": 0}
    labels = [one if flag else -100 for one, flag in zip(GOLDEN_IDS, GOLDEN_MASK, strict=True)]
    yield Case("labels_of", given, labels, about="a row whose mask comes from transformers")


@check(points=1)
def no_answer_is_an_error(draw):
    """A row without the template raises ValueError instead of teaching nothing, or everything."""
    given, _ = row(draw, 2, PLAIN, empty=True)
    yield Case("labels_of", given, raises="ValueError", about="questions only")
    given, _ = row(draw, 2, PLAIN)
    given |= {"response": "### Assistant:\n"}
    # Cut into characters, should somebody encode the template.
    given["vocabulary"] = given["vocabulary"] + [letter for letter in "Asistn# " if letter not in given["vocabulary"]]
    yield Case("labels_of", given, raises="ValueError", about="the template of another dialect")


@check(points=1)
def padding_by_place(draw):
    """Rows are padded on the right by their lengths, and real end tokens stay even where padding is the same token."""
    for pad, sizes in ((0, (5, 9, 2)), (3, (7, 4))):
        rows = []
        for size in sizes:
            ids = torch.randint(1, 20, (size,), generator=draw)
            ids[-1] = pad  # the end token, trained, at the end and once more in the middle
            ids[size // 2] = pad
            labels = torch.where(torch.arange(size) >= size // 2, ids, -100)
            rows.append((ids.tolist(), labels.tolist()))
        longest = max(sizes)
        expect = (
            torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
            torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
            torch.tensor([[1] * size + [0] * (longest - size) for size in sizes]),
        )
        about = f"{len(sizes)} rows of {', '.join(map(str, sizes))} tokens, padding is the end token {pad}"
        yield Case("collate", {"rows": rows, "pad_id": pad}, expect, names=NAMES, about=about)
