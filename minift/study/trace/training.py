"""The stations of a trace from the gradient to the changed answer (those before: stations.py)."""

from minift.data.tokenizer import Tokenizer
from minift.optim.adamw8bit import MIN_8BIT_SIZE
from minift.study.plots.trace import gradient_maps
from minift.study.trace.blocks import Block, Figure, Station, Table, Text
from minift.study.trace.numbers import Followed
from minift.study.trace.stations import loss_chips, visible
from minift.study.trace.steps import SLOTS, Mean

SHOWN = 8  # weights whose numbers are written out
FAR = 1.5  # learning rates that a weight moves in a step: more than fp32 state would do at first


def stations_of_training(followed: Followed, tokenizer: Tokenizer) -> list[Station]:
    """From the gradient to the changed answer."""
    return [
        _gradient(followed),
        _state(followed),
        _pages(followed),
        _update(followed),
        _answer(followed, tokenizer),
    ]


def _gradient(followed: Followed) -> Station:
    a, b, first = followed.a, followed.b, followed.steps[0]
    lesson = (
        f"LoRA adds s B (A x) to what a frozen layer computes, here {followed.layer}. Let t = A x, and dy the gradient "
        "of the layer's output. Then the gradient of B is s times the outer product of dy and t, and the gradient of A "
        "is s times that of B^T dy and x."
    )
    if not b.before.any() and not a.gradient.any() and b.gradient.any():
        lesson += (
            "\n\nB begins at zero, so that training begins at the unchanged model. So B^T dy is zero, and A has no "
            "gradient in the first step. A is random, so t is not zero, and B has one. After that step B is no longer "
            "zero, and from the second on A learns, too."
        )
    else:
        lesson += "\n\nB is not zero here (it has been trained before), so A and B both have a gradient from the start."
    if first.stats.grad_norm > 1.001 * first.norm:
        lesson += (
            f"\n\nThe norm of all gradients together is {first.stats.grad_norm:.3f}. That is more than the limit, so "
            f"all of them are scaled down to {first.norm:.3f} before the optimizer sees them (clipping)."
        )
    rows = [
        (name, str(list(m.before.shape)), f"{m.gradient.norm():.4g}", f"{m.taken[0].norm():.4g}")
        for name, m in (("A", a), ("B", b))
    ]
    rows.append(("all", "", f"{first.stats.grad_norm:.4g}", f"{first.norm:.4g}"))
    caption = "Gradients of A and B as the optimizer gets them: blank is 0, orange below, purple above. The largest "
    caption += "2 % are drawn alike."
    blocks: list[Block] = [
        Table(("norm of", "shape", "gradient", "clipped"), rows),
        Figure(gradient_maps(a.taken, b.taken), caption),
    ]
    return Station("Gradient", lesson, ("minift.adapters.lora.AddLowRank", "minift.train.step.backward"), blocks)


def _state(followed: Followed) -> Station:
    b = followed.b
    uses = ("minift.optim.adamw8bit.AdamW8bit", "minift.quant.dequantize_blockwise")
    if b.m.codes_c is None:
        lesson = (
            f"AdamW remembers two running means for each weight, m of the gradient and v of its square. B has "
            f"{b.before.numel():,} weights, fewer than {MIN_8BIT_SIZE:,}, so they stay in fp32: there is nothing to "
            "save."
        )
    else:
        lesson = (
            "AdamW remembers two running means for each weight, m of the gradient and v of its square: 8 bytes in "
            "fp32. Here each is one byte, a code that means an entry of a table of 256 numbers, times the largest "
            f"value of its block of {len(b.m.codes_c)}. In the first block of B that is {b.m.absmax:.4g} for m and "
            f"{b.v.absmax:.4g} for v; beside it, what AdamW would keep of the same gradient in fp32.\n\n"
            "The update is made of the exact means; only what the next step remembers is rounded. v spans the square "
            "of m's range, so its small ones are the first to become 0."
        )
        if not followed.a.taken[0].any():
            lesson += " The state of A is 0 everywhere, as its gradient was."
    zeros = int(((b.v.kept_c == 0) & (b.m.kept_c != 0)).sum())
    if zeros:
        lesson += f" In this block {zeros} of {len(b.v.kept_c)} v became 0 while their m did not."
    grads = b.taken[0].flatten()

    def cells(mean: Mean, i: int) -> tuple[str, str, str]:
        code = "" if mean.codes_c is None else str(int(mean.codes_c[i]))
        return code, f"{mean.kept_c[i]:.3g}", f"{mean.exact_c[i]:.3g}"

    count = min(SHOWN, len(b.m.kept_c))
    m_rows = [(str(i), f"{grads[i]:.3g}", *cells(b.m, i)) for i in range(count)]
    v_rows = [(str(i), f"{grads[i]:.3g}", *cells(b.v, i)) for i in range(count)]
    tables = [
        Table(("weight", "gradient", f"{n}: code", "kept", "in fp32"), r) for n, r in (("m", m_rows), ("v", v_rows))
    ]
    return Station("8-bit optimizer state", lesson, uses, tables)


def _pages(followed: Followed) -> Station:
    first = followed.steps[0].pages
    uses = ("minift.optim.paging.PagePool",)
    if first is None:
        lesson = (
            f"Only 8-bit state is paged, and no trained tensor here has the {MIN_8BIT_SIZE:,} weights from which on it "
            "is 8-bit. With a higher rank there would be something to move."
        )
        return Station("Pages", lesson, uses, [])
    used = first.hits + first.prefetched + first.faults
    lesson = (
        f"The state lies in host memory, in {used} pages of {followed.page_bytes:,} bytes, and only {SLOTS} of them "
        "fit on the device at a time (so few that some have to move, whatever the size of the model). A page that is "
        "needed and not there is a fault: the step waits for the copy. One that was fetched while the page before it "
        "was worked on (ahead) costs no waiting, and one that is still there costs nothing (a hit).\n\n"
        "Every step uses all pages, forwards and backwards in turn, so that the last of one step are the first of the "
        "next. The results are those of an optimizer without pages, bit for bit."
    )
    head = ("step", "hits", "ahead", "faults", "evicted", "kB in", "kB out")
    rows = [
        (str(number), *map(str, (p.hits, p.prefetched, p.faults, p.evictions)),
         *(f"{moved / 1000:,.0f}" for moved in (p.bytes_in, p.bytes_out)))
        for number, p in enumerate((look.pages for look in followed.steps), start=1)
        if p is not None
    ]  # fmt: skip
    return Station("Pages", lesson, uses, [Table(head, rows)])


def _update(followed: Followed) -> Station:
    a, b, steps = followed.a, followed.b, followed.steps
    lesson = (
        "AdamW divides m by the root of v (weight decay, if there is any, comes on top). In the first step both are "
        "made of one gradient, so the quotient is its sign: each weight moves by the learning rate, up or down, "
        "however large its gradient is. Only where the gradient is as small as epsilon is the way shorter, and where "
        f"it is 0{'' if a.gradient.any() else ', as in A'}, there is none."
    )
    lr = steps[0].lr
    if any(max(s.moved_a, s.moved_b) > FAR * s.lr for s in steps[:10] if s.lr):
        lesson += (
            "\n\nLater a weight can move much further: with fp32 state hardly more than one learning rate in the "
            "first steps, with 8-bit state more, where v was rounded to 0 and m was not. That is the price of two "
            "bytes a weight."
        )
    lesson += (
        f"\n\nIn the first step {int((a.before != a.after).sum()):,} of {a.before.numel():,} weights of A and "
        f"{int((b.before != b.after).sum()):,} of {b.before.numel():,} of B moved; the first table has some of B. In "
        "the second, |dA| and |dB| are the norms of the gradients, A / lr and B / lr the largest change of a weight."
    )
    head = ("of B", "before", "after", "change", "/ lr")
    before, after = b.before.flatten()[:SHOWN], b.after.flatten()[:SHOWN]
    rows = [
        (str(i), f"{old:.6f}", f"{new:.6f}", f"{new - old:+.6f}", f"{(new - old) / lr:+.4f}" if lr else "")
        for i, (old, new) in enumerate(zip(before.tolist(), after.tolist(), strict=True))
    ]
    of_steps = [
        (str(number), f"{s.stats.loss:.4f}", f"{s.lr:.3g}", f"{s.norm_a:.3g}", f"{s.norm_b:.3g}",
         *(f"{moved / s.lr:.3f}" if s.lr else "" for moved in (s.moved_a, s.moved_b)))
        for number, s in enumerate(steps, start=1)
    ]  # fmt: skip
    steps_head = ("step", "loss", "lr", "|dA|", "|dB|", "A / lr", "B / lr")
    blocks: list[Block] = [Table(head, rows), Table(steps_head, of_steps)]
    return Station("Updated weights", lesson, ("minift.train.step.train_step",), blocks)


def _answer(followed: Followed, tokenizer: Tokenizer) -> Station:
    steps, (before, after) = followed.steps, followed.answers
    losses = [sum(p.loss for p in found) / len(found) for found in (followed.before, followed.after)]
    trained = tokenizer.decode(followed.example.input_ids[followed.prompt :], skip_special_tokens=True)
    lesson = (
        f"After {len(steps)} step{'s' if len(steps) > 1 else ''} on this one row its loss has gone from "
        f"{losses[0]:.4f} to {losses[1]:.4f}. Both answers go on greedily from the first {followed.prompt} token"
        f"{'s' if followed.prompt > 1 else ''} of the row, for at most {followed.longest_answer}. One row is learned "
        "by heart, which is not the aim of a run; it shows that all stations before are connected. The weights are now "
        "as they were before the trace."
    )
    blocks: list[Block] = [
        Text(visible(before), "Before"), Text(visible(after), "After"), Text(visible(trained), "What was trained"),
        loss_chips(followed.after, tokenizer),
    ]  # fmt: skip
    return Station("Changed answer", lesson, ("minift.model.generate.generate_tokens",), blocks)
