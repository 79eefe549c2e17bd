"""The stations of a trace from the row to the loss: what happens there in words, and the recorded numbers that show it.

Those behind them, from the gradient to the answer: training.py.
"""

from collections.abc import Sequence

from minift.data.encode import IGNORE, Example
from minift.data.formats import Row
from minift.data.spans import Script
from minift.data.tokenizer import Tokenizer
from minift.study.mask import mask_picture
from minift.study.show import Token, harmless, show_example
from minift.study.trace.blocks import Bar, Bars, Cards, Chip, Chips, Figure, Kind, Lane, Lanes, Station, Text
from minift.study.trace.numbers import Followed, Prediction

LOOKED_AT = 4  # places whose likeliest tokens are shown
RARE = 1e-4  # what is less likely has no digit left in per cent
WARM, WARMER, HOT = 0.5, 1.5, 3.0  # nats: likelier than 61 %, 22 %, 5 %


def stations_to_loss(followed: Followed, tokenizer: Tokenizer) -> list[Station]:
    """From the row to the loss of each token."""
    return [
        _text(followed, tokenizer),
        _tokens(followed, tokenizer),
        _labels(followed, tokenizer),
        _pack(followed),
        _mask(followed),
        _logits(followed, tokenizer),
        _loss(followed, tokenizer),
    ]


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Token]:
    """Tokens as they are shown everywhere (show.py)."""
    return show_example(tokenizer, Example([*ids], [IGNORE] * len(ids))).rows[0].parts[0].tokens


def visible(text: str) -> str:
    """The text without letters that a terminal would act on, its lines as they are."""
    return "\n".join(map(harmless, text.split("\n")))


def _messages(row: Row) -> list[dict[str, str]]:
    """A conversation's messages; none for a row of plain text."""
    if "messages" in row:
        return row["messages"]
    return row["prompt"] + row["completion"] if isinstance(row.get("prompt"), list) else []


def _text(followed: Followed, tokenizer: Tokenizer) -> Station:
    row, messages = followed.row, _messages(followed.row)
    if messages:
        lesson = (
            "A row of a data set is a conversation; a model reads one text. The chat template of the checkpoint, a "
            "small program, writes who speaks and where a turn ends, with control tokens that users cannot type. The "
            "model was tuned with exactly these marks."
        )
        given = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        rendered = Script(tokenizer, row, messages, special_in_text=True).write(len(messages), False)
        uses = ("minift.data.chat.render",)
    else:
        lesson = (
            "A row of plain text has no turns, so no template is used. It is read as it is, and the token that ends a "
            "text is put behind it: a model that never sees that does not learn to stop."
        )
        given = row["text"] if "text" in row else f"prompt: {row['prompt']}\ncompletion: {row['completion']}"
        rendered = row["text"] if "text" in row else row["prompt"] + row["completion"]
        uses = ("minift.data.encode.encode",)
    blocks = [Text(visible(given), "The row"), Text(visible(rendered.rstrip("\n")), "The text")]
    return Station("Row and template", lesson, uses, blocks)


def _tokens(followed: Followed, tokenizer: Tokenizer) -> Station:
    tokens = spelled(tokenizer, followed.example.input_ids)
    lesson = (
        f"The tokenizer cuts the text into {len(tokens)} tokens, pieces that are in its vocabulary, and the model gets "
        "their numbers. A dot is a space: it belongs to the word behind it, so a word in the middle of a text is "
        "another token than the same word at the beginning. Control tokens, in italics, are one number each."
    )
    chips = [Chip(token.text, str(token.id), is_control=token.is_control) for token in tokens]
    uses = ("minift.data.tokenizer.Tokenizer", "minift.study.show.show_example")
    return Station("Tokens", lesson, uses, [Chips(chips)])


def _labels(followed: Followed, tokenizer: Tokenizer) -> Station:
    example, trained = followed.example, {p.column for p in followed.before}
    lesson = (
        f"A label says what is to be learned: the token's own id, or {IGNORE}, which the loss leaves out. Of "
        f"{len(example)} tokens {example.trained_tokens} are trained (framed). The end of the turn is among them where "
        "the answer has one, or the model would not learn to stop.\n\n"
        "Labels are not shifted here; the loss does that: what the model computes at one token is compared with the "
        "label of the next."
    )
    chips = [
        Chip(token.text, str(label), "trained" if column in trained else "plain", token.is_control)
        for column, (token, label) in enumerate(zip(spelled(tokenizer, example.input_ids), example.labels, strict=True))
    ]
    return Station("Labels", lesson, ("minift.data.encode.encode",), [Chips(chips)])


def _pack(followed: Followed) -> Station:
    packed, layout = followed.packed, followed.packed.layout
    rows = len(packed.numbers)
    who = "this row alone fills" if rows == 1 else f"this row and {rows - 1} around it fill"
    lesson = (
        f"Rows differ in length, and what is added to make them equal is computed for nothing. So several rows share "
        f"one: {who} {len(layout)} pack{'s' if len(layout) > 1 else ''} of {layout.length} tokens, best fit first. Row "
        f"{followed.number + 1} lies in pack {packed.pack + 1}, columns {packed.start} to {packed.stop - 1}. A run "
        "takes packs as long as its --max-length; these are shorter, so that there is something to see. What is dashed "
        "stays free."
    )
    lanes = []
    for number in range(len(layout)):
        pieces = range(layout.bounds_r[number], layout.bounds_r[number + 1])
        parts = [
            (f"row {packed.numbers[document] + 1}", size, packed.numbers[document] == followed.number)
            for document, size in (
                (int(layout.document_p[p]), int(layout.stop_p[p] - layout.start_p[p])) for p in pieces
            )
        ]
        lanes.append(Lane(f"pack {number + 1}", parts, layout.length - sum(size for _, size, _ in parts)))
    return Station("Pack", lesson, ("minift.data.packing.lay_out",), [Lanes(lanes)])


def _mask(followed: Followed) -> Station:
    packed = followed.packed
    lesson = (
        "Packed rows must not read each other, so each token sees the tokens before it in its own document and nothing "
        "else: blocks along the diagonal. A batch holds no matrix for this: each token carries the number of its "
        "document.\n\n"
        "The proof is in the losses. Alone and in the pack, a token's loss differs by at most "
        f"{packed.difference:.2g} (rounding: a longer row is added up in another order)."
    )
    if packed.document:
        lesson += f" If the documents in front of it could be seen, it would differ by up to {packed.unmasked:.2g}."
    else:
        lesson += " This row is the first of its pack, so the mask matters to those behind it."
    caption = f"Who sees whom in pack {packed.pack + 1}, row 0 of its batch; this row is document {packed.document}."
    uses = ("minift.study.mask.mask_picture", "minift.model.attention.Visible")
    return Station("Mask", lesson, uses, [Figure(mask_picture(packed.batch), caption)])


def _logits(followed: Followed, tokenizer: Tokenizer) -> Station:
    found = followed.before
    chosen = _worth_a_look(found)
    ids = followed.example.input_ids
    texts = {token.id: token.text for token in spelled(tokenizer, [*ids, *(i for p in chosen for i, _ in p.top)])}
    lesson = (
        "From the last hidden state of a token the head computes a logit for each entry of the vocabulary, and a "
        "softmax makes probabilities of them: what the model expects next. The trained token is marked where it is "
        f"among the likeliest. Shown are {len(chosen)} of {len(found)} trained places: the first, the worst and the "
        "last."
    )
    cards = []
    for p in chosen:
        bars = [Bar(texts[i], share, f"{share:.1%}", i == p.token) for i, share in p.top]
        share = f"{p.probability:.2%}" if p.probability >= RARE else f"{p.probability:.1e}"
        title = f"after {texts[ids[p.column - 1]]} comes {texts[p.token]}: {share}, place {p.rank:,}"
        cards.append(Bars(title, bars))
    uses = ("minift.train.step.trained_rows", "minift.model.decoder.CausalLM.logits")
    return Station("Logits", lesson, uses, [Cards(cards)])


def _worth_a_look(found: Sequence[Prediction]) -> list[Prediction]:
    """The first, the last, and the worst of the others, in order."""
    ends = {found[0].column: found[0], found[-1].column: found[-1]}
    worst = sorted((p for p in found if p.column not in ends), key=lambda p: -p.loss)[: LOOKED_AT - len(ends)]
    return sorted([*ends.values(), *worst], key=lambda p: p.column)


def loss_chips(found: Sequence[Prediction], tokenizer: Tokenizer) -> Chips:
    """Each trained token and its loss, the darker the worse."""
    tokens = spelled(tokenizer, [p.token for p in found])
    kinds: list[Kind] = ["heat0", "heat1", "heat2", "heat3"]

    def kind(loss: float) -> Kind:
        return kinds[sum(loss >= limit for limit in (WARM, WARMER, HOT))]

    return Chips([
        Chip(token.text, f"{p.loss:.2f}", kind(p.loss), token.is_control)
        for token, p in zip(tokens, found, strict=True)
    ])  # fmt: skip


def _loss(followed: Followed, tokenizer: Tokenizer) -> Station:
    found, stats = followed.before, followed.steps[0].stats
    worst = max(found, key=lambda p: p.loss)
    (name,) = spelled(tokenizer, [worst.token])
    lesson = (
        "The loss of a token is -log of the probability that it was given: 0 for a certain one, 0.69 for one half, "
        f"2.3 for a tenth; it stands below each. The worst here is {name.text} with {worst.loss:.2f}. The loss of the "
        f"step is their sum divided by the number of trained tokens, {stats.loss:.4f} for these "
        f"{stats.trained_tokens}; over several micro-batches it is divided once, by the count of all."
    )
    return Station("Loss", lesson, ("minift.train.step.head_loss",), [loss_chips(found, tokenizer)])
