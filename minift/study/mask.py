"""Who may see whom in a batch, as text and as a picture.

A row of two documents and a pad, and a batch of two rows that share a prefix, laid out in one sequence:

    document  query  key 0 1 2 3 4 5  sees      document       query  key 0 1 2 3 4  sees
    0             0      x            0         shared prefix      0      x          0
    0             1      x x          0-1       shared prefix      1      x x        0-1
    0             2      x x x        0-2       row 0              2      x x x      0-2
    1             3            x      3         row 0              3      x x x x    0-3
    1             4            x x    3-4       row 1              4      x x     x  0-1, 4
    padding       5                x  5

, a column a key. Both pictures are of what attention computes with (model/attention.py): no matrix,
but the first key that each query sees; only here is it written out. A query's line is what the *next* token is
predicted from, so the picture marks the lines whose next token is trained.

Rows that are padded on the right need no mask: no token comes after padding, so the causal rule alone keeps it out of
sight. Then padding sees more in training than is drawn here, and what comes of it is thrown away.

Left out: layers that see a window while others do not; ask for the mask of each.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from torch import Tensor

from minift.data.collate import Batch
from minift.data.encode import IGNORE
from minift.model.attention import Visible
from minift.study.picture import BLUE, ORANGE, Picture, new_figure

TEXT_LIMIT = 64  # tokens; more do not fit a terminal
LIGHT = "#BBBBBB"
NAMED = 12  # documents whose names fit beside a picture
GRID = 24  # tokens that can be told one by one


def mask_of(batch: Batch, window: int | None = None) -> Tensor:
    """bool [b, s, s]: true where the query (second dimension) may see the key (third).

    Args:
        window: how many tokens a query sees, itself included; None is no limit.
    """
    s = batch.input_ids_bs.shape[1]
    if batch.shared_prefix is None:
        return Visible.of_documents(batch.documents_bs, s, window).mask[:, 0]
    numbers = [number for number, (_, start, stop) in enumerate(parts(batch, 0)) for _ in range(start, stop)]
    own = Visible.of_documents(batch.documents_bs.new_tensor([numbers]), s, window).mask[:, 0]
    # Positions, not places: each row goes on where the prefix ends, as if it stood right behind it.
    behind_bst = batch.positions_bs[:, :, None] - batch.positions_bs[:, None, :]
    prefix_bst = (behind_bst >= 0) & (behind_bst < (s if window is None else window))
    prefix_bst[:, :, batch.shared_prefix[0] :] = False
    return own | prefix_bst


def parts(batch: Batch, row: int) -> list[tuple[str, int, int]]:
    """(name, start, stop) of what a row consists of: documents, padding, a shared prefix."""
    if batch.shared_prefix is not None:
        prefix, lengths = batch.shared_prefix
        named = [("shared prefix", prefix), *((f"row {number}", length) for number, length in enumerate(lengths))]
    else:
        runs = groupby(batch.documents_bs[row].tolist())
        named = [("padding" if number < 0 else f"document {number}", len([*run])) for number, run in runs]
    ends = [sum(length for _, length in named[: index + 1]) for index in range(len(named))]
    return [(name, end - length, end) for (name, length), end in zip(named, ends, strict=True)]


def mask_text(batch: Batch, row: int = 0, window: int | None = None) -> str:
    """The mask of one row, as above.

    Raises:
        ValueError: no such row, or one that is too long for a terminal.
    """
    rows, s = batch.input_ids_bs.shape
    if not 0 <= row < rows:
        raise ValueError(f"no row {row}: the batch has rows 0 to {rows - 1}")
    if s > TEXT_LIMIT:
        raise ValueError(f"a row of {s} tokens is too long for text (at most {TEXT_LIMIT}): use mask_picture")
    seen_st = mask_of(batch, window)[row]
    names = [name.removeprefix("document ") for name, start, stop in parts(batch, row) for _ in range(start, stop)]
    width, digits = max(map(len, [*names, "document"])), len(str(s - 1))

    def line(name: str, query: str, mark: str, cells: Iterable[str], sees: str) -> str:
        return f"{name:<{width}}  {query:>5}  {mark:<3} {' '.join(f'{cell:>{digits}}' for cell in cells)}  {sees}"

    head = line("document", "query", "key", map(str, range(s)), "sees")
    lines = [
        line(name, str(query), "", ("x" if seen else "" for seen in seen_st[query].tolist()), _ranges(seen_st[query]))
        for query, name in enumerate(names)
    ]
    return "\n".join([head, *lines])


def _ranges(seen_t: Tensor) -> str:
    """0-2, 5"""
    runs, start = [], 0
    for seen, run in groupby(seen_t.tolist()):
        stop = start + len([*run])
        if seen:
            runs.append(f"{start}-{stop - 1}" if stop - start > 1 else str(start))
        start = stop
    return ", ".join(runs)


def mask_picture(batch: Batch, window: int | None = None, rows: int = 4) -> Picture:
    """The masks of the first `rows` rows side by side.

    Args:
        window: as for `mask_of`.

    Raises:
        ValueError: rows below 1.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    count = batch.input_ids_bs.shape[0]
    seen_bst = mask_of(batch, window)
    shown = min(rows, count)
    figure = new_figure(max(6.5, 4.5 * shown + 1), 5)
    for row, axes in enumerate(figure.subplots(1, shown, squeeze=False)[0]):
        _draw(axes, batch, row, seen_bst[row])
    legend = [
        Patch(color=BLUE, label="query sees key"),
        Patch(color=LIGHT, label="padding sees padding"),
        Line2D([], [], marker="<", color=ORANGE, linestyle="none", label="next token is trained"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
    if count > shown:
        figure.suptitle(f"the first {shown} of {count} rows")
    return Picture.of(figure)


def _draw(axes: Any, batch: Batch, row: int, seen_st: Tensor) -> None:
    from matplotlib.colors import ListedColormap

    s, found = len(seen_st), parts(batch, row)
    color_st = seen_st.long()
    color_st[batch.documents_bs[row] < 0] *= 2
    colors = ListedColormap(["white", BLUE, LIGHT])
    # Between white and grey lies blue, so nothing may be smoothed.
    axes.imshow(color_st.cpu().numpy(), cmap=colors, vmin=0, vmax=2, interpolation="nearest")
    predicting = (batch.labels_bs[row, 1:] != IGNORE).nonzero().flatten().tolist()
    beside = axes.get_yaxis_transform()  # x in widths of the square
    axes.plot([1.02] * len(predicting), predicting, "<", color=ORANGE, markersize=4, clip_on=False, transform=beside)
    axes.set(
        xlim=(-0.5, s - 0.5), ylim=(s - 0.5, -0.5), xlabel="key", title="" if batch.shared_prefix else f"row {row}"
    )
    if len(found) <= NAMED:
        axes.set_yticks([start for _, start, _ in found], [name for name, _, _ in found])
    else:
        axes.set_ylabel("query")
    if s <= GRID:
        axes.set_xticks(range(s))
        for place in range(1, s):
            axes.axhline(place - 0.5, color=LIGHT, linewidth=0.3)
            axes.axvline(place - 0.5, color=LIGHT, linewidth=0.3)
