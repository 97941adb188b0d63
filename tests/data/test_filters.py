"""The filter by preference score: exact counts, ties, groups."""

from typing import Any

import numpy as np
import oracles
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poft_plugin.data.filters import keep_top_percent, top_percent_count
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
