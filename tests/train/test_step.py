"""The optimizer step: every layout and every division of the same rows gives the same loss and the same gradients.

The peer is transformers' own forward pass with labels, one row at a time, without padding, packing or a shared
beginning. Tolerances: see `TOLERANCE`.
"""

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from minift.data.collate import Batch, collate, flatten, share_prefix, stack
from minift.data.encode import IGNORE, Example, encode
from minift.data.packing import pack
from minift.data.tokenizer import Tokenizer
from minift.model.decoder import CausalLM
from minift.train.step import StepStats, loss_sum, train_step

# Two ways to the same number differ by the order of their sums. A sum of n terms rounds by about sqrt(n) * u, relative
# to its terms, u = 2^-24 for fp32; here n <= 128 (the widths; about as many tokens), and between a weight and the loss,
# or back, lie some 40 such sums (2 layers of 7 linears, 2 products of attention and 2 norms, twice). Relative to the
# largest element of a tensor, 2.7e-5; what a wrong mask or count changes is above 1e-3 in each of these tests.
TOLERANCE = 40 * math.sqrt(128) * 2**-24
WRONG = 1e-3

step_module = import_module("minift.train.step")  # `minift.train` is also the name of a function
Layout = Callable[[Sequence[Example]], list[Batch]]


def off(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(
    model: CausalLM, batches: Sequence[Batch], gradient_checkpointing: bool = False
) -> tuple[StepStats, dict[str, Tensor]]:
    """What train_step reports, and the gradients that its optimizer is given."""
    kept: dict[str, Tensor] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            kept.update(gradients(model))

    model.zero_grad(set_to_none=True)
    optimizer = Keep([p for p in model.parameters() if p.requires_grad])
    return train_step(model.train(), batches, optimizer, 0, gradient_checkpointing), kept


def loss_and_gradients(
    model: CausalLM, batches: Sequence[Batch], gradient_checkpointing: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    stats, grads = step(model, batches, gradient_checkpointing)
    return torch.tensor(stats.loss), grads


def assert_same(
    ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]], tolerance: float = TOLERANCE
) -> None:
    assert off(ours[0], theirs[0]) < tolerance
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name in ours[1]:
        assert theirs[1][name].abs().max() > 0, f"{name} has no gradient to compare"
        assert off(ours[1][name], theirs[1][name]) < tolerance, name


@pytest.fixture(scope="module")
def examples(tiny: Path) -> list[Example]:
    """Chats that begin with the same system message and differ in length; labels on the answers."""
    tokenizer = Tokenizer(tiny)
    return [encode(tokenizer, row) for row in peers.demo_rows(7)]


def padded_left(examples: Sequence[Example]) -> list[Batch]:
    return [collate(examples, 0, "left")]


def shared(examples: Sequence[Example]) -> list[Batch]:
    batch = share_prefix(collate(examples, 0))
    assert batch.shared_prefix is not None and batch.shared_prefix[0] > 20
    return [batch]


def packed_rows(examples: Sequence[Example]) -> list[Batch]:
    """Rows of several documents under each other; they begin alike, and must not be taken for chats that do."""
    rows = pack(examples, 3 * max(map(len, examples)))
    assert len(rows) > 1 and any((row.documents_bs > 0).any() for row in rows)
    batch = share_prefix(stack(rows, 0))
    assert batch.input_ids_bs.shape[0] == len(rows)
    return [batch]


LAYOUTS: dict[str, Layout] = {
    "alone": lambda examples: [collate([example], 0) for example in examples],
    "right": lambda examples: [collate(examples, 0)],
    "left": padded_left,
    "flat": lambda examples: [flatten(examples)],
    "packed": packed_rows,
    "shared": shared,
    "shared-in-two": lambda examples: [*shared(examples[:3]), *shared(examples[3:])],
}


# --- the same numbers from every layout


@pytest.fixture(scope="module")
def peer(tiny: Path, examples: list[Example]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of transformers, row by row, weighted by the rows' trained tokens."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).train()
    # transformers gives its embedding the pad token as `padding_idx`, which has no gradient then. Here that token is
    # <|im_end|>, a real one, and trained as such by minift.
    assert model.model.embed_tokens.padding_idx == Tokenizer(tiny).eos_id
    model.model.embed_tokens.padding_idx = None
    total, trained = torch.zeros(()), sum(example.trained_tokens for example in examples)
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss * (example.trained_tokens / trained)
        loss.backward()
        total += loss.detach()
    return total, gradients(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_of_all_weights_equal_transformers(
    tiny: Path, make_model: Any, examples: list[Example], peer: Any, layout: str, attention: str
):
    model = make_model(tiny, r=0, attention=attention)
    batches = LAYOUTS[layout](examples)
    assert sum(batch.trained_tokens for batch in batches) == sum(example.trained_tokens for example in examples)
    assert_same(loss_and_gradients(model, batches), peer)


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_lora_gradients_do_not_depend_on_the_layout(
    tiny: Path, make_model: Any, examples: list[Example], quantize: str | None, attention: str,
    gradient_checkpointing: bool,
):  # fmt: skip
    model = make_model(tiny, quantize, warm=True, attention=attention)
    alone = loss_and_gradients(model, LAYOUTS["alone"](examples))
    assert len(alone[1]) == 2 * 14
    for layout in ("right", "left", "flat", "packed", "shared", "shared-in-two"):
        assert_same(loss_and_gradients(model, LAYOUTS[layout](examples), gradient_checkpointing), alone)


def test_odd_sizes(tiny_odd: Path, make_model: Any, examples: list[Example]):
    """Width 65, MLP 131, five query heads on one key/value head, a head of its own."""
    model = make_model(tiny_odd, r=0)
    alone = loss_and_gradients(model, LAYOUTS["alone"](examples))
    for layout in ("right", "left", "flat", "packed", "shared"):
        assert_same(loss_and_gradients(model, LAYOUTS[layout](examples)), alone)


def test_labels_on_everything_and_rows_of_extreme_lengths(tiny: Path, make_model: Any):
    """Rows of one token teach nothing and must do no harm; every label counts but a row's first."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 300, (n,), generator=draw).tolist() for n in (1, 2, 90, 1, 33)]
    examples = [Example(ids, [IGNORE, *ids[1:]]) for ids in rows]
    model = make_model(tiny, warm=True)
    alone = loss_and_gradients(model, LAYOUTS["alone"](examples))
    for layout in ("right", "left", "flat"):
        assert_same(loss_and_gradients(model, LAYOUTS[layout](examples)), alone)
    assert_same(loss_and_gradients(model, pack(examples, 100, "bfd")), alone)
    assert_same(loss_and_gradients(model, pack(examples, 256, "wrapped")), alone)  # long enough to tear nothing apart


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_packed_rows_equal_those_of_each_document_alone(
    tiny: Path, make_model: Any, examples: list[Example], attention: str, side: Any
):
    model = make_model(tiny, warm=True, attention=attention)
    wanted = {tuple(e.input_ids): model(torch.tensor([e.input_ids]))[0] for e in examples}
    batch = stack(pack(examples, 150), 0, side)
    with torch.no_grad():
        logits = model(batch.input_ids_bs, batch.positions_bs, batch.documents_bs)
        blurred = model(batch.input_ids_bs, batch.positions_bs, batch.documents_bs.clamp(max=0))
    seen, crossed = 0, 0.0
    for row in range(len(logits)):
        for number in range(int(batch.documents_bs[row].max()) + 1):
            here = batch.documents_bs[row] == number
            theirs = wanted[tuple(batch.input_ids_bs[row, here].tolist())]
            assert off(logits[row, here], theirs) < TOLERANCE
            crossed = max(crossed, off(blurred[row, here], theirs))
            seen += 1
    assert seen == len(examples)
    assert crossed > WRONG  # had the documents seen each other, it would show


# --- several micro-batches


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_micro_batches_of_unequal_length_equal_one_batch(
    tiny: Path, make_model: Any, examples: list[Example], quantize: str | None
):
    model = make_model(tiny, quantize, warm=True)
    whole, whole_grads = step(model, [collate(examples, 0)])
    # By number of trained tokens, so that the micro-batches' means differ as much as they can.
    parts = sorted(examples, key=lambda example: example.trained_tokens)
    batches = [collate(parts[:1], 0), collate(parts[1:5], 0), collate(parts[5:], 0)]
    stats, grads = step(model, batches)
    assert abs(stats.loss - whole.loss) < TOLERANCE * whole.loss
    assert abs(stats.grad_norm - whole.grad_norm) < TOLERANCE * whole.grad_norm
    assert (stats.trained_tokens, stats.tokens) == (whole.trained_tokens, whole.tokens)
    assert_same((torch.tensor(stats.loss), grads), (torch.tensor(whole.loss), whole_grads))

    # The mean of the micro-batches' means is what a loss divided batch by batch would give. It is another number.
    means = [step(model, [batch]) for batch in batches]
    mean_of_means = sum(stats.loss for stats, _ in means) / len(means)
    assert abs(mean_of_means - whole.loss) > WRONG * whole.loss
    averaged = {name: torch.stack([grads[name] for _, grads in means]).mean(0) for name in whole_grads}
    assert min(off(averaged[name], whole_grads[name]) for name in averaged) > WRONG


def test_the_statistics_of_a_step(tiny: Path, make_model: Any, examples: list[Example], peer: Any):
    model = make_model(tiny, r=0)
    stats, _ = step(model, [collate(examples[:4], 0), *shared(examples[4:])])
    assert stats.trained_tokens == sum(example.trained_tokens for example in examples)
    assert stats.tokens == sum(map(len, examples))
    assert abs(stats.loss - float(peer[0])) < TOLERANCE * stats.loss
    norm = math.sqrt(sum(float((grad.double() ** 2).sum()) for grad in peer[1].values()))
    assert abs(stats.grad_norm - norm) < TOLERANCE * norm
    total = float(loss_sum(model, collate(examples, 0)).detach())
    assert abs(total / stats.trained_tokens - stats.loss) < TOLERANCE * stats.loss


def test_a_micro_batch_without_labels_changes_nothing(tiny: Path, make_model: Any, examples: list[Example]):
    model = make_model(tiny, warm=True)
    silent = [Example(example.input_ids, [IGNORE] * len(example)) for example in examples[:2]]
    theirs, their_grads = step(model, [collate(examples, 0)])
    for batch in (collate(silent, 0), share_prefix(collate(silent, 0)), collate([Example([5], [IGNORE])], 0)):
        ours, grads = step(model, [batch, collate(examples, 0)])
        assert ours.loss == theirs.loss and ours.trained_tokens == theirs.trained_tokens
        assert all(torch.equal(grads[name], their_grads[name]) for name in grads)


# --- the head in pieces


# bf16: each of the 40 results on the way is rounded by up to 2^-9, and the head's gradient each time a piece is added.
# The roundings are independent, so their root counts; three times that for the largest of many elements.
def piece_tolerance(dtype: torch.dtype, pieces: int) -> float:
    return TOLERANCE if dtype == torch.float32 else 3 * math.sqrt(40 + pieces) * 2**-9


@pytest.mark.parametrize("gradient_checkpointing", [False, True, "selective"], ids=["kept", "recomputed", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("folder", ["tiny", "tiny_odd"], ids=["tied", "untied"])
@pytest.mark.parametrize("r", [0, 4], ids=["all-weights", "lora"])
def test_many_rows_go_through_the_head_in_pieces(
    request: Any, make_model: Any, examples: Any, monkeypatch: Any, r: int, folder: str, dtype: Any,
    gradient_checkpointing: Any,
):  # fmt: skip
    """The same as with all logits at once, in one cross-entropy of PyTorch's own."""
    model = make_model(request.getfixturevalue(folder), r=r, warm=r > 0, dtype=dtype)
    batches = LAYOUTS["shared"](examples)
    trained = batches[0].trained_tokens
    hidden_nd, target_n = step_module.trained_rows(model.train(), batches[0])
    loss = nn.functional.cross_entropy(model.logits(hidden_nd).float(), target_n)
    loss.backward()
    whole, head_loss = (loss, gradients(model)), step_module.head_loss
    rows: list[int] = []

    def counting(head: Any, hidden_nd: Tensor, target_n: Tensor) -> Tensor:
        rows.append(len(target_n))
        return head_loss(head, hidden_nd, target_n)

    monkeypatch.setattr(step_module, "head_loss", counting)
    for size in (1, 7, trained - 1, trained):
        rows.clear()
        monkeypatch.setitem(step_module.LOGITS_AT_ONCE, "cpu", size * model.config.vocab_size)
        ours = loss_and_gradients(model, batches, gradient_checkpointing)
        assert_same(ours, whole, piece_tolerance(dtype, len(rows)))
        assert max(rows) == size and len(rows) == -(-trained // size) and sum(rows) == trained
    monkeypatch.setitem(step_module.LOGITS_AT_ONCE, "cpu", 1)  # less than a row: one at a time
    assert_same(loss_and_gradients(model, batches), whole, piece_tolerance(dtype, trained))


def test_only_the_head_is_trained(tiny_odd: Path, make_model: Any, examples: list[Example]):
    """Then nothing below the head has a gradient to pass on."""
    model = make_model(tiny_odd, r=0)
    theirs = loss_and_gradients(model, [collate(examples, 0)])
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    ours = loss_and_gradients(model, [collate(examples, 0)])
    assert ours[0] == theirs[0]
    assert ours[1].keys() == {"lm_head.weight"}
    assert torch.equal(ours[1]["lm_head.weight"], theirs[1]["lm_head.weight"])


# --- the update


def stepped(model: CausalLM, batches: Sequence[Batch], max_grad_norm: float) -> tuple[Any, dict[str, Tensor]]:
    """How far plain gradient descent with rate 1 moves each parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    stats = train_step(model, batches, optimizer, max_grad_norm)
    return stats, {name: before[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_reported(
    tiny: Path, make_model: Any, examples: list[Example]
):
    batches = [collate(examples, 0)]
    free, moved = stepped(make_model(tiny, warm=True), batches, max_grad_norm=0)
    length = math.sqrt(sum(float((m.double() ** 2).sum()) for m in moved.values()))
    # A difference of two fp32 parameters around 0.1 is exact to u * 0.1 an element; there are 10^4 of them.
    slack = 2**-24 * 0.1 * 100
    assert abs(length - free.grad_norm) < TOLERANCE * free.grad_norm + slack
    for limit in (free.grad_norm / 10, 0.01):
        stats, clipped = stepped(make_model(tiny, warm=True), batches, limit)
        assert stats.grad_norm == free.grad_norm and stats.loss == free.loss
        length = math.sqrt(sum(float((m.double() ** 2).sum()) for m in clipped.values()))
        assert abs(length - limit) < TOLERANCE * limit + slack
        for name in clipped:  # one factor for all of them; 2^-22 is four roundings of a parameter below 1
            assert (clipped[name] - moved[name] * (limit / free.grad_norm)).abs().max() < 2**-22
    stats, gentle = stepped(make_model(tiny, warm=True), batches, max_grad_norm=10 * free.grad_norm)
    assert all(torch.equal(gentle[name], moved[name]) for name in moved)


def test_gradients_are_cleared_and_frozen_weights_stay(tiny: Path, make_model: Any, examples: list[Example]):
    model = make_model(tiny, "nf4", warm=True)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    frozen |= {name: b.clone() for name, b in model.named_buffers()}
    stepped(model, [collate(examples, 0)], 1.0)
    assert not gradients(model)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    assert frozen and all(torch.equal(state[name], value) for name, value in frozen.items())


def weight_to_break(model: Any, where: str) -> Tensor:
    layer = model.model.layers[0].mlp.up_proj
    return layer.lora_A["default"].weight if where == "lora" else model.model.norm.weight


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["lora", "norm"])
def test_a_loss_that_is_not_finite_stops_and_changes_nothing(
    tiny: Path, make_model: Any, examples: list[Example], bad: float, where: str
):
    model = make_model(tiny, warm=True)
    batches = [collate(examples[:3], 0), collate(examples[3:], 0)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    train_step(model, batches, optimizer)
    with torch.no_grad():
        weight_to_break(model, where)[..., 0] = bad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    named = {
        "lora": r"model\.layers\.0\.mlp\.up_proj, whose lora_A\.default\.weight is not finite",
        "norm": r"model\.norm, whose weight is not finite",
    }[where]
    state = [{k: torch.as_tensor(v).clone() for k, v in values.items()} for values in optimizer.state.values()]
    with pytest.raises(FloatingPointError, match=rf"^loss (nan|inf).* that of {named}"):
        train_step(model, batches, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0, 8.0), before[name].nan_to_num(7.0, 8.0)), name
    for values, old in zip(optimizer.state.values(), state, strict=True):
        assert all(torch.equal(torch.as_tensor(values[key]), old[key]) for key in old)


def test_the_gradients_of_a_failed_step_do_not_poison_the_next(tiny: Path, make_model: Any, examples: list[Example]):
    """Whoever catches the error, leaves the bad rows out and goes on gets the step that a fresh run would make."""
    model = make_model(tiny, warm=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batches, weight = [collate(examples, 0)], weight_to_break(model, "lora")
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:] = float("nan")
    with pytest.raises(FloatingPointError):
        train_step(model, batches, optimizer)
    with torch.no_grad():
        weight.copy_(kept)
    assert train_step(model, batches, optimizer) == stepped(make_model(tiny, warm=True), batches, 1.0)[0]


def test_a_gradient_that_overflows_is_named(tiny: Path, make_model: Any, examples: list[Example]):
    """The loss may be finite when a gradient is not."""
    model = make_model(tiny, warm=True)
    weight = model.model.layers[1].self_attn.o_proj.lora_B["default"].weight
    weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match=r"the gradient of model\.layers\.1\.self_attn\.o_proj\.lora_B"):
        train_step(model, [collate(examples, 0)], torch.optim.SGD([weight], lr=1.0))
