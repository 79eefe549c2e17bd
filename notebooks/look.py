"""Look at the notebooks as a reader does.

    python -m notebooks.look pages DIRECTORY [NUMBER ...]     screenshots, and what sticks out of a page
    python -m notebooks.look sheet                            the README's picture: the first one of each notebook

Each is exported to HTML and opened in a real browser without a window, on a desktop's width and a phone's, light and
dark. What sticks out of the page is listed; the screenshots are for eyes. It needs `nbconvert` (which `jupyterlab`
brings), `playwright` and Chromium; with `jupyter-server-mathjax`, formulas are set without a network, too.
"""

import base64
import importlib.util
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from minift.study.picture import Picture, new_figure
from notebooks.outputs import FOLDER, stored, studies

WIDTHS = {"desktop": 1280, "phone": 400}
SHEET = FOLDER / "contact_sheet.png"
COLUMNS = 4
# Elements that end right of the page, unless something around them scrolls.
STICKING_OUT = """() => {
  const scrolls = e => e && e !== document.body &&
    (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  return [...document.querySelectorAll("main *")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e))
    .map(e => e.tagName + " " + Math.round(e.getBoundingClientRect().right) + " " + (e.textContent || "").slice(0, 60));
}"""


def export(path: Path, theme: str) -> str:
    """A notebook as one HTML page."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="lab", theme=theme, embed_images=True)
    found = importlib.util.find_spec("jupyter_server_mathjax")
    if found is not None and found.origin is not None:
        mathjax = Path(found.origin).parent / "static" / "MathJax.js"
        exporter.mathjax_url = f"{mathjax.as_uri()}?config=TeX-AMS-MML_HTMLorMML-full,Safe"
    page, _ = exporter.from_notebook_node(stored(path))
    return page


def look(path: Path, directory: Path, browser: Any) -> Iterator[str]:
    """Write the pages and screenshots of one notebook; yields what sticks out of them."""
    for theme in ("light", "dark"):
        page_file = directory / f"{path.stem}_{theme}.html"
        page_file.write_text(export(path, theme), encoding="utf-8")
        for name, width in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
            page.goto(page_file.resolve().as_uri())
            page.wait_for_timeout(1500)  # milliseconds, for the formulas
            for element in page.evaluate(STICKING_OUT)[:3]:
                yield f"{path.stem}, {theme}, {width} px: {element}"
            page.screenshot(path=directory / f"{path.stem}_{theme}_{name}.png", full_page=True)
            page.close()


def contact_sheet() -> Picture:
    """The first picture of each notebook that has one, small."""
    from matplotlib.image import imread

    shown = []
    for path in studies():
        outputs = [output for cell in stored(path).cells if cell.cell_type == "code" for output in cell.outputs]
        pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
        if pictures:
            shown.append((path.stem, imread(io.BytesIO(base64.b64decode(pictures[0])), format="png")))
    rows = -(-len(shown) // COLUMNS)
    figure = new_figure(COLUMNS * 2.6, rows * 1.9)
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for place, (name, image) in zip(axes, shown, strict=False):
        place.imshow(image, interpolation="antialiased")
        place.set_title(name.replace("_", " "), fontsize=8)
    for place in axes:
        place.set_axis_off()
    return Picture.of(figure)


@click.group(help="Look at the notebooks as a reader does.")
def main() -> None:
    pass


@main.command(help="Write the first picture of each notebook into one.")
def sheet() -> None:
    click.echo(f"Wrote {contact_sheet().save(SHEET).name}")


@main.command(help="Open the notebooks in a browser, write screenshots, list what sticks out.")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.argument("numbers", nargs=-1)
def pages(directory: Path, numbers: tuple[str, ...]) -> None:
    from playwright.sync_api import sync_playwright

    directory.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--allow-file-access-from-files"])
        for path in studies():
            if not numbers or path.name.startswith(numbers):
                found = list(look(path, directory, browser))
                click.echo("\n  ".join([f"{path.stem}: {len(found)} elements stick out", *found]))
        browser.close()


if __name__ == "__main__":
    main()
