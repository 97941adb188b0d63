"""The filters: by preference score, with exact counts, ties and groups; and by level."""

from typing import Any

import numpy as np
import oracles
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poft_plugin.config import parse_block, settings_model
from poft_plugin.data.filters import keep_levels, keep_top_percent, top_percent_count
from poft_plugin.data.grading import grade_within
from poft_plugin.data.preparation import Rows

PERCENT = st.one_of(st.floats(1e-6, 100), st.integers(1, 100), st.decimals("0.01", 100, places=2).map(float))
CASES = [(8.8, 375, 33), (55, 20, 11), (0.7, 1000, 7), (80, 7, 6), (100, 7, 7), (1e-6, 5, 1), (3.73, 42_536, 1_587),
         (3.73, 52_420, 1_956), (50, 0, 0)]  # fmt: skip


def rows(scores: list[float], keys: list[str] | None = None, sources: list[str] | None = None, **columns: Any) -> Rows:
    """Rows with a score each."""
    names = keys or [f"{number:04}" for number in range(len(scores))]
    table = {"row_key": names, "source": sources or ["data"] * len(scores), **columns}
    return Rows(pa.table(table), {"reference_logp": np.array(scores, dtype=np.float64)})


def kept(table: Rows, **settings: Any) -> list[int]:
    """Positions that stay."""
    keep = keep_top_percent(table, **settings)
    assert keep.dtype == bool
    assert keep.shape == (len(table),)
    return np.flatnonzero(keep).tolist()


@pytest.mark.parametrize(("percent", "total", "count"), CASES)
def test_counts_by_hand(percent: float, total: int, count: int) -> None:
    """Exact on the number as it is written: in floats 8.8 * 375 / 100 is a little above 33."""
    assert top_percent_count(percent, total) == count


@settings(deadline=None)
@given(PERCENT, st.integers(0, 400))
def test_counts_equal_the_decimal_oracle(percent: float, total: int) -> None:
    count = top_percent_count(percent, total)
    assert count == oracles.ceil_percent(percent, total)
    assert top_percent_count(np.float64(percent), total) == count


def test_the_best_stay_in_place() -> None:
    """Highest log-probability first: the values are negative."""
    assert kept(rows([-3.0, -1.0, -2.0, -4.0, -0.5]), percent=40) == [1, 4]
    assert kept(rows([-3.0, -1.0, -2.0, -4.0, -0.5]), percent=41) == [1, 2, 4]
    assert kept(rows([-3.0, -1.0, -2.0]), percent=100) == [0, 1, 2]
    assert kept(rows([]), percent=50) == []


def test_ties_go_by_key_whatever_the_order_of_the_rows() -> None:
    assert kept(rows([-1.0, -1.0, -1.0, -2.0], keys=["c", "a", "b", "0"]), percent=50) == [1, 2]
    assert kept(rows([-2.0, -1.0, -1.0, -1.0], keys=["0", "b", "c", "a"]), percent=50) == [1, 3]


def test_within_none_ranks_all_rows_together() -> None:
    table = rows([-1.0, -2.0, -3.0, -4.0], sources=["a", "a", "b", "b"])
    assert kept(table, percent=50) == kept(table, percent=50, within="none") == [0, 1]


def test_within_dataset_ranks_each_entry_by_itself() -> None:
    table = rows([-1.0, -2.0, -3.0, -4.0, -9.0], sources=["a", "b", "a", "b", "c"])
    assert kept(table, percent=50, within="dataset") == [0, 1, 4]


def test_within_a_column_ranks_each_of_its_values_by_itself() -> None:
    table = rows([-1.0, -2.0, -3.0, -4.0], group=["x", "x", "x", None])
    assert kept(table, percent=34, within="topic") == [0, 1, 3]


def test_another_column_can_be_ranked_by() -> None:
    table = rows([-1.0, -2.0, -3.0])
    other = Rows(table.table, {**table.attached, "length": np.array([5, 9, 7])})
    assert kept(other, percent=50, column="length") == [1, 2]


@settings(deadline=None)
@given(st.data())
def test_each_group_keeps_the_ceiling_of_its_share_and_its_best(data: st.DataObject) -> None:
    members = st.tuples(st.integers(-3, 0), st.sampled_from("abc"))
    drawn, percent = data.draw(st.lists(members, max_size=40)), data.draw(PERCENT)
    scores, sources = [float(s) for s, _ in drawn], [g for _, g in drawn]
    table = rows(scores, sources=sources)
    keep = keep_top_percent(table, percent=percent, within="dataset")
    for group in set(sources):
        inside = [i for i, g in enumerate(sources) if g == group]
        best = sorted(inside, key=lambda i: (-scores[i], table.keys[i].as_py()))
        count = oracles.ceil_percent(percent, len(inside))
        assert sorted(i for i in inside if keep[i]) == sorted(best[:count])


@settings(deadline=None)
@given(st.data())
def test_the_order_of_the_rows_does_not_matter(data: st.DataObject) -> None:
    scores = data.draw(st.lists(st.integers(-3, 0), min_size=1, max_size=12))
    order = data.draw(st.permutations(range(len(scores))))
    table = rows([float(s) for s in scores])
    shuffled = Rows(table.table.take(order), {"reference_logp": table.attached["reference_logp"][order]})
    assert {order[i] for i in kept(shuffled, percent=30)} == set(kept(table, percent=30))


@pytest.mark.parametrize("percent", [0, -20, 100.1, float("nan")])
def test_a_share_out_of_range_is_refused(percent: float) -> None:
    with pytest.raises(ValueError, match=f"keep_top_percent: percent: {percent}; above 0 and at most 100"):
        keep_top_percent(rows([-1.0, -2.0]), percent=percent)


def graded(levels: Any) -> Rows:
    """Rows with a level each."""
    return Rows(rows([0.0] * len(levels)).table, {"level": np.asarray(levels)})


@pytest.mark.parametrize(
    ("levels", "kept"), [("A", [1]), ("B", [0, 3]), ("C", [2]), ("A+B", [0, 1, 3]), ("B+C", [0, 2, 3])]
)
@pytest.mark.parametrize("dtype", ["<U1", object])
def test_rows_of_the_asked_levels_stay(levels: Any, kept: list[int], dtype: Any) -> None:
    keep = keep_levels(graded(np.array(["B", "A", "C", "B"], dtype=dtype)), levels=levels)
    assert (keep.dtype, keep.shape) == (bool, (4,))
    assert np.flatnonzero(keep).tolist() == kept


def test_no_row_of_an_asked_level_keeps_none() -> None:
    assert keep_levels(graded(["B", "C"]), levels="A").tolist() == [False, False]
    assert keep_levels(graded(np.array([], dtype="<U1")), levels="A").tolist() == []


def test_levels_come_from_grading() -> None:
    levels = grade_within([4.0, 3.0, 2.0, 1.0], ["x"] * 4, top_percent=50, bottom_percent=25)
    assert keep_levels(graded(levels), levels="A").tolist() == [True, True, False, False]


def test_rows_without_a_level_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^keep_levels: the rows have no level; it goes with an `rl: deft_\.\.\.`"):
        keep_levels(rows([-1.0]), levels="A")


@pytest.mark.parametrize("levels", ["D", "", "A+C", "A+B+C", "a", None, ["A"]])
def test_other_levels_are_refused_at_config_load(levels: Any) -> None:
    with pytest.raises(ValueError, match=r"^row_filters\[0\]\.levels: .*'A', 'B', 'C', 'A\+B' or 'B\+C' \(given: "):
        parse_block(settings_model(keep_levels), {"levels": levels}, "row_filters[0]")
