"""What is set aside for evaluation depends on the rows alone."""

from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poft_plugin.data.rows import Turn, row_key
from poft_plugin.data.split import evaluation_rows

KEYS = st.lists(st.integers(0, 40).map(lambda number: f"{number * 7919 % 41:032x}"), max_size=30)


def aside(keys: list[str], count: int) -> set[str]:
    """The keys that are set aside."""
    return {key for key, chosen in zip(keys, evaluation_rows(keys, count), strict=True) if chosen}


@given(KEYS, st.integers(0, 35), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(keys: list[str], count: int, random: Random) -> None:
    shuffled = random.sample(keys, len(keys))
    assert aside(shuffled, count) == aside(keys, count)


@given(KEYS, st.integers(0, 35))
def test_rows_of_one_key_stay_together_and_sets_share_none(keys: list[str], count: int) -> None:
    chosen = evaluation_rows(keys, count)
    assert chosen.shape == (len(keys),)
    evaluated = {key for key, here in zip(keys, chosen, strict=True) if here}
    trained = {key for key, here in zip(keys, chosen, strict=True) if not here}
    assert not evaluated & trained
    assert evaluated | trained == set(keys)


@given(KEYS, st.integers(0, 35))
def test_as_many_as_were_asked_for(keys: list[str], count: int) -> None:
    """Exactly, where keys differ; at most the further rows of the last key more."""
    chosen = int(evaluation_rows(keys, count).sum())
    wanted = min(count, len(keys))
    assert wanted <= chosen
    if wanted:
        repeated = Counter(keys)[max(aside(keys, count))]
        assert chosen < wanted + repeated
    else:
        assert chosen == 0


@given(st.sets(st.integers(0, 10**6), min_size=1, max_size=30), st.integers(0, 30))
def test_exactly_so_many_where_rows_differ(numbers: set[int], count: int) -> None:
    keys = [f"{number:032x}" for number in numbers]
    assert int(evaluation_rows(keys, count).sum()) == min(count, len(keys))


@given(
    st.sets(st.integers(0, 10**6), min_size=1, max_size=30),
    st.sets(st.integers(10**6 + 1, 10**7), max_size=10),
    st.integers(1, 30),
)
def test_added_rows_move_as_many_others_at_most(old: set[int], new: set[int], count: int) -> None:
    """A new row that is set aside takes the place of one; no row that was trained on comes to evaluation."""
    keys = [f"{number * 999_983 % 10_000_019:032x}" for number in sorted(old)]
    added = [f"{number * 999_983 % 10_000_019:032x}" for number in sorted(new)]
    before, after = aside(keys, min(count, len(keys))), aside([*keys, *added], min(count, len(keys)))
    entered = after & set(added)
    assert after - set(added) <= before
    assert len(before - after) == len(entered)


def test_a_choice_that_leans_to_no_row() -> None:
    """Keys are hashes: over many data sets, each place in the file is set aside equally often."""
    share = np.mean(
        [
            evaluation_rows([row_key([Turn("user", f"{data_set}: {row}")]) for row in range(20)], 5)
            for data_set in range(400)
        ],
        axis=0,
    )
    assert share.mean() == pytest.approx(5 / 20)
    assert np.abs(share - 5 / 20).max() < 5 * np.sqrt(0.25 * 0.75 / 400)


@pytest.mark.parametrize("count", [0, -1])
def test_none(count: int) -> None:
    assert not evaluation_rows(["a", "b"], count).any()
    assert evaluation_rows([], 3).tolist() == []
