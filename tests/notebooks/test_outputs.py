"""The comparison of outputs sees what has changed, and nothing else."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minift.study.picture import Picture, new_figure
from notebooks import outputs
from notebooks.outputs import differences, pictures_differ, run, same_text, write


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("loss 1.2345", "loss 1.2351", True),
        ("loss 1.2345", "loss 1.3345", False),
        ("loss 1.2345", "lass 1.2345", False),
        ("12 rows", "12 rows", True),
        ("12 rows", "13 rows", False),
        ("1,024 bytes", "1,024 bytes", True),
        ("1,024 bytes", "1,025 bytes", False),
        ("0.0000", "0.0001", True),
        ("-3.0", "3.0", False),
        ("1.5e-05", "1.5e-05", True),
        ("a 1", "a", False),
        ("", "", True),
    ],
)
def test_text_is_the_same_when_its_words_are_and_its_numbers_nearly(one: str, other: str, same: bool):
    assert same_text(one, other) is same


def bars(heights: list[float], title: str = "a title") -> bytes:
    figure = new_figure(6, 3)
    axes = figure.subplots()
    axes.bar(range(len(heights)), heights)
    axes.set_title(title)
    return Picture.of(figure).png


def test_a_picture_is_the_same_when_drawn_again_and_not_when_a_bar_is_another():
    assert pictures_differ(bars([1, 2, 3]), bars([1, 2, 3])) is None
    assert "another picture" in (pictures_differ(bars([1, 2, 3]), bars([1, 2.5, 3])) or "")
    taller = Picture.of(new_figure(6, 4)).png
    assert "size" in (pictures_differ(bars([1]), taller) or "")


def cell(source: str, **kwargs: object) -> NotebookNode:
    return new_code_cell(source, id="one", **kwargs)


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    path = tmp_path / "00_test.ipynb"
    made = new_notebook(cells=[new_markdown_cell("# 00", id="title"), cell("x = 3\nprint('x is', x)\nx + 0.5")])
    nbformat.write(made, path)
    return path


@pytest.mark.notebooks
def test_a_notebook_is_run_kept_and_compared(notebook: Path):
    done = run(notebook)
    assert [output.output_type for output in done.cells[1].outputs] == ["stream", "execute_result"]
    assert "x is 3" in done.cells[1].outputs[0].text and done.cells[1].execution_count == 1
    write(done, notebook)
    first = notebook.read_bytes()
    write(run(notebook), notebook)
    assert notebook.read_bytes() == first and [path.name for path in notebook.parent.iterdir()] == [notebook.name]
    kept = outputs.stored(notebook)
    assert differences(kept, run(notebook)) == []
    kept.cells[1].outputs[1].data["text/plain"] = "4.5"
    (found,) = differences(kept, run(notebook))
    assert "stored '4.5', now '3.5'" in found


@pytest.mark.notebooks
def test_a_place_of_this_machine_is_refused(notebook: Path):
    made = outputs.stored(notebook)
    made.cells[1].source = "import os\nprint(os.getcwd())"
    nbformat.write(made, notebook)
    with pytest.raises(ValueError, match="a path of this machine"):
        run(notebook)


def test_what_varies_is_not_compared_but_must_still_be_there():
    def made(text: str | None, tags: list[str]) -> NotebookNode:
        shown = [] if text is None else [new_output("stream", text=text)]
        return new_notebook(cells=[cell("f()", outputs=shown, metadata={"tags": tags})])

    assert differences(made("took 3 s", ["varies"]), made("took 9 s", ["varies"])) == []
    assert len(differences(made("took 3 s", []), made("took 9 s", []))) == 1
    assert len(differences(made("took 3 s", ["varies"]), made(None, ["varies"]))) == 1


def test_squares_of_a_picture_are_means():
    image = outputs._squares(bars([1.0, 2.0]))
    assert image.ndim == 3 and image.shape[-1] == 3 and image.min() >= 0 and image.max() <= 255
    assert np.ptp(image) > 50
