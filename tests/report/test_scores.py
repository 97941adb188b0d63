"""What the references say of the data: numbers, warnings, the table."""

import io
from itertools import pairwise

import numpy as np
import pytest

from poft_plugin.report.console import make_console
from poft_plugin.report.scores import LOW_CORRELATION, LOW_MEAN, Distribution, Summary, print_summary, summarise

SOURCES = np.array(["a", "b", "a", "a", "b"], dtype=object)
FIRST = np.array([-1.0, -5.0, -2.0, -3.0, -7.0])
SECOND = np.array([-1.5, -0.5, -2.5, -3.5, -0.25])


def printed(summary: Summary, width: int = 120) -> str:
    """The table as text."""
    console = make_console(io.StringIO(), width)
    print_summary(summary, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def one(mean: float = -1.0, reference: str = "zephyr", source: str = "data") -> Distribution:
    """A distribution around a mean."""
    return Distribution(reference, source, 1234, mean, (mean - 1, mean, mean + 1))


def test_distributions_by_hand() -> None:
    """Quantiles by linear interpolation: of -3, -2, -1 the 5 % one lies 5 % of two steps above the lowest."""
    lines = summarise(["x", "y"], np.stack([FIRST, SECOND]), SOURCES).distributions
    assert [(line.reference, line.source, line.rows) for line in lines] == [
        ("x", "a", 3), ("x", "b", 2), ("y", "a", 3), ("y", "b", 2)
    ]  # fmt: skip
    assert [line.mean for line in lines] == pytest.approx([-2, -6, -2.5, -0.375])
    assert lines[0].quantiles == pytest.approx((-3 + 0.05 * 2, -2, -3 + 0.95 * 2))
    assert lines[1].quantiles == pytest.approx((-7 + 0.05 * 2, -6, -7 + 0.95 * 2))


def test_correlations_are_of_ranks_and_over_all_rows() -> None:
    """`1 - 6 * sum d^2 / (n * (n^2 - 1))` without ties: ranks 5 2 4 3 1 and 3 4 2 1 5."""
    correlations = summarise(["x", "y", "z"], np.stack([FIRST, SECOND, FIRST**3]), SOURCES).correlations
    squares = (5 - 3) ** 2 + (2 - 4) ** 2 + (4 - 2) ** 2 + (3 - 1) ** 2 + (1 - 5) ** 2
    assert list(correlations) == [("x", "y"), ("x", "z"), ("y", "z")]
    assert correlations["x", "y"] == pytest.approx(1 - 6 * squares / (5 * (5**2 - 1)))
    assert correlations["x", "z"] == pytest.approx(1)


def test_too_few_rows_have_no_correlation_and_equal_rewards_none_worth_the_name() -> None:
    assert summarise(["x", "y"], np.stack([FIRST, SECOND])[:, :2], SOURCES[:2]).correlations == {}
    flat = np.full(5, -1.0)
    correlations = summarise(["x", "y", "z"], np.stack([flat, SECOND, flat]), SOURCES).correlations
    assert correlations == {("x", "y"): 0.0, ("x", "z"): 0.0, ("y", "z"): 0.0}


def test_statistics_are_flat_numbers() -> None:
    summary = Summary((one(-2.0),), {("zephyr", "yi"): 0.5})
    assert summary.statistics() == {
        "poft/reference/zephyr/data/mean": -2.0,
        "poft/reference/zephyr/data/q05": -3.0,
        "poft/reference/zephyr/data/q50": -2.0,
        "poft/reference/zephyr/data/q95": -1.0,
        "poft/reference_correlation/zephyr/yi": 0.5,
    }


def test_nothing_to_warn_of() -> None:
    assert Summary((one(LOW_MEAN),), {("zephyr", "yi"): LOW_CORRELATION}).warnings() == []


def test_warnings_name_what_looks_wrong_and_what_to_do() -> None:
    low, apart = LOW_MEAN - 0.01, LOW_CORRELATION - 0.01
    found = Summary((one(), one(low, source="other")), {("zephyr", "yi"): apart}).warnings()
    assert len(found) == 2
    assert f"'zephyr' gives other {low:.2f} nats per token" in found[0]
    assert f"'zephyr' and 'yi' hardly agree on the rows (rank correlation {apart:.2f})" in found[1]
    assert all("chat template" in warning and "`axolotl poft score CONFIG --show 3`" in warning for warning in found)


def test_the_table_has_a_line_per_reference_and_data_set() -> None:
    text = printed(Summary((one(-1.25), one(-9.0, source="other")), {("zephyr", "yi"): 0.875}))
    lines = [line.split() for line in text.splitlines()]
    cells = [[cell for cell in line if cell not in "│┃"] for line in lines]
    assert ["zephyr", "data", "1,234", "-1.250", "-2.250", "-1.250", "-0.250"] in cells
    assert ["zephyr", "other", "1,234", "-9.000", "-10.000", "-9.000", "-8.000"] in cells
    order = ["nats per token", "-1.250", "rank correlation of zephyr and yi: 0.875", "warning: reference 'zephyr'"]
    assert all(text.index(earlier) < text.index(later) for earlier, later in pairwise(order))


def test_names_in_brackets_are_text_not_markup() -> None:
    summary = Summary((one(-9.0, "chat[v2]", "hub/data [train]"),), {("chat[v2]", "[/x]"): 0.0})
    text = printed(summary)
    assert text.count("chat[v2]") == 4
    assert text.count("hub/data [train]") == 2
    assert "and '[/x]' hardly" in text
