"""What is shown is what runs."""

import textwrap

import pytest

from minift.numerics.floats import bits
from minift.study.source import show


class Toy:
    def double(self, x: int) -> int:
        """Twice."""
        # kept
        return 2 * x


def test_the_code_shown_does_what_the_function_does():
    space: dict = {}
    exec(show(Toy.double).code, space)
    assert space["double"](None, 21) == 42


def test_comments_stay_and_the_docstring_goes():
    shown = show(Toy.double)
    assert "# kept" in shown.code and "Twice" not in shown.code and "Twice" in show(Toy.double, docstring=True).code
    assert shown.code == textwrap.dedent("""\
        def double(self, x: int) -> int:
            # kept
            return 2 * x
        """)


def test_a_notebook_sees_where_it_lives():
    shown = show(bits)
    assert shown.place == "minift/numerics/floats.py, bits"
    assert shown._repr_markdown_().startswith("`minift/numerics/floats.py, bits`\n\n```python\n")
    assert str(shown) == shown.code and repr(shown).startswith("# minift/numerics/floats.py")


def test_a_builtin_has_no_source_here():
    with pytest.raises(TypeError):
        show(len)
