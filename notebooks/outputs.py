"""What a notebook shows: run it, make its outputs the same on every run, compare them with those that are stored.

Text is compared word by word, numbers within 2 % (two machines add in different orders), pictures by the brightness of
small squares (two versions of matplotlib place a letter differently). A cell with the tag `varies` shows what belongs
to one machine: only what kind of output it has is compared.
"""

import base64
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
SECONDS = 900  # for one cell, on a machine that has other work, too
NUMBER = re.compile(r"[-+]?\d+(?:[\d,]*\d)?(?:\.\d+)?(?:e[-+]?\d+)?")
CLOSE, TINY = 0.02, 2e-3  # relative; absolute, for what is zero but for rounding
SQUARE, UNLIKE = 8, 40  # pixels; brightness of 255


def studies() -> list[Path]:
    """The study notebooks in reading order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))


def stored(path: Path) -> NotebookNode:
    """A notebook as it is committed."""
    return nbformat.read(path, as_version=4)


def run(path: Path) -> NotebookNode:
    """Run all cells in a kernel of their own and an empty folder; returns the notebook with normalised outputs.

    Raises:
        CellExecutionError: a cell fails that does not have the tag `raises-exception`.
        ValueError: an output tells about this machine.
    """
    notebook = stored(path)
    with tempfile.TemporaryDirectory() as folder:
        # The kernel has no colours in its errors and no display.
        os.environ.update(MPLBACKEND="agg", NO_COLOR="1", PYTHON_COLORS="0")
        place = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=place).execute()
        return normalised(notebook, path, (folder, str(Path.home()), str(FOLDER.parent)))


def normalised(notebook: NotebookNode, path: Path, private: tuple[str, ...]) -> NotebookNode:
    """Leave out what differs from run to run or says who ran it."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    count = 0
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = [_plain(output) for output in cell.outputs if not _is_noise(output)]
        cell.outputs = _joined(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            shown = str(output)
            for place in private:
                if len(place) > 2 and place in shown:
                    raise ValueError(f"{path.name}, cell {cell.id}: an output holds a path of this machine ({place})")
    return notebook


def _is_noise(output: NotebookNode) -> bool:
    """Progress bars and warnings of libraries."""
    return output.output_type == "stream" and output.name == "stderr"


def _plain(output: NotebookNode) -> NotebookNode:
    if output.output_type == "error":
        output.traceback = [f"{output.ename}: {output.evalue}"]
    if "image/png" in output.get("data", {}):
        output.data = {"image/png": output.data["image/png"], "text/plain": "a picture"}
    return output


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The kernel cuts what a cell prints into pieces as it pleases."""
    found: list[NotebookNode] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def write(notebook: NotebookNode, path: Path) -> None:
    """Store a notebook, whole or not at all."""
    place = path.with_suffix(".ipynb.new")
    place.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    os.replace(place, path)


def differences(old: NotebookNode, new: NotebookNode) -> list[str]:
    """What no longer comes out as it is stored, a sentence each."""
    found = []
    for before, after in zip(old.cells, new.cells, strict=True):
        if before.cell_type != "code":
            continue
        kinds = [_kinds(cell.outputs) for cell in (before, after)]
        if kinds[0] != kinds[1]:
            found.append(f"cell {before.id} shows {kinds[1]}, stored is {kinds[0]}")
        elif "varies" not in before.metadata.get("tags", ()):
            for one, other in zip(before.outputs, after.outputs, strict=True):
                found += [f"cell {before.id}: {reason}" for reason in _unlike(one, other)]
    return found


def _kinds(outputs: list[NotebookNode]) -> list[str]:
    return [" ".join(sorted(output.get("data", {output.output_type: ""}))) for output in outputs]


def _unlike(one: NotebookNode, other: NotebookNode) -> list[str]:
    reasons = []
    for kind, text in _parts(one).items():
        fresh = _parts(other)[kind]
        if kind == "image/png":
            if reason := pictures_differ(base64.b64decode(text), base64.b64decode(fresh)):
                reasons.append(reason)
        elif not same_text(text, fresh):
            reasons.append(f"stored {_first_difference(text, fresh)}")
    return reasons


def _parts(output: NotebookNode) -> dict[str, str]:
    if output.output_type == "error":
        return {"error": output.traceback[0]}
    return {"text": output.text} if output.output_type == "stream" else dict(output.data)


def same_text(one: str, other: str) -> bool:
    """The same words, and numbers that are close."""
    if NUMBER.split(one) != NUMBER.split(other):
        return False
    pairs = zip(*(_numbers(text) for text in (one, other)), strict=True)
    return all(abs(a - b) <= TINY + CLOSE * abs(a) if a != int(a) or b != int(b) else a == b for a, b in pairs)


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def _first_difference(one: str, other: str) -> str:
    for before, after in zip(one.splitlines(), other.splitlines(), strict=False):
        if not same_text(before, after):
            return f"{before[:80]!r}, now {after[:80]!r}"
    return f"{len(one.splitlines())} lines, now {len(other.splitlines())}"


def pictures_differ(one: bytes, other: bytes) -> str | None:
    """Why two PNG files are not the same picture, or None."""
    before, after = (_squares(png) for png in (one, other))
    if before.shape != after.shape:
        return f"a picture of another size: {before.shape} squares, now {after.shape}"
    worst = float(np.abs(before - after).max())
    return f"another picture: a square of {SQUARE} pixels differs by {worst:.0f} of 255" if worst > UNLIKE else None


def _squares(png: bytes) -> np.ndarray:
    """Mean brightness and colour of squares of pixels."""
    from matplotlib.image import imread

    pixels: Any = imread(io.BytesIO(png), format="png")[..., :3] * 255
    height, width = (size // SQUARE for size in pixels.shape[:2])
    return pixels[: height * SQUARE, : width * SQUARE].reshape(height, SQUARE, width, SQUARE, 3).mean((1, 3))
