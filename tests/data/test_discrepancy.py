"""Which tokens count for good and bad, and their difference, which sums to exactly 0."""

import math
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import poft_plugin.data
from poft_plugin.data import discrepancy
from poft_plugin.data.discrepancy import GradedSample, TokenCounts, count_tokens, discrepancy_distribution

UNIT = Fraction(1, 2**53)


def sample(level: str, *scores: float) -> GradedSample:
    """Response number i is one token, i."""
    return GradedSample(level, [[number] for number in range(len(scores))], scores)


def counted(level: str, *scores: float) -> tuple[set[int], set[int], tuple[int, int]]:
    """Which responses are in Q+ and in Q-; how many are near neither end and how many are left out."""
    counts = count_tokens([sample(level, *scores)], vocab_size=len(scores))
    assert {*counts.positive.tolist(), *counts.negative.tolist()} <= {0, 1}
    positive, negative = set(np.flatnonzero(counts.positive)), set(np.flatnonzero(counts.negative))
    assert (len(positive), len(negative)) == (counts.responses_positive, counts.responses_negative)
    return positive, negative, (counts.middle_uncounted, counts.middle_contradictory)


def tally(positive: Sequence[int], negative: Sequence[int]) -> TokenCounts:
    """Counts of tokens alone."""
    return TokenCounts(np.array(positive), np.array(negative), 1, 1, 1, 0, 0)


def assert_sums_to_zero(entries: np.ndarray) -> None:
    """In several orders, whole and step by step."""
    assert entries.dtype == np.float64
    assert math.fsum(entries) == 0.0
    assert all((Fraction(entry) / UNIT).denominator == 1 for entry in entries.tolist())
    generator = np.random.default_rng(0)
    for order in (
        entries,
        np.sort(entries),
        np.sort(entries)[::-1],
        *[generator.permutation(entries) for _ in "12345"],
    ):
        assert np.sum(order) == 0.0
        assert np.cumsum(order)[-1] == 0.0
        assert sum(order.tolist()) == 0.0


@pytest.mark.parametrize("level", "ABC")
def test_of_a_pair_the_first_is_positive_and_the_last_negative(level: str) -> None:
    """Whatever the scores say."""
    for scores in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5]):
        assert counted(level, *scores) == ({0}, {1}, (0, 0))


def test_level_a_takes_the_near_best() -> None:
    """u = 0.9, 0.8, 0.05: above 0.8 only the first, and none is taken as bad."""
    assert counted("A", 20, 18, 16, 1, 0) == ({0, 1}, {4}, (2, 0))


def test_level_b_takes_both_ends() -> None:
    """u = 0.95, 0.9, 0.5, 0.1, 0.05."""
    assert counted("B", 20, 19, 18, 10, 2, 1, 0) == ({0, 1}, {5, 6}, (3, 0))


def test_level_c_takes_the_near_worst() -> None:
    """u = 1, 0.95, 0.2, 0.15."""
    assert counted("C", 20, 20, 19, 4, 3, 0) == ({0}, {4, 5}, (3, 0))


def test_thresholds_go_by_the_samples_own_scores() -> None:
    """Logits of any offset and scale: r = 0.9 of 10 is u = 0.09."""
    assert counted("B", 10, 0.9, 0) == ({0}, {1, 2}, (0, 0))
    assert counted("A", -3.0, -3.5, -7.0) == ({0, 1}, {2}, (0, 0))


@pytest.mark.parametrize("level", "ABC")
def test_equal_scores_leave_the_middle_out(level: str) -> None:
    assert counted(level, 0.3, 0.3, 0.3, 0.3) == ({0}, {3}, (0, 2))


def test_label_and_score_that_contradict_leave_the_middle_out() -> None:
    """The label's best has the lowest score: u = 0.95 is v = 0.05. What neither rule wants is not a contradiction."""
    assert counted("A", 0, 19, 20) == ({0}, {2}, (0, 1))
    assert counted("C", 0, 1, 20) == ({0}, {2}, (0, 1))
    assert counted("B", 0, 1, 10, 19, 20) == ({0}, {4}, (1, 2))
    assert counted("C", 0, 19, 20) == ({0}, {2}, (1, 0))


def test_ends_of_equal_score_leave_the_middle_out() -> None:
    """Eq. 15 has a 0 below the line."""
    assert counted("A", 5, 9, 8, 0, 5) == ({0}, {4}, (1, 2))
    assert counted("B", 5, 9, 0, 4, 5) == ({0}, {4}, (1, 2))


def test_a_middle_beyond_the_labels_ends_counts_where_both_agree() -> None:
    """The label's ends have 15 and 4, the extremes are 20 and 0: u = 1, v = 16 / 11, and u = 0, v = -4 / 11."""
    assert counted("A", 15, 20, 0, 4) == ({0, 1}, {3}, (1, 0))
    assert counted("B", 15, 20, 0, 4) == ({0, 1}, {2, 3}, (0, 0))
    assert counted("C", 15, 20, 0, 4) == ({0}, {2, 3}, (1, 0))


def test_one_half_is_on_neither_side() -> None:
    """u = 18 / 20, v = (18 - 16) / (20 - 16)."""
    assert counted("A", 20, 18, 0, 16) == ({0, 1}, {3}, (1, 0))


def test_discrepancy_by_hand() -> None:
    """Q+ = 3, 1, 0 of 4; Q- = 1, 2, 5 of 8; all are multiples of one eighth."""
    entries = tally([3, 1, 0, 0], [1, 2, 5, 0]).discrepancy()
    assert entries.tolist() == [3 / 4 - 1 / 8, 1 / 4 - 2 / 8, -5 / 8, 0.0]


def test_tokens_of_all_samples_are_counted_together() -> None:
    samples = [
        GradedSample("A", [[0, 0, 1], [1, 2]], [1.0, 0.0]),
        GradedSample("B", [np.array([0], dtype=np.int32), np.array([1, 1], dtype=np.uint8)], [0.0, 1.0]),
        GradedSample("C", [(1, 3), [3]], [1, 0]),
    ]
    counts = count_tokens(samples, vocab_size=4)
    assert counts.positive.tolist() == [3, 2, 0, 1]
    assert counts.negative.tolist() == [0, 3, 1, 1]
    assert counts.positive.dtype == counts.negative.dtype == np.int64
    assert (counts.samples, counts.responses_positive, counts.responses_negative) == (3, 3, 3)
    exact = [Fraction(3, 6), Fraction(2, 6) - Fraction(3, 5), Fraction(-1, 5), Fraction(1, 6) - Fraction(1, 5)]
    entries = counts.discrepancy()
    assert entries.tolist() == pytest.approx([float(value) for value in exact], abs=float(UNIT))
    assert np.array_equal(entries, discrepancy_distribution(samples, vocab_size=4))
    assert_sums_to_zero(entries)


def test_special_tokens_count_nowhere() -> None:
    """Neither in the counts nor in the sums that normalise; ids beyond the head cannot occur."""
    samples = [GradedSample("A", [[7, 0, 1, 6], [7, 2, 6, 6]], [1.0, 0.0])]
    assert discrepancy_distribution(samples, vocab_size=8, special_token_ids={6, 7, 8, -1}).tolist() == [
        0.5, 0.5, -1.0, 0, 0, 0, 0, 0
    ]  # fmt: skip


def test_a_padded_vocabulary_and_one_token_responses() -> None:
    entries = discrepancy_distribution([sample("A", 1.0, 0.0)], vocab_size=1000)
    assert entries.shape == (1000,)
    assert entries[:2].tolist() == [1.0, -1.0]
    assert not entries[2:].any()


def test_equal_best_and_worst_cancel() -> None:
    """As does any token of equal share, whatever the others leave to round."""
    assert not discrepancy_distribution([GradedSample("B", [[0, 1, 2]] * 2, [1.0, 0.0])], vocab_size=3).any()
    assert not tally([1, 2, 4], [3, 6, 12]).discrepancy().any()
    entries = tally([1, 1, 1, 0], [2, 0, 1, 3]).discrepancy()
    assert entries[0] == 0
    assert_sums_to_zero(entries)


def test_an_empty_response_counts_as_a_response_without_tokens() -> None:
    samples = [GradedSample("A", [[], [0]], [1.0, 0.0]), GradedSample("A", [[1], [0]], [1.0, 0.0])]
    counts = count_tokens(samples, vocab_size=2)
    assert (counts.responses_positive, counts.positive.tolist()) == (2, [0, 1])


@st.composite
def graded(draw: st.DrawFn, vocab_size: int) -> GradedSample:
    """A sample whose scores often tie, contradict the label and lie near the thresholds."""
    scores = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 10, 16, 17, 18, 19, 20]), min_size=2, max_size=5))
    ids = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=6)
    return GradedSample(draw(st.sampled_from("ABC")), [draw(ids) for _ in scores], scores)


@settings(deadline=None, max_examples=300)
@given(st.lists(graded(6), min_size=1, max_size=5), st.sets(st.integers(0, 5), max_size=1))
def test_counts_and_discrepancy_equal_the_oracle(samples: list[GradedSample], special: set[int]) -> None:
    plain = [(sample.level, sample.responses, sample.scores) for sample in samples]
    expected = oracles.deft_counts(plain, 6, sorted(special))
    if not any(expected.positive) or not any(expected.negative):
        with pytest.raises(ValueError, match="has no tokens"):
            count_tokens(samples, vocab_size=6, special_token_ids=special)
        return
    counts = count_tokens(iter(samples), vocab_size=6, special_token_ids=special)
    assert counts.positive.tolist() == expected.positive
    assert counts.negative.tolist() == expected.negative
    assert (counts.middle_uncounted, counts.middle_contradictory) == (expected.uncounted, expected.contradictory)
    everywhere = counts.responses_positive + counts.responses_negative + expected.uncounted + expected.contradictory
    assert everywhere == sum(len(sample.responses) for sample in samples)
    assert_near(counts.discrepancy(), expected.positive, expected.negative)


def assert_near(entries: np.ndarray, positive: Sequence[int], negative: Sequence[int]) -> None:
    """Within one unit of the exact value, of its sign, and 0 where it is."""
    assert_sums_to_zero(entries)
    for entry, exact in zip(entries.tolist(), oracles.deft_discrepancy(positive, negative), strict=True):
        assert abs(Fraction(entry) - exact) <= UNIT
        assert Fraction(entry) * exact >= 0
        assert exact != 0 or entry == 0


@pytest.mark.parametrize("seed", range(6))
def test_large_counts_sum_to_zero(seed: int) -> None:
    """Zipf's law over 5,000 tokens, some padding; products of counts and totals beyond 64 bits."""
    generator = np.random.default_rng(seed)
    draws = [generator.zipf(1.2, 200_000) for _ in "+-"]
    scale = 10 ** (seed * 2)
    positive, negative = (scale * np.bincount(draw[draw < 5000], minlength=5200) for draw in draws)
    negative[:50] += seed
    entries = tally(positive, negative).discrepancy()
    assert_near(entries, positive.tolist(), negative.tolist())
    assert np.array_equal(tally(negative, positive).discrepancy(), -entries)


@pytest.mark.parametrize("tokens", [3, 7, 1000, 4097])
def test_disjoint_halves_stay_within_one(tokens: int) -> None:
    """All of Q+ is then summed before Q-: a partial sum above 1 could not be exact."""
    counts = np.random.default_rng(tokens).integers(1, 100, 2 * tokens)
    positive, negative = counts.copy(), counts.copy()
    positive[tokens:], negative[:tokens] = 0, 0
    entries = tally(positive, negative).discrepancy()
    assert entries[:tokens].sum() <= 1
    assert_near(entries, positive.tolist(), negative.tolist())


def test_the_order_of_the_samples_does_not_matter() -> None:
    generator = np.random.default_rng(3)
    samples = [
        GradedSample("ABC"[n % 3], [generator.integers(0, 50, 9) for _ in range(4)], generator.normal(size=4))
        for n in range(60)
    ]
    entries = discrepancy_distribution(samples, vocab_size=50)
    assert entries.any()
    assert np.array_equal(discrepancy_distribution(samples[::-1], vocab_size=50), entries)


def test_tokens_are_counted_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator may reuse its buffer, and its responses are not gathered: per side 50,000 ids, twice while added."""
    buffers, ids = np.zeros((2, 5_000), dtype=np.int64), 50_000

    def samples() -> Iterator[GradedSample]:
        for number in range(200):
            buffers[0], buffers[1] = number % 10, number % 5
            yield GradedSample("A", list(buffers), [1.0, 0.0])

    monkeypatch.setattr(discrepancy, "FLUSH_TOKENS", ids)
    tracemalloc.start()
    counts = count_tokens(samples(), vocab_size=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.positive.tolist() == [5_000 * 20] * 10
    assert counts.negative.tolist() == [5_000 * 40] * 5 + [0] * 5
    assert peak < 2 * 2 * 8 * ids * 1.25 < 8 * counts.positive.sum() / 2


PAIR: dict[str, Any] = {"level": "A", "responses": [[0], [1]], "scores": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": "D"}, "sample 1: level 'D'; one of A, B, C"),
        ({"responses": [[0]], "scores": [1.0]}, "sample 1: 1 responses; at least 2, the best and the worst"),
        ({"responses": [], "scores": []}, "sample 1: 0 responses; at least 2"),
        ({"scores": [1.0]}, "sample 1: 1 scores for 2 responses"),
        ({"scores": [1.0, float("nan")]}, r"sample 1: scores \[1.0, nan\]; they must be finite"),
        ({"scores": [float("inf"), 0.0]}, "they must be finite"),
        ({"responses": [[0], [0, 4]]}, r"sample 1: token id 4; 0 to 3 \(vocab_size: 4\)"),
        ({"responses": [[0, -100], [0]]}, "sample 1: token id -100; 0 to 3"),
        ({"responses": [[0], [0.5]]}, r"sample 1: a response of float64, shape \(1,\); a list of token ids"),
        ({"responses": [[0], [[1, 2]]]}, r"sample 1: a response of int64, shape \(1, 2\)"),
    ],
)
def test_a_wrong_sample_is_refused_by_number(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_tokens([GradedSample(**PAIR), GradedSample(**(PAIR | change))], vocab_size=4)


def test_nothing_to_count_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size: 0; at least 1"):
        count_tokens([GradedSample(**PAIR)], vocab_size=0)
    with pytest.raises(ValueError, match="no samples"):
        count_tokens(iter([]), vocab_size=4)
    with pytest.raises(ValueError, match=r"Q\+ has no tokens: of its 1 responses all 1 tokens are special"):
        count_tokens([GradedSample(**PAIR)], vocab_size=4, special_token_ids=[0])
    with pytest.raises(ValueError, match="Q- has no tokens: of its 1 responses all are empty"):
        count_tokens([GradedSample(**(PAIR | {"responses": [[0], []]}))], vocab_size=4)


def test_the_room_exports_it_and_stays_light() -> None:
    assert poft_plugin.data.discrepancy_distribution is discrepancy_distribution
    for module, heavy in (("poft_plugin.data", ("numpy", "torch")), ("poft_plugin.data.discrepancy", ("torch",))):
        names = (*heavy, "transformers", "pyarrow", "pydantic")
        code = f"import sys, {module}; sys.exit(', '.join(n for n in {names} if n in sys.modules) or 0)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
