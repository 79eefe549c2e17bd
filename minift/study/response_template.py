"""The search for a response template: how labels used to be made, and why they no longer are.

Older TRL (DataCollatorForCompletionOnlyLM, until 0.19) was told how the assistant's turn begins, encoded that text on
its own, and looked for its ids in the row. All up to there, and including it, is not trained:

    template    ### Assistant:     -> 2277 29937 4007 22137 29901 ?
    ids         ... 29871 13 2277 29937 4007 22137 29901 | Sure   ,  ...
    labels      ...  -100 ...                       -100 | Sure   ,  ...

The famous failure: Llama 2's tokenizer puts a space in front of every text, and words know the space before them. So
the template alone is not encoded as it is within a row, where it stands behind a line break:

    "### Assistant:" alone              835         4007   22137   29901         _### _Ass istant :
    in a row, behind "\\n"               2277  29937  4007   22137   29901         ## # _Ass istant :

The ids 835 4007 22137 29901 are nowhere in the row, so all labels become -100, the loss is 0 and nothing is learned,
with one warning in the log. Here that is an error, and shows both encodings. Two ways out:

    - give the ids as they are in context: `ids_in_context(tokenizer, "### Assistant:")` encodes "\\n### Assistant:" and
      cuts off what the line break alone becomes;
    - make the template one token: `tokenizer.add_tokens(["### Assistant:"])`, then `resize_embeddings`. A special token
      is cut out before anything is merged, so it has one id everywhere.

With the response template only, just the last answer of a conversation is trained; an instruction template ends the
others. `encode` (data/encode.py) needs neither: it knows where a turn begins from the text.

Left out: the padding collator around it, which also masked every padding token, and so the end of the text where that
is the same token.

Source: TRL 0.19 `DataCollatorForCompletionOnlyLM`; its threads 588, 1493 and 1820.
"""

from collections.abc import Sequence

from minift.data.encode import IGNORE
from minift.data.tokenizer import Tokenizer

Template = str | Sequence[int]


def response_template_labels(
    tokenizer: Tokenizer, ids: Sequence[int], response: Template, instruction: Template | None = None
) -> list[int]:
    """Labels by searching ids.

    Args:
        ids: one row.
        response: how the assistant's turn begins, as text, encoded on its own, or as ids.
        instruction: how the user's turn begins. Without it, only what follows the last response template is trained.

    Returns:
        the ids, or -100 where nothing is to be learned.

    Raises:
        ValueError: a template is empty, or its ids are not in the row (TRL: all labels -100 and a warning); or nothing
            follows the last one.
    """
    starts = _find(tokenizer, ids, response, "response")
    length = len(_ids(tokenizer, response))
    answers = [start + length for start in starts]
    if instruction is None:
        ranges = [(answers[-1], len(ids))]
    else:
        questions = [*_find(tokenizer, ids, instruction, "instruction"), len(ids)]
        ranges = [(answer, next(question for question in questions if question >= answer)) for answer in answers]
    labels = [IGNORE] * len(ids)
    for start, stop in ranges:
        labels[start:stop] = ids[start:stop]
    if all(label == IGNORE for label in labels):
        raise ValueError("nothing follows the response template, so there is nothing to train on: is the row cut off?")
    return labels


def ids_in_context(tokenizer: Tokenizer, template: str, before: str = "\n") -> list[int]:
    """The ids of a template as it is encoded behind `before`.

    Raises:
        ValueError: `before` merges with the template, so that no ids are the template's alone.
    """
    alone, together = (tokenizer.encode(text, add_special_tokens=False) for text in (before, before + template))
    if together[: len(alone)] != alone:
        raise ValueError(
            f"{before!r} merges with {template!r}: {_spell(tokenizer, together)}; make the template begin elsewhere, "
            "or one token (add_tokens)"
        )
    return together[len(alone) :]


def _ids(tokenizer: Tokenizer, template: Template) -> list[int]:
    return tokenizer.encode(template, add_special_tokens=False) if isinstance(template, str) else list(template)


def _find(tokenizer: Tokenizer, ids: Sequence[int], template: Template, name: str) -> list[int]:
    """Where the ids of a template begin in `ids`; at least once."""
    wanted = _ids(tokenizer, template)
    if not wanted:
        raise ValueError(f"the {name} template is empty")
    found = [start for start in range(len(ids)) if list(ids[start : start + len(wanted)]) == wanted]
    if not found:
        raise ValueError(
            f"the {name} template is not in the row, and every label would be -100. The template is "
            f"{_spell(tokenizer, wanted)}; the row has {_spell(tokenizer, _passage(tokenizer, ids, wanted))}. "
            "Give the template's ids as they are in context (ids_in_context), or make it one token (add_tokens); "
            "minift's encode() needs no template at all"
        )
    return found


def _passage(tokenizer: Tokenizer, ids: Sequence[int], wanted: list[int]) -> list[int]:
    """The tokens of the row that spell the template's text, else the row's first."""
    text, ids = tokenizer.decode(wanted).strip(), list(ids)
    for stop in range(1, len(ids) + 1):
        if text and text in tokenizer.decode(ids[:stop]):
            start = max(start for start in range(stop) if text in tokenizer.decode(ids[start:stop]))
            return ids[start:stop]
    return ids[:10]


def _spell(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """835 '###' 4007 ' Ass' ..."""
    return " ".join(f"{index} {tokenizer.decode([index])!r}" for index in ids)
