"""The discrepancy distribution: which tokens good responses hold more often than bad ones.

Axes: C responses of a sample, best to worst; V vocabulary (the head's rows, which may be more than the tokenizer's).
Paper: "DEFT: Distribution-guided Efficient Fine-Tuning for Human Alignment", section 3.2.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

import numpy as np

UNITS = 2**53
"""Entries are multiples of `1 / UNITS`: below 1 every such number, and every sum of them, is exact in float64."""

FLUSH_TOKENS = 1_000_000
"""Token ids that are held before they are counted."""


class Thresholds(NamedTuple):
    """A middle response counts in Q+ above the first, in Q- below the second, by its score between 0 and 1."""

    positive_above: float
    negative_below: float


RULES = {"A": Thresholds(0.8, 0.0), "B": Thresholds(0.9, 0.1), "C": Thresholds(1.0, 0.2)}
"""The three rules below Eq. 15. A bound of 0 or 1 is one that no score passes."""


@dataclass(frozen=True)
class GradedSample:
    """A sample with its level.

    Args:
        level: `A`, `B` or `C`.
        responses: C lists of token ids, best to worst.
        scores: C scores of the reward model, in its unit.
    """

    level: str
    responses: Sequence[Sequence[int] | np.ndarray]
    scores: Sequence[float]


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """How often each token occurs in good and in bad responses.

    A sample's best response is in Q+, its worst in Q-. Each response in between is in exactly one of Q+, Q-,
    `middle_uncounted` and `middle_contradictory`.

    Args:
        positive: `(V,)` whole numbers, the paper's Q+.
        negative: `(V,)` whole numbers, the paper's Q-.
        samples: samples counted.
        responses_positive: responses in Q+.
        responses_negative: responses in Q-.
        middle_uncounted: middle responses neither near enough to the best nor to the worst.
        middle_contradictory: middle responses left out because the sample's scores are all equal, or because they
            are near enough but label and score disagree about the side.
    """

    positive: np.ndarray
    negative: np.ndarray
    samples: int
    responses_positive: int
    responses_negative: int
    middle_uncounted: int
    middle_contradictory: int

    def discrepancy(self) -> np.ndarray:
        """`Q+ / sum(Q+) - Q- / sum(Q-)` (Eq. 14), as multiples of `2**-53` whose sum is exactly 0.

        Each entry is computed in whole numbers and cut towards 0; what one side then lacks, at most one unit per
        entry, is given to its largest entries. So no entry is off by more than `2**-53`, signs and zeros are those of
        the exact value, and the sum is 0 in whatever order it is taken.

        Returns:
            `(V,)` float64, between -1 and 1.
        """
        totals = int(self.positive.sum()), int(self.negative.sum())
        assert min(totals) > 0, totals
        counted = np.flatnonzero(self.positive + self.negative)
        # Python integers: a count times a total times 2**53 needs more than 64 bits.
        positive, negative = self.positive[counted].astype(object), self.negative[counted].astype(object)
        numerators = positive * totals[1] - negative * totals[0]
        units = (np.abs(numerators) * UNITS // (totals[0] * totals[1])).astype(np.int64)
        above, below = (numerators > 0).astype(bool), (numerators < 0).astype(bool)
        excess = int(units[above].sum()) - int(units[below].sum())
        lesser = np.flatnonzero(below if excess > 0 else above)
        units[lesser[np.argsort(-units[lesser], kind="stable")[: abs(excess)]]] += 1
        assert units[above].sum() == units[below].sum() <= UNITS
        entries = np.zeros(len(self.positive))
        entries[counted] = np.where(above, units, -units) / UNITS
        return entries


def discrepancy_distribution(
    samples: Iterable[GradedSample], *, vocab_size: int, special_token_ids: Iterable[int] = ()
) -> np.ndarray:
    """`Q_diff = Q+ / sum(Q+) - Q- / sum(Q-)` over the vocabulary (Eq. 14), which sums to exactly 0.

    Args:
        samples: as in `count_tokens`.
        vocab_size: V, as in `count_tokens`.
        special_token_ids: as in `count_tokens`.

    Returns:
        `(V,)` float64, between -1 and 1; above 0 where good responses hold the token more often.

    Raises:
        ValueError: as `count_tokens`.

    Examples:
        >>> sample = GradedSample("A", responses=[[0, 1], [1, 2, 2, 2]], scores=[1.0, 0.0])
        >>> discrepancy_distribution([sample], vocab_size=4).tolist()
        [0.5, 0.25, -0.75, 0.0]

    Departs from the paper as `count_tokens` does.
    """
    return count_tokens(samples, vocab_size=vocab_size, special_token_ids=special_token_ids).discrepancy()


def count_tokens(
    samples: Iterable[GradedSample], *, vocab_size: int, special_token_ids: Iterable[int] = ()
) -> TokenCounts:
    """Counts the tokens of good and of bad responses, Q+ and Q- (section 3.2, Eq. 15 and the three rules).

    The best response counts in Q+ and the worst in Q-, at every level. With `u = (r - min) / (max - min)` over the
    sample's scores, a response in between counts in Q+ if `u > 0.8` (level A) or `u > 0.9` (B), in Q- if `u < 0.1` (B)
    or `u < 0.2` (C).

    Args:
        samples: graded samples; read once, so that a generator will do.
        vocab_size: V, rows of the head.
        special_token_ids: ids counted nowhere; one outside the vocabulary is of no account.

    Returns:
        The counts, and how many responses went where.

    Raises:
        ValueError: if a sample has fewer than two responses, an unknown level, not one finite score per response, or a
            token id outside the vocabulary; if there is no sample, or no token is left in Q+ or in Q-.

    Examples:
        >>> middle = GradedSample("B", responses=[[0], [1, 3], [2]], scores=[1.0, 0.95, 0.0])
        >>> counts = count_tokens([middle], vocab_size=4, special_token_ids=[3])
        >>> counts.positive.tolist(), counts.negative.tolist()
        ([1, 1, 0, 0], [0, 0, 1, 0])

    Departs from the paper in this: Eq. 15 normalises by the scores of the first and the last response,
    `v = (r - r_last) / (r_first - r_last)`, which need not be the highest and the lowest. Where `u` and `v` lie on
    opposite sides of one half, or one of them is undefined, the middle response counts nowhere. Special tokens are left
    out.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size: {vocab_size}; at least 1, the rows of the model's head")
    tallies = {side: _Tally(vocab_size) for side in (Side.POSITIVE, Side.NEGATIVE)}
    left_out = {Side.UNCOUNTED: 0, Side.CONTRADICTORY: 0}
    number = -1
    for number, sample in enumerate(samples):
        for side, response in zip(_sides(number, sample), sample.responses, strict=True):
            if side in tallies:
                tallies[side].add(number, response)
            else:
                left_out[side] += 1
    if number < 0:
        raise ValueError("no samples: there is nothing to count; is every row filtered out?")
    special = {token for token in special_token_ids if 0 <= token < vocab_size}
    positive, negative = tallies[Side.POSITIVE], tallies[Side.NEGATIVE]
    return TokenCounts(
        positive=positive.finish("Q+", special),
        negative=negative.finish("Q-", special),
        samples=number + 1,
        responses_positive=positive.responses,
        responses_negative=negative.responses,
        middle_uncounted=left_out[Side.UNCOUNTED],
        middle_contradictory=left_out[Side.CONTRADICTORY],
    )


class Side(Enum):
    """Where a response is counted."""

    POSITIVE = auto()
    NEGATIVE = auto()
    UNCOUNTED = auto()
    CONTRADICTORY = auto()


def _sides(number: int, sample: GradedSample) -> list[Side]:
    responses, scores = len(sample.responses), [float(score) for score in sample.scores]
    if sample.level not in RULES:
        raise ValueError(f"sample {number}: level {sample.level!r}; one of {', '.join(RULES)}")
    if responses < 2:
        raise ValueError(f"sample {number}: {responses} responses; at least 2, the best and the worst")
    if len(scores) != responses:
        raise ValueError(f"sample {number}: {len(scores)} scores for {responses} responses; one each")
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"sample {number}: scores {scores}; they must be finite: score the row again")
    return [Side.POSITIVE, *[_middle(sample.level, score, scores) for score in scores[1:-1]], Side.NEGATIVE]


def _middle(level: str, score: float, scores: Sequence[float]) -> Side:
    low, high, first, last = min(scores), max(scores), scores[0], scores[-1]
    if low == high:
        return Side.CONTRADICTORY
    by_score = (score - low) / (high - low)
    above, below = RULES[level]
    if below <= by_score <= above:
        return Side.UNCOUNTED
    if first == last or (by_score - 0.5) * ((score - last) / (first - last) - 0.5) < 0:
        return Side.CONTRADICTORY
    return Side.POSITIVE if by_score > above else Side.NEGATIVE


class _Tally:
    """Token counts of one side; holds at most `FLUSH_TOKENS` ids and one response."""

    def __init__(self, vocab_size: int):
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.responses = 0
        self._pending: list[tuple[int, np.ndarray]] = []
        self._held = 0

    def add(self, number: int, response: Sequence[int] | np.ndarray) -> None:
        """Counts a response of sample `number`, now or later."""
        ids = np.asarray(response)
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
            raise ValueError(f"sample {number}: a response of {ids.dtype}, shape {ids.shape}; a list of token ids")
        self.responses += 1
        # A copy: a generator may write its next response into the same buffer.
        self._pending.append((number, ids.astype(np.int64)))
        self._held += ids.size
        if self._held >= FLUSH_TOKENS:
            self._flush()

    def finish(self, name: str, special: set[int]) -> np.ndarray:
        """The counts, without special tokens."""
        self._flush()
        total = int(self.counts.sum())
        self.counts[list(special)] = 0
        if not self.counts.any():
            why = f"all {total} tokens are special" if total else "all are empty"
            raise ValueError(f"{name} has no tokens: of its {self.responses} responses {why}; look at the data's rows")
        return self.counts

    def _flush(self) -> None:
        ids = np.concatenate([ids for _, ids in self._pending]) if self._pending else self.counts[:0]
        size = len(self.counts)
        if ids.size and not 0 <= ids.min() <= ids.max() < size:
            number, wrong = next((n, i) for n, i in self._pending if i.size and not 0 <= i.min() <= i.max() < size)
            outside = wrong[(wrong < 0) | (wrong >= size)][0]
            raise ValueError(
                f"sample {number}: token id {outside}; 0 to {size - 1} (vocab_size: {size}): is this the tokenizer of "
                "the model that is trained?"
            )
        self.counts += np.bincount(ids, minlength=size)
        self._pending, self._held = [], 0
