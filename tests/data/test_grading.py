"""Levels by the reward model's scores: exact counts, ties, groups."""

from fractions import Fraction
from math import ceil

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import poft_plugin.data
from poft_plugin.data.grading import LEVELS, grade_levels, grade_within

TABLE_1 = [("Harmless base", 42_536, 1_587), ("Helpful base", 43_835, 1_636), ("Helpful online", 22_002, 821),
           ("Helpful rejection", 52_420, 1_956)]  # fmt: skip
SCORES = st.lists(st.integers(-3, 3).map(float), max_size=30)
SHARES = st.tuples(st.decimals("0.01", 100, places=2), st.decimals(0, 100, places=2)).filter(lambda ab: sum(ab) <= 100)


def sizes(levels: list[str]) -> tuple[int, ...]:
    """How many samples are at A, B and C."""
    assert set(levels) <= set(LEVELS)
    return tuple(levels.count(level) for level in LEVELS)


@pytest.mark.parametrize(("rows", "level_a"), [row[1:] for row in TABLE_1], ids=[row[0] for row in TABLE_1])
def test_table_1(rows: int, level_a: int) -> None:
    levels = grade_levels(np.random.default_rng(0).normal(size=rows), top_percent=3.73, bottom_percent=12.5)
    level_c = ceil(Fraction(125, 1000) * rows)
    assert sizes(levels) == (level_a, rows - level_a - level_c, level_c)


def test_table_1_as_four_groups() -> None:
    groups = [name for name, rows, _ in TABLE_1 for _ in range(rows)]
    scores = np.random.default_rng(1).permutation(len(groups)).astype(np.float64)
    levels = grade_within(scores, groups, top_percent=3.73, bottom_percent=12.5)
    assert levels.shape == (160_793,)
    assert (levels == "A").sum() == 6_000
    names = np.array(groups)
    assert {name: (levels[names == name] == "A").sum() for name, _, _ in TABLE_1} == {n: a for n, _, a in TABLE_1}


def test_counts_are_exact_on_the_number_as_written() -> None:
    """In floats 8.8 * 375 / 100 is a little above 33."""
    assert sizes(grade_levels(range(375), top_percent=8.8, bottom_percent=8.8)) == (33, 375 - 66, 33)


def test_levels_by_hand() -> None:
    """Of five, 30 % is ceil(1.5) = 2 and 41 % is ceil(2.05) = 3."""
    scores = [0.1, -2.0, 7.0, 3.0, 0.0]
    assert grade_levels(scores, top_percent=30, bottom_percent=30) == ["B", "C", "A", "A", "C"]
    assert grade_levels(scores, top_percent=41, bottom_percent=0) == ["A", "B", "A", "A", "B"]
    assert grade_levels(scores, top_percent=100, bottom_percent=0) == ["A"] * 5


def test_level_c_takes_what_level_a_left() -> None:
    """Rounded up, 50 % and 50 % of three would be four."""
    assert grade_levels([1.0, 2.0, 3.0], top_percent=50, bottom_percent=50) == ["C", "A", "A"]
    assert grade_levels([1.0], top_percent=1, bottom_percent=99) == ["A"]
    assert grade_levels([], top_percent=50, bottom_percent=50) == []


def test_ties_go_by_key_else_by_position() -> None:
    scores = [1.0, 1.0, 1.0, 1.0]
    assert grade_levels(scores, top_percent=25, bottom_percent=25) == ["A", "B", "B", "C"]
    assert grade_levels(scores, top_percent=25, bottom_percent=25, keys=["c", "d", "a", "b"]) == ["B", "C", "A", "B"]
    assert grade_levels([0.0, -0.0], top_percent=50, bottom_percent=0, keys=["b", "a"]) == ["B", "A"]


def test_groups_are_ranked_by_themselves() -> None:
    scores, groups = [1.0, 9.0, 2.0, 8.0, -5.0], ["low", "high", "low", "high", None]
    levels = grade_within(scores, groups, top_percent=50, bottom_percent=50, keys=list("edcba"))
    assert levels.tolist() == ["C", "A", "A", "C", "A"]
    assert levels.dtype.kind == "U"
    assert grade_within([], [], top_percent=50, bottom_percent=50).tolist() == []


@settings(deadline=None)
@given(SCORES, SHARES)
def test_levels_equal_the_oracle(scores: list[float], shares: tuple[float, float]) -> None:
    top, bottom = map(float, shares)
    keys = [f"{number * 7 % 31:02}" for number in range(len(scores))]
    levels = grade_levels(scores, top_percent=top, bottom_percent=bottom, keys=keys)
    assert levels == oracles.deft_levels(scores, keys, top, bottom)
    groups = [number % 3 for number in range(len(scores))]
    found = grade_within(scores, np.array(groups), top_percent=top, bottom_percent=bottom, keys=keys).tolist()
    for group in set(groups):
        part = slice(group, None, 3)
        assert found[part] == oracles.deft_levels(scores[part], keys[part], top, bottom)


@settings(deadline=None)
@given(st.data(), SCORES, SHARES)
def test_the_order_of_the_samples_does_not_matter(
    data: st.DataObject, scores: list[float], shares: tuple[float, float]
) -> None:
    order = data.draw(st.permutations(range(len(scores))))
    keys, percent = [f"{number:02}" for number in range(len(scores))], dict(zip(("top", "bottom"), shares, strict=True))
    settings = {f"{end}_percent": float(value) for end, value in percent.items()}
    levels = grade_levels(scores, keys=keys, **settings)
    shuffled = grade_levels([scores[i] for i in order], keys=[keys[i] for i in order], **settings)
    assert shuffled == [levels[i] for i in order]


def test_the_scale_of_the_scores_does_not_matter() -> None:
    scores = np.random.default_rng(2).normal(size=101)
    shares = {"top_percent": 12.5, "bottom_percent": 40}
    assert grade_levels(np.exp(3 * scores), **shares) == grade_levels(scores, **shares)


@pytest.mark.parametrize(
    ("top", "bottom", "message"),
    [
        (0, 10, "top_percent: 0; above 0 and at most 100"),
        (-1, 10, "top_percent: -1; above 0 and at most 100"),
        (100.5, 0, "top_percent: 100.5; above 0 and at most 100"),
        (float("nan"), 0, "top_percent: nan; above 0 and at most 100"),
        (10, -0.5, "bottom_percent: -0.5; 0 to 100"),
        (10, 101, "bottom_percent: 101; 0 to 100"),
        (10, float("nan"), "bottom_percent: nan; 0 to 100"),
        (60, 40.01, "top_percent: 60 and bottom_percent: 40.01; at most 100 together: lower one"),
    ],
)
def test_percentages_out_of_range_are_refused(top: float, bottom: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grade_levels([1.0, 2.0], top_percent=top, bottom_percent=bottom)
    with pytest.raises(ValueError, match=message):
        grade_within([1.0, 2.0], "xy", top_percent=top, bottom_percent=bottom)


def test_percentages_that_make_100_as_written_are_allowed() -> None:
    for hundredths in range(1, 10_000):
        shares = {"top_percent": hundredths / 100, "bottom_percent": (10_000 - hundredths) / 100}
        assert grade_levels([1.0], **shares) == ["A"]


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_refused_by_name(score: float) -> None:
    shares = {"top_percent": 50, "bottom_percent": 0}
    with pytest.raises(ValueError, match=rf"sample 1 \(row abc\) has the score {score}; it must be finite"):
        grade_levels([1.0, score], keys=["x", "abc"], **shares)
    with pytest.raises(ValueError, match=f"sample 1 has the score {score}"):
        grade_levels([1.0, score], **shares)
    with pytest.raises(ValueError, match=r"sample 2 \(row z\)"):
        grade_within([1.0, 2.0, score], "aab", keys=list("xyz"), **shares)


def test_lengths_must_agree() -> None:
    shares = {"top_percent": 50, "bottom_percent": 0}
    with pytest.raises(ValueError, match="keys: 1 for 2 scores"):
        grade_levels([1.0, 2.0], keys=["a"], **shares)
    with pytest.raises(ValueError, match="groups: 3 for 2 scores"):
        grade_within([1.0, 2.0], "abc", **shares)
    with pytest.raises(ValueError, match=r"scores: shape \(1, 2\); give one number per sample"):
        grade_levels(np.ones((1, 2)), **shares)


def test_the_room_exports_it() -> None:
    assert poft_plugin.data.grade_levels is grade_levels
    with pytest.raises(AttributeError, match="no attribute 'grade_level'"):
        _ = poft_plugin.data.grade_level
