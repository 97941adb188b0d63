"""What grading found: numbers per group, tokens, the tables."""

import io
import json
from typing import Any

import numpy as np
import pytest

from poft_plugin.data.discrepancy import GradedSample, count_tokens
from poft_plugin.report.console import make_console
from poft_plugin.report.grading import GradingSummary, TopTokens, print_grading, summarise_grading, top_tokens

LEVELS = np.array(list("ABCAB"))
SCORES = np.array([3.0, 2.0, 1.0, 30.0, 10.0])
GROUPS = ["base", "base", "base", "online[v2]", "online[v2]"]
DISAGREE = np.array([True, False, False, True, True])
SETTINGS: dict[str, Any] = {"top_percent": 3.73, "bottom_percent": 12.5, "grade_within": "dataset"}
COUNTS = count_tokens(
    [
        GradedSample("B", [[0, 1], [2], [1], [1, 1]], [4.0, 3.9, 2.0, 0.0]),
        GradedSample("A", [[0], [1], [2]], [1, 1, 1]),
    ],
    vocab_size=4,
)


def summary(**changes: Any) -> GradingSummary:
    """Of the five samples."""
    return summarise_grading(LEVELS, SCORES, GROUPS, **(SETTINGS | {"disagree": DISAGREE} | changes))


def printed(found: GradingSummary) -> str:
    """The tables as text."""
    console = make_console(io.StringIO(), 160)
    print_grading(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(text: str) -> list[list[str]]:
    """Cells of each line."""
    return [[cell.strip() for cell in line.strip(" │┃").replace("┃", "│").split("│")] for line in text.splitlines()]


def test_groups_by_hand() -> None:
    """Quantiles by linear interpolation: 5 % of two steps above the lowest of three."""
    base, online = summary().groups
    assert (base.group, base.rows, base.level_a, base.level_b, base.level_c) == ("base", 3, 1, 1, 1)
    assert (online.group, online.rows, online.level_a, online.level_b, online.level_c) == ("online[v2]", 2, 1, 1, 0)
    assert base.quantiles == pytest.approx((1 + 0.05 * 2, 2, 1 + 0.95 * 2))
    assert online.quantiles == pytest.approx((10 + 0.05 * 20, 20, 10 + 0.95 * 20))
    assert (base.label_disagreement, online.label_disagreement) == (pytest.approx(1 / 3), 1.0)
    assert summary().label_disagreement == pytest.approx(3 / 5)
    assert base.level_a_lost == online.level_a_lost == 0


def test_disagreement_is_none_where_nothing_was_compared() -> None:
    assert summary(disagree=None).label_disagreement is None
    some = summary(disagree=np.array([np.nan, np.nan, np.nan, 0.0, np.nan]))
    assert [line.label_disagreement for line in some.groups] == [None, 0.0]
    assert some.label_disagreement == 0.0


def test_groups_keep_their_order_and_labels_become_text() -> None:
    found = summarise_grading(LEVELS, SCORES, np.array([7, 2, 7, 2, 2]), **SETTINGS)
    assert [(line.group, line.rows) for line in found.groups] == [("7", 2), ("2", 3)]
    nothing = summarise_grading(LEVELS[:0], SCORES[:0], [], **SETTINGS)
    assert nothing.groups == ()
    assert nothing.statistics()["deft/level_a_rows"] == 0


def test_top_tokens_are_the_ends_and_ties_go_by_id() -> None:
    entries = np.array([0.25, -0.5, 0.0, 0.5, -0.125, 0.25, -0.375])
    texts = [f"t{number}" for number in range(7)]
    assert top_tokens(entries, texts.__getitem__) == TopTokens(
        (("t3", 0.5), ("t0", 0.25), ("t5", 0.25)), (("t1", -0.5), ("t6", -0.375), ("t4", -0.125))
    )
    assert top_tokens(entries, texts.__getitem__, count=2).positive == (("t3", 0.5), ("t0", 0.25))
    assert top_tokens(np.zeros(3), texts.__getitem__) == TopTokens()
    many = top_tokens(np.arange(-20.0, 21.0), str)
    assert [len(side) for side in many] == [10, 10]


def test_count_numbers() -> None:
    """At level B, 3.9 of 4 counts as good and 2 as neither; the equal scores leave one out."""
    counts = summary(counts=COUNTS).counts
    assert counts is not None
    assert (counts.samples, counts.responses_positive, counts.responses_negative) == (2, 3, 2)
    assert (counts.tokens_positive, counts.tokens_negative) == (2 + 1 + 1, 2 + 1)
    assert (counts.middle_uncounted, counts.middle_contradictory) == (1, 1)
    assert summary().counts is None


def test_statistics_are_flat_numbers() -> None:
    assert summary().statistics() == {
        "deft/level_a_rows": 2.0,
        "deft/level_b_rows": 2.0,
        "deft/level_c_rows": 1.0,
        "deft/label_disagreement": pytest.approx(3 / 5),
        "deft/base/level_a_rows": 1.0,
        "deft/online[v2]/level_a_rows": 1.0,
    }
    assert "deft/label_disagreement" not in summary(disagree=None).statistics()
    assert all(type(value) is float for value in summary().statistics().values())


def test_rows_lost_are_filled_in_later() -> None:
    first = summary()
    later = first.with_level_a_lost({"base": 3})
    assert [line.level_a_lost for line in later.groups] == [3, 0]
    assert later.with_level_a_lost({"base": 0}) == first


def test_as_json_is_plain() -> None:
    tokens = top_tokens(COUNTS.discrepancy(), " abc".__getitem__)
    found = summary(counts=COUNTS, tokens=tokens, disagree=None).with_level_a_lost({"base": 1}).as_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["top_percent"], found["bottom_percent"], found["grade_within"]) == (3.73, 12.5, "dataset")
    assert found["groups"][0] == {
        "group": "base", "rows": 3, "level_a": 1, "level_b": 1, "level_c": 1, "label_disagreement": None,
        "level_a_lost": 1, "quantiles": pytest.approx([1.1, 2.0, 2.9]),
    }  # fmt: skip
    assert found["counts"]["tokens_positive"] == 4
    (good,), (first, second) = found["tokens"]["positive"], found["tokens"]["negative"]
    assert good == [" ", 2 / 4]
    assert first == ["a", pytest.approx(1 / 4 - 2 / 3)]
    assert second == ["b", pytest.approx(1 / 4 - 1 / 3)]
    assert summary().as_json()["tokens"] == {"positive": [], "negative": []}
    assert summary().as_json()["counts"] is None


def test_the_tables() -> None:
    tokens = top_tokens(COUNTS.discrepancy(), "\nabc".__getitem__)
    text = printed(summary(counts=COUNTS, tokens=tokens).with_level_a_lost({"base": 1}))
    assert "A = top 3.73 %, C = bottom 12.5 %; ranked within: dataset" in text
    lines = cells(text)
    assert ["base", "3", "1", "1", "1", "1.100", "2.000", "2.900", "33.3 %", "1"] in lines
    assert ["online[v2]", "2", "1", "1", "0", "11.000", "20.000", "29.000", "100.0 %", "0"] in lines
    assert ["all", "5", "2", "2", "1", "", "", "", "60.0 %", "1"] in lines
    assert "counted 3 responses (4 tokens) as good, 2 (3 tokens) as bad" in text
    assert "1 responses near neither end, 1 left out because" in text
    assert ["'\\n'", "+5.00e-01", "'a'", "-4.17e-01"] in lines
    assert ["'b'", "-8.33e-02"] in [line[-2:] for line in lines]


def test_without_counts_there_is_one_table() -> None:
    text = printed(summarise_grading(LEVELS, SCORES, ["only"] * 5, **SETTINGS))
    assert ["only", "5", "2", "2", "1", "1.200", "3.000", "26.000", "-", "0"] in cells(text)
    assert "Q_diff" not in text
    assert "counted" not in text
    assert "all" not in text


def test_text_in_brackets_is_text_not_markup() -> None:
    tokens = TopTokens((("[/x]", 0.5),), (("[bold]", -0.5),))
    text = printed(summary(tokens=tokens, grade_within="[column]"))
    assert "'[/x]'" in text
    assert "'[bold]'" in text
    assert "within: [column]" in text


@pytest.mark.parametrize(("share", "warned"), [(0.4, False), (0.41, True), (0.5, True), (0.9, True)])
def test_a_grader_near_coin_tossing_is_doubted(share: float, warned: bool) -> None:
    disagree = np.arange(100) < 100 * share
    found = summarise_grading(np.full(100, "B"), np.zeros(100), ["[/x]"] * 100, **(SETTINGS | {"disagree": disagree}))
    text = " ".join(printed(found).split())
    assert (f"warning: [/x]: labels and scores disagree in {100 * share:.1f} % of the rows" in text) == warned
