"""A few tokens of Llama 2: enough of its vocabulary to see how `### Assistant:` is encoded, alone and in a row.

The vocabulary has 32,000 entries as the real one has. Those that the example needs, and its neighbours, are at their
real ids; all others are named <unused ...> and never come up. Splitting works as in the real tokenizer: byte-pair
merges over pieces, in which a space is written as a mark (U+2581) and one is put in front of every text. That mark is
why a text alone is encoded otherwise than behind a line break:

    "### Assistant:"       _### _Ass istant :        835         4007 22137 29901
    "\\n### Assistant:"     _ \\n ## # _Ass istant :   29871 13   2277 29937 4007 22137 29901

Left out: every other word. They are spelled letter by letter here, with ids that the real tokenizer does not have.
"""

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from minift.data.tokenizer import Tokenizer

MARK = "\u2581"
SIZE = 32_000
FIRST_LETTER = 30_000  # letters get ids from here on, in the order of the alphabet
REAL = {
    "<unk>": 0, "<s>": 1, "</s>": 2, f"{MARK}###": 835, "##": 2277, f"{MARK}Ass": 4007, "istant": 22137, MARK: 29871,
    ":": 29901, "#": 29937,
}  # fmt: skip
MERGES = [
    ("#", "#"), (MARK, "##"), (MARK + "##", "#"), (MARK, "A"), (MARK + "A", "s"), (MARK + "As", "s"),
    ("i", "s"), ("is", "t"), ("ist", "a"), ("ista", "n"), ("istan", "t"),
]  # fmt: skip


def llama2_excerpt() -> Tokenizer:
    """The tokenizer above; it begins texts with nothing, and has no chat template."""
    known = dict(REAL) | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    pieces = [*map(chr, range(33, 127)), *("".join(pair) for pair in MERGES)]
    letters = [piece for piece in pieces if piece not in known]
    known |= {letter: FIRST_LETTER + index for index, letter in enumerate(letters)}
    free = set(range(SIZE)) - set(known.values())
    vocabulary = known | {f"<unused {index}>": index for index in free}
    backend = Backend(models.BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    with tempfile.TemporaryDirectory() as place:
        backend.save(str(Path(place) / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (Path(place) / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return Tokenizer(Path(place))
