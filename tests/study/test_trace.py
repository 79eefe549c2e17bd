"""The trace of a row: its numbers against plain torch on a copy of the model, its page against a reader of HTML, and
the model afterwards against what it was."""

import base64
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pictures import texts

import minift
from minift.adapters.inject import lora_layers
from minift.quant import dynamic_map
from minift.study.plots.trace import gradient_maps
from minift.study.trace import Trace, progress, trace
from minift.study.trace.blocks import Bar, Bars, Chip, Chips, Lane, Lanes, Table
from minift.study.trace.page import DARK, LIGHT, STYLE

CONFIG = minift.TrainConfig(lr=0.01, schedule="constant")
STEPS = 3
EVIL = "<script>alert('$x$')</script> \x1b[2J\u202e & \"quoted\""
TITLES = ["Row and template", "Tokens", "Labels", "Pack", "Mask", "Logits", "Loss", "Gradient", "8-bit optimizer state",
          "Pages", "Updated weights", "Changed answer"]  # fmt: skip


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [chat("sea?", "The sea is wide."), chat("sky?", "The sky is blue."), chat("sun?", "Red."), chat(EVIL, EVIL),
        *(chat(f"{n} legs?", f"A spider has {n} legs.") for n in range(8)), {"text": "The sea is deep."}]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> minift.Tokenizer:
    return minift.load_tokenizer(tiny)


def make(tiny: Path, r: int = 64, **settings: Any) -> minift.CausalLM:
    """Rank 64 makes A and B of a layer of width 64 large enough for 8-bit state."""
    model = minift.load_model(tiny, dtype=torch.float32)
    torch.manual_seed(0)
    minift.add_lora(model, minift.LoraConfig(r=r, **settings))
    return model


@pytest.fixture(scope="module")
def found(tiny: Path, tokenizer: minift.Tokenizer) -> Trace:
    return trace(make(tiny), tokenizer, ROWS, 1, CONFIG, STEPS)


# --- the numbers, by plain torch


def loss_by_torch(model: minift.CausalLM, tokenizer: minift.Tokenizer, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p of every trained token, and the logits there."""
    example = minift.encode(tokenizer, ROWS[row])
    ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)[1:]
    logits = model(ids)[0, :-1][labels != -100]
    return F.cross_entropy(logits, labels[labels != -100], reduction="none"), logits


def steps_by_torch(tiny: Path, tokenizer: minift.Tokenizer, row: int) -> list[dict[str, Any]]:
    """The same steps with torch.optim.AdamW."""
    model = make(tiny)
    parameters = [p for p in model.parameters() if p.requires_grad]
    a, b = [*lora_layers(model).values()][-1].matrices("default")
    optimizer = torch.optim.AdamW(parameters, lr=CONFIG.lr, weight_decay=0.0)
    seen = []
    for _ in range(STEPS):
        loss = loss_by_torch(model, tokenizer, row)[0].mean()
        loss.backward()
        assert a.grad is not None and b.grad is not None
        gradients = [a.grad.clone(), b.grad.clone()]
        norm = torch.nn.utils.clip_grad_norm_(parameters, CONFIG.max_grad_norm)
        clipped = [a.grad.clone(), b.grad.clone()]
        before = [a.detach().clone(), b.detach().clone()]
        optimizer.step()
        optimizer.zero_grad()
        seen.append({"loss": loss.item(), "norm": norm.item(), "gradients": gradients, "clipped": clipped,
                     "before": before, "after": [a.detach().clone(), b.detach().clone()]})  # fmt: skip
    return seen


def test_losses_and_likeliest_tokens(found: Trace, tiny: Path, tokenizer: minift.Tokenizer):
    with torch.no_grad():
        losses, logits = loss_by_torch(make(tiny), tokenizer, 1)
    predicted, example = found.numbers.before, found.numbers.example
    # fp32 with other shapes of the same products: some 1e-7 of logits below 10
    assert [p.loss for p in predicted] == pytest.approx(losses.tolist(), abs=2e-5)
    assert [p.token for p in predicted] == [label for label in example.labels[1:] if label != -100]
    assert all(example.labels[p.column] == p.token for p in predicted)
    for p, row in zip(predicted, logits.softmax(-1), strict=True):
        assert p.probability == pytest.approx(math.exp(-p.loss), rel=1e-4)
        assert [i for i, _ in p.top] == row.topk(5).indices.tolist()
        assert p.rank == 1 + sum(other > row[p.token] for other in row.tolist())
    assert found.numbers.steps[0].stats.loss == pytest.approx(losses.mean().item(), abs=2e-5)


def test_gradients_and_updates(found: Trace, tiny: Path, tokenizer: minift.Tokenizer):
    numbers, theirs = found.numbers, steps_by_torch(tiny, tokenizer, 1)
    first = theirs[0]
    for i, matrix in enumerate((numbers.a, numbers.b)):
        torch.testing.assert_close(matrix.before, first["before"][i], rtol=0, atol=0)
        torch.testing.assert_close(matrix.gradient, first["gradients"][i], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(matrix.taken[0], first["clipped"][i], rtol=1e-4, atol=1e-6)
        # 8-bit state is rounded after the first update, which is therefore AdamW's: its sign where it is not tiny
        large = first["clipped"][i].abs() > 1e-4
        torch.testing.assert_close(matrix.after[large], first["after"][i][large], rtol=0, atol=1e-5)
        torch.testing.assert_close(matrix.m.exact_c, 0.1 * first["clipped"][i].flatten()[:256], rtol=1e-4, atol=1e-7)
        v = 0.001 * first["clipped"][i].flatten()[:256] ** 2
        torch.testing.assert_close(matrix.v.exact_c, v, rtol=1e-3, atol=1e-12)
    assert not numbers.a.gradient.any() and numbers.b.gradient.any()
    look = numbers.steps[0]
    assert look.stats.grad_norm == pytest.approx(first["norm"], rel=1e-4) and look.norm == pytest.approx(1.0, rel=1e-4)
    assert look.norm_a == 0 and look.norm_b == pytest.approx(first["clipped"][1].norm().item(), rel=1e-4)
    assert look.moved_a == 0 and look.moved_b == pytest.approx(CONFIG.lr, rel=1e-3)
    assert len(numbers.a.taken) == 2 and numbers.a.taken[1].any()
    # The second step begins at the same weights, but for signs of gradients next to 0: a thousandth of them.
    assert numbers.steps[1].stats.loss == pytest.approx(theirs[1]["loss"], rel=1e-2)
    # What the page says of fp32 state: no weight moves much more than the learning rate.
    for step in theirs:
        moved = max((x - y).abs().max().item() for x, y in zip(step["before"], step["after"], strict=True))
        assert moved < 1.1 * CONFIG.lr


def test_8_bit_state(found: Trace):
    """Codes and scales mean what is said, and lie within half a step of the table from the fp32 means."""
    for mean, signed in ((found.numbers.b.m, True), (found.numbers.b.v, False)):
        assert mean.codes_c is not None and mean.absmax is not None and mean.codes_c.shape == (256,)
        table = dynamic_map(signed)
        assert mean.absmax == pytest.approx(mean.exact_c.abs().max().item(), rel=1e-5)
        torch.testing.assert_close(mean.kept_c, table[mean.codes_c.long()] * mean.absmax)
        nearest = (mean.exact_c[:, None] / mean.absmax - table).abs().amin(1)
        distance = (mean.exact_c / mean.absmax - table[mean.codes_c.long()]).abs()
        torch.testing.assert_close(distance, nearest, rtol=0, atol=1e-6)
    assert found.numbers.a.m.absmax == 0 and set(found.numbers.a.m.codes_c.tolist()) == {127}  # pyright: ignore


def test_pages(found: Trace, tiny: Path):
    """By hand: 8 pages in 3 slots, each fetched while the one before is used, forwards and backwards in turn."""
    first, *later = (look.pages for look in found.numbers.steps)
    assert first is not None and (first.hits, first.prefetched, first.faults, first.evictions) == (0, 7, 1, 5)
    assert [(p.hits, p.prefetched, p.faults, p.evictions) for p in later if p] == [(3, 5, 0, 5)] * (STEPS - 1)
    large = [p for p in make(tiny).parameters() if p.requires_grad and p.numel() >= 4096]
    state = sum(-(-p.numel() // 256) for p in large) * 520
    assert first.bytes_in == state and found.numbers.page_bytes == -(-state // 520 // 8) * 520


def test_the_pack_and_its_mask(found: Trace, tokenizer: minift.Tokenizer):
    packed = found.numbers.packed
    assert packed.numbers == [*range(8)]  # the row, the one before it and those behind
    ids = packed.batch.input_ids_bs[0, packed.start : packed.stop].tolist()
    assert ids == found.numbers.example.input_ids
    assert (packed.batch.documents_bs[0, packed.start : packed.stop] == packed.document).all()
    assert packed.layout.length == 4 * max(len(minift.encode(tokenizer, row)) for row in ROWS[:8])
    assert packed.document > 0, "not the first, or the mask would hide nothing"
    assert packed.difference < 2e-5 < 1e-3 < packed.unmasked


def test_the_answers(found: Trace, tiny: Path, tokenizer: minift.Tokenizer):
    """Before: what `generate` says. After many steps: the row's own answer."""
    question = ROWS[1]["messages"][:1]
    limit, greedy = found.numbers.longest_answer, minift.Sampling()
    assert found.numbers.answers[0] == minift.generate(make(tiny), tokenizer, question, limit, greedy)
    learned = trace(make(tiny), tokenizer, ROWS, 1, CONFIG, steps=12)
    assert learned.numbers.answers == (found.numbers.answers[0], "The sky is blue.")
    losses = [p.loss for p in learned.numbers.after]
    assert sum(losses) / len(losses) < 0.5 * found.numbers.steps[0].stats.loss
    assert f"{sum(losses) / len(losses):.4f}. Both answers" in " ".join(str(learned).split())


def test_the_model_is_as_before(tiny: Path, tokenizer: minift.Tokenizer):
    model = make(tiny, dropout=0.5)
    model.train()
    p = next(p for p in model.parameters() if p.requires_grad)
    p.grad = torch.ones_like(p)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for config in (CONFIG, replace(CONFIG, lr=1e30)):  # the second ends in the middle
        try:
            trace(model, tokenizer, ROWS, 0, config, 3)
        except FloatingPointError:
            assert config.lr == 1e30
        assert model.training and p.grad is not None and (p.grad == 1).all()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert sum(q.grad is not None for q in model.parameters()) == 1


def test_dropout_is_off(found: Trace, tiny: Path, tokenizer: minift.Tokenizer):
    """In the second step, too: in the first B is zero, and what its input loses makes no difference."""
    other = trace(make(tiny, dropout=0.5).train(), tokenizer, ROWS, 1, CONFIG, 2).numbers
    assert [look.stats for look in other.steps] == [look.stats for look in found.numbers.steps[:2]]


# --- what is told in other cases


def words(found: Trace, title: str) -> str:
    (station,) = (station for station in found.stations if station.title == title)
    return station.lesson


def test_small_tensors_have_no_8_bit_state_and_no_pages(tiny: Path, tokenizer: minift.Tokenizer):
    found = trace(make(tiny, r=2), tokenizer, ROWS, 0, CONFIG, 1)
    numbers = found.numbers
    assert numbers.b.m.codes_c is None and numbers.steps[0].pages is None and numbers.page_bytes == 0
    torch.testing.assert_close(numbers.b.m.kept_c, numbers.b.m.exact_c)
    torch.testing.assert_close(numbers.b.v.kept_c, numbers.b.v.exact_c)
    assert "fewer than 4,096" in words(found, "8-bit optimizer state") and "Only 8-bit" in words(found, "Pages")
    assert len(numbers.a.taken) == 1 and "Row 1" in str(found) and found._repr_html_()


def test_a_trained_adapter_is_told_apart(tiny: Path, tokenizer: minift.Tokenizer):
    model = make(tiny)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.matrices("default")[1].normal_(std=0.01)
    found = trace(model, tokenizer, ROWS, 0, CONFIG, 1)
    assert found.numbers.a.gradient.any()
    assert "has been trained before" in words(found, "Gradient") and "as in A" not in words(found, "Updated weights")


def test_far_moves_are_explained_where_there_are_some(found: Trace):
    far = any(max(s.moved_a, s.moved_b) > 1.5 * s.lr for s in found.numbers.steps)
    assert ("8-bit state more" in words(found, "Updated weights")) == far


def test_clipping_is_told_where_it_happens(found: Trace, tiny: Path, tokenizer: minift.Tokenizer):
    unclipped = trace(make(tiny), tokenizer, ROWS, 1, replace(CONFIG, max_grad_norm=0.0), 1)
    norm = found.numbers.steps[0].stats.grad_norm
    assert unclipped.numbers.steps[0].norm == pytest.approx(norm, rel=1e-5) and norm > 1
    assert "(clipping)" in words(found, "Gradient") and "(clipping)" not in words(unclipped, "Gradient")


def test_plain_text(tiny: Path, tokenizer: minift.Tokenizer):
    found = trace(make(tiny), tokenizer, ROWS, len(ROWS) - 1, CONFIG, 1)
    assert "no template" in words(found, "Row and template")
    assert found.numbers.prompt == 1 and len(found.numbers.before) == len(found.numbers.example) - 1
    pair = {"prompt": "The sea is", "completion": " deep."}
    found = trace(make(tiny), tokenizer, [pair], 0, CONFIG, 1)
    assert "prompt: The sea is\n" in str(found) and "this row alone fills 1 pack of" in words(found, "Pack")


def test_rows_that_cannot_be_trained_are_left_out_of_the_pack(tiny: Path, tokenizer: minift.Tokenizer):
    found = trace(make(tiny), tokenizer, [ROWS[0], chat("sky?", ""), ROWS[2]], 2, CONFIG, 1)
    assert found.numbers.packed.numbers == [0, 2]


def test_schedule_and_layer(tiny: Path, tokenizer: minift.Tokenizer):
    layer = "model.layers.0.mlp.up_proj"
    told: list[str] = []
    config = minift.TrainConfig(lr=0.01, schedule="linear", warmup_steps=1)
    found = trace(make(tiny), tokenizer, ROWS, 0, config, 3, layer, told.append)
    assert [look.lr for look in found.numbers.steps] == pytest.approx([0.0, 0.01, 0.005])
    assert found.numbers.layer == layer and layer in words(found, "Gradient")
    assert found.numbers.a.before.shape == (64, 64) and found.numbers.b.before.shape == (128, 64)
    assert len(told) == 6 and told[2] == "step 1 of 3"


def refused(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_refusals(tiny: Path, tokenizer: minift.Tokenizer):
    model = make(tiny, target_modules=("q_proj",))
    for row in (-1, len(ROWS)):
        refused(ValueError, f"no row {row}: the data hold 13 rows", lambda row=row: trace(model, tokenizer, ROWS, row))
    refused(ValueError, "hold 0 rows", lambda: trace(model, tokenizer, []))
    refused(ValueError, "steps must be at least 1", lambda: trace(model, tokenizer, ROWS, steps=0))
    refused(ValueError, "row 1: the assistant says nothing", lambda: trace(model, tokenizer, [chat("sea?", "")]))
    refused(ValueError, "no trained LoRA at 'x'", lambda: trace(model, tokenizer, ROWS, layer="x"))
    model.requires_grad_(False)
    refused(ValueError, "call add_lora first", lambda: trace(model, tokenizer, ROWS))


# --- the page


class Reader(HTMLParser):
    """Refuses tags that are not closed in order, and collects words, addresses and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def evil(tiny: Path, tokenizer: minift.Tokenizer) -> Trace:
    return trace(make(tiny), tokenizer, ROWS, 3, CONFIG, 1)


def test_stations_are_all_there(found: Trace):
    assert [station.title for station in found.stations] == TITLES
    page, text = read(found._repr_html_()), str(found)
    words = "".join(page.words)
    for number, station in enumerate(found.stations, start=1):
        assert f"{number}. {station.title}" in words and f"\n{number}. {station.title}\n" in text
        assert station.uses and all(paragraph in words for paragraph in station.paragraphs)
        assert station.blocks
    assert repr(found) == text


def test_what_the_library_is_said_to_do_exists(found: Trace):
    import importlib

    for name in {name for station in found.stations for name in station.uses}:
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            try:
                thing = importlib.import_module(".".join(parts[:cut]))
            except ImportError:
                continue
            for part in parts[cut:]:
                thing = getattr(thing, part)
            break
        assert callable(thing), name


def test_numbers_on_the_page_are_those_that_were_recorded(found: Trace):
    text, numbers = str(found), found.numbers
    flat = " ".join(text.split())
    for p in numbers.before:
        assert f"({p.loss:.2f})" in text
    assert f"{numbers.steps[0].stats.loss:.4f} for these {len(numbers.before)}" in flat
    assert f"{numbers.b.gradient.norm():.4g}" in text and f"{numbers.steps[0].stats.grad_norm:.3f}" in text
    assert f"columns {numbers.packed.start} to {numbers.packed.stop - 1}" in flat
    assert f"{numbers.b.m.absmax:.4g} for m and {numbers.b.v.absmax:.4g} for v" in flat
    b = numbers.b
    for i in range(8):
        before, after = b.before.flatten()[i].item(), b.after.flatten()[i].item()
        row = rf"\n  {i} +{before:.6f} +{after:.6f} +{re.escape(f'{after - before:+.6f}')} "
        assert re.search(row, text)
        row = rf"\n  {i} +{b.taken[0].flatten()[i]:.3g} +{b.m.codes_c[i]} +{b.m.kept_c[i]:.3g} "  # pyright: ignore
        assert re.search(row, text)
    for step, look in enumerate(numbers.steps, start=1):
        assert look.pages is not None
        assert re.search(rf"\n  {step} +{look.pages.hits} +{look.pages.prefetched} +{look.pages.faults} ", text)
        assert re.search(rf"\n  {step} +{look.stats.loss:.4f} +0.01 ", text)
    assert f"from {numbers.steps[0].stats.loss:.4f} to " in flat


def test_a_page_needs_nothing_else(found: Trace, evil: Trace, tmp_path: Path):
    path = found.save(str(tmp_path / "new" / "trace.html"))
    page = path.read_text("utf-8")
    assert page.startswith("<!doctype html>\n") and 'charset="utf-8"' in page and "width=device-width" in page
    assert [file.name for file in path.parent.iterdir()] == ["trace.html"]
    reader = read(page)
    assert len(reader.addresses) == 2 and all(a.startswith("data:image/png;base64,") for a in reader.addresses)
    assert all(base64.b64decode(a.partition(",")[2]).startswith(b"\x89PNG") for a in reader.addresses)
    assert not reader.tags & {"script", "link", "iframe", "object", "a", "svg"}
    for text in (page, evil._repr_html_()):
        assert "http" not in text and "@import" not in text and "url(" not in text


def test_a_page_replaces_the_old_one_whole_or_not_at_all(found: Trace, tmp_path: Path, monkeypatch: Any):
    path = tmp_path / "trace.html"
    path.write_text("old")

    def full(*_: object, **__: object) -> int:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        refused(OSError, "disk full", lambda: found.save(path))
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    assert "<title>Row 2" in found.save(path).read_text()


def test_rows_cannot_speak_to_browser_or_terminal(evil: Trace):
    page, text = evil._repr_html_(), str(evil)
    assert "<script" not in page and "&lt;script&gt;" in page and "<script>" in text
    for shown in (page, text):
        assert (
            "\x1b" not in shown
            and "\u202e" not in shown
            and "<U+202E>" in shown.replace("&lt;", "<").replace("&gt;", ">")
        )
    assert "mathjax_ignore" in page  # nor is $x$ a formula


def contrast(first: str, second: str) -> float:
    """WCAG's ratio of two colours."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_legible(colors: dict[str, str]):
    """4.5 to 1 is WCAG's bound for text of this size."""
    pairs = [(colors[name], colors[name.removesuffix("-text")]) for name in colors if name.endswith("-text")]
    pairs += [(colors["text"], colors["ground"]), (colors["quiet"], colors["ground"])]
    assert len(pairs) == 9 and min(contrast(*pair) for pair in pairs) >= 4.5


def test_every_ground_has_its_text_colour():
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", STYLE)
    grounds = [(where, rule) for where, rule in rules if "background:var" in rule or "background:#" in rule]
    assert len(grounds) > 10
    for where, rule in grounds:
        assert re.search(r"(^|[;\n])color:", rule), where


# --- blocks and pictures


def test_text_of_blocks():
    table = Table(("step", "loss"), [("1", "0.5"), ("10", "-12")])
    assert [*table.lines()] == ["  step  loss", "  1      0.5", "  10     -12"]
    assert [*Chips([Chip("a", "1"), Chip("b", "2")]).lines()] == ["  a(1) b(2)"]
    many = [*Chips([Chip("word", "12345")] * 50).lines()]
    assert all(len(line) <= 100 for line in many) and " ".join(many).split() == ["word(12345)"] * 50
    card = Bars("after a", [Bar("b", 0.5, "50%", True), Bar("cc", 0.0, "0%")])
    assert [*card.lines()] == ["  after a", "  * b       50%  ############", "    cc       0%"]
    lane = Lane("pack 1", [("row 1", 90, True), ("row 2", 5, False)], 5)
    assert [*Lanes([lane]).lines()] == ["  pack 1: *row 1 (90)* | row 2 (5) | free (5)"]
    assert lane.labels == ["row 1", "2"] and lane.free_label == ""
    assert Lane("pack 1", [("row 1", 50, True)], 50).free_label == "free"


def test_gradient_maps(figures: list[Figure]):
    """What is drawn is the first 64 columns; B lies on its side; an empty one says so."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 100), torch.randn(70, 4)
    gradient_maps([torch.zeros(4, 100), a], [b, 2 * b])
    (figure,) = figures
    drawn = [torch.tensor(axes.images[0].get_array().data) for axes in figure.axes]  # pyright: ignore
    for shown, wanted in zip(drawn, [torch.zeros(4, 64), a[:, :64], b[:64].T, 2 * b[:64].T], strict=True):
        torch.testing.assert_close(shown, wanted, rtol=0, atol=0)
    said = texts(figure)
    assert "A, step 1: all 0" in said and f"A, step 2: up to {a[:, :64].abs().max():.1e}" in said
    assert "input 1 to 64 of 100" in said and "output 1 to 64 of 70" in said and "4 ranks" in said
    for axes in figure.axes:
        low, high = axes.images[0].get_clim()
        assert low is not None and high is not None and low == -high < 0  # white is 0


def test_progress_goes_away(capsys: pytest.CaptureFixture[str]):
    with progress(1) as report:
        for what in ("encoding", "answering before", "step 1 of 1", "answering after"):
            report(what)
    lines = [line.rpartition("\r")[2].strip() for line in capsys.readouterr().err.split("\n")]
    assert not any(lines)
