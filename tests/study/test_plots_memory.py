"""The book's figures of memory as squares: as many as there are in the figures, and as many as are needed."""

import math
from io import BytesIO

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from pictures import texts

from minift.adapters.lora import LoraConfig
from minift.quant.config import QuantConfig
from minift.study.book_memory import (
    EAGER,
    FIGURES,
    PARAMETERS,
    activation_bytes,
    corrected_figure,
    ram_figure,
    stack_bytes,
)
from minift.study.book_tables import OPT_350M
from minift.study.memory import module_table
from minift.study.plots.memory import ram_squares
from minift.study.setting import Setting, build


def sizes(name: str) -> dict[str, float]:
    """Squares of the corrected figure by part."""
    return {part.name: part.squares for part in corrected_figure(name)}


# --- what is put right ------------------------------------------------------------------------------------------------


def test_quantized_weights_come_with_their_scales():
    """As a real matrix of 1024 x 1024 has them."""
    for format, name, drawn in (("nf4", "weights NF4", 9), ("int8", "weights INT8", 18)):
        rows = module_table(build(Setting(OPT_350M, quantize=QuantConfig(format), lora=LoraConfig())))
        (layer,) = [row for row in rows if row.path.endswith("layers.0.self_attn.v_proj.base")]
        codes = 1024 * 1024 * (0.5 if format == "nf4" else 1)
        # Besides scales, state has a table of the 16 and 256 codes and the mean of the scales: 1 kB of a matrix.
        assert sizes("no_lora")[name] / drawn == pytest.approx((codes + layer.state_bytes) / codes, rel=2.5e-3)
    assert sizes("8bit_adam")["mean INT8"] == sizes("8bit_adam")["variance INT8"] == 18 * (1 + 4 / 256)
    assert sizes("no_lora")["mean FP32"] == 72


def test_adapters_are_fp32_and_so_are_their_gradients():
    assert sizes("lora") == {"weights INT8": 18 * (1 + 4 / 1024), "adapters FP32": 2, "gradients FP32": 2,
                             "mean FP32": 2, "variance FP32": 2}  # fmt: skip


@pytest.mark.parametrize(("name", "tokens"), [("lora_s", 1024), ("lora_short_s", 256)])
def test_activations_are_those_of_the_formula_put_right(name: str, tokens: int):
    """A model of 360 M parameters, 1024 wide, has so many layers."""
    layers = PARAMETERS / (12 * 1024**2)
    for eager in (True, False):
        found = stack_bytes(corrected_figure(name), eager=eager) - stack_bytes(corrected_figure("lora"))
        expected = activation_bytes(layers, 1024, 16, 50272, tokens, eager=eager)  # pyright: ignore[reportArgumentType]
        assert found == pytest.approx(expected, rel=1e-12)
    assert sizes(name)["activations FP16"] == pytest.approx(51 * tokens / 1024)
    assert sizes(name)[EAGER] == pytest.approx(192 * (tokens / 1024) ** 2)


def test_an_unknown_figure_is_refused():
    for function in (corrected_figure, ram_squares):
        with pytest.raises(ValueError, match="unknown figure 'gpu': choose one of no_lora"):
            function("gpu")


# --- the pictures -----------------------------------------------------------------------------------------------------

SUMS = {
    "no_lora": "NF4 5,220 MB, INT8 5,400 MB, FP16 5,760 MB", "8bit_adam": "NF4 3,060 MB, INT8 3,240 MB, FP16 3,600 MB",
    "lora": "500 MB", "lora_s": "fused attention 2,660 MB, eager 8,420 MB",
    "lora_short_s": "fused attention 1,040 MB, eager 1,400 MB",
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_the_squares_of_a_figure(name: str, figures: list[Figure]):
    picture = ram_squares(name)
    height, width, _ = matplotlib.image.imread(BytesIO(picture.png)).shape
    assert width == 1200 and height < 1600
    (figure,) = figures
    stacks = [ram_figure(name)] + ([] if name in ("no_lora", "8bit_adam") else [corrected_figure(name)])
    assert len(figure.axes) == len(stacks)
    for axes, parts in zip(figure.axes, stacks, strict=True):
        drawn = [patch.get_width() * patch.get_height() for patch in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
        assert sum(drawn) == pytest.approx(sum(part.squares for part in parts))
        assert len(drawn) == sum(math.ceil(part.squares - 1e-9) for part in parts)
        left = max(patch.get_x() + patch.get_width() for patch in axes.patches)  # pyright: ignore[reportAttributeAccessIssue]
        assert left <= axes.get_xlim()[1]
    written = texts(figure)
    assert f"as in the book: {SUMS[name]}" in written and "1 square = 20 MB" in written
    assert ("put right" in written) == (len(stacks) == 2)
    assert ("weights NF4 9.29" in written) == ("only FP16 can be trained" in written) == (len(stacks) == 1)


def test_no_two_squares_lie_on_each_other(figures: list[Figure]):
    ram_squares("lora_s")
    for axes in figures[0].axes:
        corners = {(round(p.get_x(), 3), round(p.get_y(), 3)) for p in axes.patches}  # pyright: ignore[reportAttributeAccessIssue]
        assert len(corners) == len(axes.patches)


def test_words_do_not_lie_on_each_other(figures: list[Figure]):
    for name in FIGURES:
        ram_squares(name)
    for figure in figures:
        figure.canvas.draw()
        for axes in figure.axes:
            boxes = [text.get_window_extent() for text in axes.texts]
            assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
