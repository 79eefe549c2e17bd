"""The mask against texts written by hand and against attention itself; the picture against the mask, pixel by pixel."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from torch import Tensor

import minift
from minift.data.collate import Batch, share_prefix, stack
from minift.data.encode import IGNORE, Example
from minift.model.attention import SharedPrefix, after_prefix, eager
from minift.study.mask import LIGHT, TEXT_LIMIT, mask_of, mask_picture, mask_text
from minift.study.picture import BLUE, ORANGE


def document(*ids: int, trained: int = 1) -> Example:
    """The last tokens are trained."""
    return Example([*ids], [IGNORE] * (len(ids) - trained) + [*ids[len(ids) - trained :]])


def packed() -> Batch:
    """Two documents and a pad."""
    return stack(minift.pack([document(1, 2, 3), document(4, 5)], length=6), pad_id=0, multiple_of=6)


def left() -> Batch:
    return minift.collate([document(1, 2, 3, 4), document(5, 6)], pad_id=0, padding_side="left")


def shared(*sizes: int) -> Batch:
    """Rows of 3 equal tokens and then as many of their own; the last is trained if there are two."""
    owns = [range(10 * row + 4, 10 * row + 4 + size) for row, size in enumerate(sizes)]
    rows = [document(1, 2, 3, *own, trained=int(len(own) > 1)) for own in owns]
    batch = share_prefix(minift.collate(rows, pad_id=0), least=1)
    assert batch.shared_prefix == (3, sizes)
    return batch


# --- text -------------------------------------------------------------------------------------------------------------


def test_text_of_a_packed_row():
    assert mask_text(packed()).splitlines() == [
        "document  query  key 0 1 2 3 4 5  sees",
        "0             0      x            0",
        "0             1      x x          0-1",
        "0             2      x x x        0-2",
        "1             3            x      3",
        "1             4            x x    3-4",
        "padding       5                x  5",
    ]


def test_text_of_a_row_that_is_padded_on_the_left():
    assert mask_text(left(), row=1).splitlines() == [
        "document  query  key 0 1 2 3  sees",
        "padding       0      x        0",
        "padding       1      x x      0-1",
        "0             2          x    2",
        "0             3          x x  2-3",
    ]


def test_text_of_a_shared_prefix():
    assert mask_text(shared(2, 2)).splitlines() == [
        "document       query  key 0 1 2 3 4 5 6  sees",
        "shared prefix      0      x              0",
        "shared prefix      1      x x            0-1",
        "shared prefix      2      x x x          0-2",
        "row 0              3      x x x x        0-3",
        "row 0              4      x x x x x      0-4",
        "row 1              5      x x x     x    0-2, 5",
        "row 1              6      x x x     x x  0-2, 5-6",
    ]


def test_text_with_a_window_and_keys_of_two_digits():
    lines = mask_text(minift.flatten([document(*range(1, 12))]), window=3).splitlines()
    assert lines[0] == "document  query  key  0  1  2  3  4  5  6  7  8  9 10  sees"
    assert lines[2] == "0             1       x  x                             0-1"
    assert lines[11] == "0            10                               x  x  x  8-10"


def test_the_lessons_pictures_are_what_is_printed():
    from minift.study import mask

    two = share_prefix(minift.collate([document(1, 2, 3, 4), document(1, 2, 5, trained=0)], pad_id=0), least=1)
    for line in mask_text(packed()).splitlines() + mask_text(two).splitlines():
        assert line.rstrip() in (mask.__doc__ or "")


def test_what_has_no_text_is_refused():
    long = minift.flatten([document(*range(1, TEXT_LIMIT + 2))])
    with pytest.raises(ValueError, match=r"row of 65 tokens .*at most 64.* mask_picture"):
        mask_text(long)
    for row in (-1, 2):
        with pytest.raises(ValueError, match=f"no row {row}: the batch has rows 0 to 1"):
            mask_text(left(), row)


# --- against attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 100])
@pytest.mark.parametrize("sizes", [(2, 2), (5, 1, 3), (1, 4), (6, 2)])
def test_a_shared_prefix_is_what_attention_computes(sizes: tuple[int, ...], window: int | None):
    """Equal scores and one-hot values: the output says which keys took part."""
    batch = shared(*sizes)
    s = batch.input_ids_bs.shape[1]
    q = torch.zeros(1, 1, s, s)
    layout = SharedPrefix(3, sizes)
    out = after_prefix(eager, layout, layout.slots(q.device), window, q, q, torch.eye(s)[None, None])
    assert torch.equal(mask_of(batch, window)[0], out[0, 0] > 0)


@pytest.mark.parametrize("make", [packed, left, lambda: shared(2, 4, 1)])
def test_what_a_model_reads(tiny: Path, make):
    """Another token at a place changes the outputs of those queries that see it, and no others."""
    model, batch = minift.load_model(tiny, attention="eager"), make()
    layout = SharedPrefix(*batch.shared_prefix) if batch.shared_prefix else None

    @torch.no_grad()
    def hidden(ids_bs: Tensor) -> Tensor:
        documents = None if layout else batch.documents_bs
        return model.hidden(ids_bs, batch.positions_bs, documents, shared_prefix=layout)

    before, seen = hidden(batch.input_ids_bs), mask_of(batch)
    for row in range(len(seen)):
        for key in range(seen.shape[2]):
            ids = batch.input_ids_bs.clone()
            ids[row, key] += 50
            changed = (hidden(ids) != before).any(-1)
            assert torch.equal(changed[row], seen[row, :, key])
            changed[row] = False
            assert not changed.any()


# --- the picture ------------------------------------------------------------------------------------------------------


def pixels(png: bytes) -> np.ndarray:
    """[height, width, 3], 0 to 255."""
    return (imread(io.BytesIO(png))[:, :, :3] * 255).round().astype(int)


def is_color(image: np.ndarray, color: str) -> np.ndarray:
    return np.all(np.abs(image - np.array(to_rgb(color)) * 255) <= 1, axis=-1)


def frames(image: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Left, right, top and bottom of the black squares: where more than a third of the height is black, at both."""
    black = np.all(image < 60, axis=-1)
    columns = np.flatnonzero(black.sum(0) > image.shape[0] / 3)
    edges = columns[np.insert(np.diff(columns) > 2, 0, True)]
    found = []
    for first, last in edges.reshape(-1, 2):
        rows = np.flatnonzero(black[:, first : last + 1].mean(1) > 0.9)
        found.append((int(first), int(last), int(rows[0]), int(rows[-1])))
    return found


@pytest.mark.parametrize("make", [packed, left, lambda: shared(2, 4, 1)])
def test_every_cell_has_its_colour(make):
    batch = make()
    image, seen = pixels(mask_picture(batch).png), mask_of(batch)
    squares = frames(image)
    assert len(squares) == len(seen)
    s = seen.shape[1]
    for (first, last, top, bottom), mask_st, documents in zip(squares, seen, batch.documents_bs.tolist(), strict=True):
        for query in range(s):
            y = round(top + (query + 0.5) * (bottom - top) / s)
            for key in range(s):
                x = round(first + (key + 0.5) * (last - first) / s)
                color = (LIGHT if documents[query] < 0 else BLUE) if mask_st[query, key] else "#FFFFFF"
                assert is_color(image[y, x], color), (query, key)


def test_lines_whose_next_token_is_trained_are_marked():
    batch = packed()  # the third token of the first document and the second of the other are trained
    image = pixels(mask_picture(batch).png)
    ((_, last, top, bottom),) = frames(image)
    marked = is_color(image[:, last + 3 :], ORANGE)[top:bottom].any(1)
    found = {int(y * 6 / (bottom - top)) for y in np.flatnonzero(marked)}
    assert found == {1, 3}


def test_a_notebook_shows_it_and_a_file_holds_it(tmp_path: Path):
    picture = mask_picture(packed())
    picture.save(tmp_path / "new" / "mask.png")
    assert picture._repr_png_() == (tmp_path / "new" / "mask.png").read_bytes()
    assert picture.png.startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mask.png"]


def test_only_so_many_rows_are_drawn():
    batch = minift.collate([document(1, 2, 3)] * 6, pad_id=0)
    assert len(frames(pixels(mask_picture(batch).png))) == 4
    assert len(frames(pixels(mask_picture(batch, rows=2).png))) == 2
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        mask_picture(batch, rows=0)


def test_a_picture_of_long_rows_and_many_documents():
    batch = minift.flatten([document(1, 2, 3, 4, 5)] * 40)
    image = pixels(mask_picture(batch).png)
    ((first, last, top, bottom),) = frames(image)
    share = is_color(image[top : bottom + 1, first : last + 1], BLUE).mean()
    # 15 of 25 cells of each of 40 documents. The square's frame, some 2 pixels of 590 at each side, is no cell.
    assert share == pytest.approx(40 * 15 / 200**2, rel=0.02)
