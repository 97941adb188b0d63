"""Counted tokens are told apart with colour and without."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from poft_plugin.data.render import Rendered
from poft_plugin.report.tokens import marked


@st.composite
def rendered(draw: st.DrawFn) -> Rendered:
    """A text cut into tokens, some of which count."""
    pieces = draw(st.lists(st.text("ab \n\t[]", min_size=1, max_size=4), min_size=1, max_size=8))
    counted = draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    offsets = tuple(zip([0, *ends[:-1]], ends, strict=True))
    return Rendered(tuple(range(len(pieces))), tuple(counted), "".join(pieces), offsets)


@given(rendered())
def test_marks_and_colours_say_the_same(row: Rendered) -> None:
    plain, coloured = marked(row, in_colour=False), marked(row, in_colour=True)
    assert plain.plain.count("«") == plain.plain.count("»") == row.num_counted
    assert plain.plain.replace("«", "").replace("»", "") == coloured.plain
    assert coloured.plain.replace("⏎", "").replace("⇥", "\t") == row.text
    green = sum("green" in str(span.style) for span in coloured.spans)
    assert green == row.num_counted
    assert not plain.spans


def test_by_hand() -> None:
    row = Rendered((1, 2, 3), (False, True, True), "hi\nho", ((0, 2), (2, 3), (3, 5)))
    assert marked(row, in_colour=False).plain == "hi«⏎\n»«ho»"
