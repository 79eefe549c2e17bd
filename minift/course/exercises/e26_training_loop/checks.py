"""e26: the same run without micro-batches: whole windows at once, torch.optim.AdamW, the model as one formula."""

import torch
import torch.nn.functional as F

from minift.course.spec import Case, check

# One update has some 1000 roundings of float64 in sums of numbers below 10; Adam divides small gradients by small ones
# and the next updates build on that, so 60 of them are given a factor of 1000 beside the roundings.
TOLERANCE = 1000 * 10 * torch.finfo(torch.float64).eps
VOCABULARY = 61
WIDTHS = {"embed": (61, 64), "mix": (60, 64), "up": (170, 60), "down": (56, 170), "head": (61, 56)}  # 31 K parameters
SMALL = {"embed": (61, 9), "mix": (8, 9), "up": (12, 8), "down": (7, 12), "head": (61, 7)}


def make_weights(draw, widths):
    weights = {}
    for name, shape in widths.items():
        bound = 1.0 if name == "embed" else shape[1] ** -0.5
        weights[name] = torch.randn(*shape, generator=draw, dtype=torch.float64) * bound
    return weights


def make_data(draw, rows, length):
    """Tokens and, for a random half of the places, what a fixed permutation says comes next."""
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=draw)
    labels = (tokens * 17 + 5) % VOCABULARY
    # From one label a row to nearly all of them: a mean over micro-batches is another one than over labels.
    share = torch.arange(rows)[torch.randperm(rows, generator=draw)] / rows
    hidden = torch.rand(rows, length, generator=draw) < share.unsqueeze(1)
    hidden[:, 0] = False
    return {"tokens": tokens, "labels": labels.masked_fill(hidden, -100)}


def mean_loss(weights, mask, data, rows):
    x = F.embedding(data["tokens"][rows], weights["embed"]) @ weights["mix"].T
    hidden = (x @ weights["up"].T).tanh() * mask
    logits = hidden @ weights["down"].T @ weights["head"].T
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), data["labels"][rows].reshape(-1))


def reference(given, generator):
    """What `run` in drive.py must return."""
    options, rates = given["options"], given["rates"]
    weights = {name: value.clone() for name, value in given["weights"].items()}
    trained = [weights[name].requires_grad_() for name in weights if not name.startswith(options["frozen"])]
    adamw = torch.optim.AdamW(trained, 0.0, (0.9, 0.99), 1e-4, given["weight_decay"], foreach=False)
    losses, evaluations = [], []
    for _ in range(options["epochs"]):
        order = torch.randperm(len(given["data"]["tokens"]), generator=generator)
        size = options["micro_batch"] * options["accumulate"]
        for first in range(0, len(order), size):
            loss = mean_loss(weights, given["mask"], given["data"], order[first : first + size])
            gradients = torch.autograd.grad(loss, trained)
            norm = float(torch.cat([g.flatten() for g in gradients]).norm())
            factor = min(1.0, options["max_norm"] / (norm + 1e-6))
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient * factor
            adamw.param_groups[0]["lr"] = rates[len(losses)]
            adamw.step()
            losses.append(float(loss.detach()))
            if len(losses) % options["eval_every"] == 0:
                with torch.no_grad():
                    every = torch.arange(len(given["held_out"]["tokens"]))
                    evaluations.append(float(mean_loss(weights, 1.0, given["held_out"], every)))
    return {
        "losses": losses,
        "evaluations": evaluations,
        "rates": rates[: len(losses)],
        "most rows at once": min(options["micro_batch"], len(given["data"]["tokens"])),
        "numbers in the optimizer": sum(parameter.numel() for parameter in trained),
        "frozen ones changed": [],
        "frozen ones with a gradient": [],
    }


def run_case(draw, widths, rows, length, about, rates=None, weight_decay=0.0, **options):
    options = {
        "frozen": ("mix",), "epochs": 1, "micro_batch": rows, "accumulate": 1, "max_norm": 1e9, "eval_every": 1,
    } | options  # fmt: skip
    width = widths["up"][0]
    updates = options["epochs"] * -(-rows // (options["micro_batch"] * options["accumulate"]))
    given = {
        "weights": make_weights(draw, widths),
        "mask": (torch.rand(width, generator=draw) < 0.7).double() / 0.7,
        "data": make_data(draw, rows, length),
        "held_out": make_data(draw, 5, length + 2),
        "rates": rates or [0.02] * updates,
        "weight_decay": weight_decay,
        "options": options,
    }
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, (1,), generator=draw)))
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    expect = reference(given, twin)
    return Case("run", given | {"generator": generator}, expect, atol=TOLERANCE, rtol=TOLERANCE, about=about)


@check(points=1)
def evaluation_alone(draw):
    """Evaluation is the mean over all labels in eval mode, a few rows at a time, and leaves everything as it was."""
    weights, mask = make_weights(draw, SMALL), torch.tensor([0.0, 1.5, 1.5] * 4, dtype=torch.float64)
    data = make_data(draw, 7, 5)
    expect = float(mean_loss(weights, 1.0, data, torch.arange(7)))
    for training in (True, False):
        given = {"weights": weights, "mask": mask, "data": data, "micro_batch": 3, "training": training}
        about = f"7 rows by 3, the model comes in {'training' if training else 'eval'} mode"
        yield Case("evaluation", given, (expect, training, False, 3), atol=TOLERANCE, rtol=TOLERANCE, about=about)


@check(points=1)
def single_updates(draw):
    """Without accumulation: fresh gradients for each update, clipped before the step, in training mode throughout."""
    about = "2 updates of 4 rows; the model comes in eval mode, with gradients of somebody else"
    yield run_case(draw, SMALL, 8, 6, about, micro_batch=4, weight_decay=0.1, eval_every=3)
    about = "3 updates, the last one of 2 rows, the norm of the gradients limited to 0.05"
    yield run_case(draw, SMALL, 8, 6, about, micro_batch=3, max_norm=0.05, eval_every=3)
    about = "3 updates, evaluated after each of them"
    yield run_case(draw, SMALL, 9, 4, about, micro_batch=3)


@check(points=1)
def accumulation(draw):
    """A window goes through the model in micro-batches; its loss and its gradients are the mean over its labels."""
    about = "23 rows by 3, 4 micro-batches a window, the last window of 11 rows"
    yield run_case(draw, SMALL, 23, 5, about, micro_batch=3, accumulate=4)
    about = "14 rows by 2, 3 micro-batches a window, the norm of the gradients limited to 0.05"
    yield run_case(draw, SMALL, 14, 7, about, micro_batch=2, accumulate=3, max_norm=0.05)


@check(points=1)
def one_rate_an_update(draw):
    """The schedule is asked once for each update, with the number of the update, over all epochs."""
    rates = [0.05 / (i + 1) for i in range(6)]
    about = "2 epochs of 3 updates of 2 micro-batches"
    yield run_case(draw, SMALL, 11, 4, about, rates=rates, micro_batch=2, accumulate=2, epochs=2, eval_every=2)


@check(points=1)
def frozen_stays(draw):
    """What is frozen gets no gradient and does not change, and the optimizer never hears of it."""
    about = "mix and embed are frozen"
    yield run_case(draw, SMALL, 9, 4, about, frozen=("mix", "embed"), micro_batch=3, weight_decay=0.2)
    yield run_case(draw, SMALL, 9, 4, "up is frozen", frozen=("up",), micro_batch=3, accumulate=2, weight_decay=0.2)


@check(points=1)
def sixty_updates(draw):
    """A whole run: 31 K parameters, 60 updates, another order of the rows in every epoch."""
    rates = [0.01 * (60 - i) / 60 for i in range(60)]
    about = "20 epochs of 3 updates"
    yield run_case(draw, WIDTHS, 17, 6, about, rates=rates, micro_batch=3, accumulate=2, epochs=20, max_norm=1.0,
                   eval_every=15, weight_decay=0.01)  # fmt: skip
