"""Data grading: which samples are level A, B and C by the reward model's scores.

Axes: n samples. Scores are the reward model's own unit; only their order counts.
Paper: "DEFT: Distribution-guided Efficient Fine-Tuning for Human Alignment", section 3.1.
"""

from collections.abc import Hashable, Iterable, Sequence
from fractions import Fraction

import numpy as np

from poft_plugin.data.filters import top_percent_count

LEVELS = ("A", "B", "C")
"""Best to worst. Level A is trained on; all three are counted into the discrepancy distribution."""


def grade_levels(
    scores: Sequence[float] | np.ndarray,
    *,
    top_percent: float,
    bottom_percent: float,
    keys: Sequence[str] | np.ndarray | None = None,
) -> list[str]:
    """Level of each sample, from its rank among all (section 3.1).

    By descending score the first `ceil(top_percent * n / 100)` samples are level A, the last
    `min(ceil(bottom_percent * n / 100), n - |A|)` are level C, the rest is B.

    Args:
        scores: `(n,)`, the reward model's unit: each sample's grade score, the highest of its responses (of a pair, the
            positive one's).
        top_percent: the paper's `a`, percent of n; above 0 and at most 100. Its value is 3.73.
        bottom_percent: the paper's `c`, percent of n; 0 to 100. Its value is 12.5.
        keys: n row keys, by which ties are broken, in ascending order; without them ties go by position.

    Returns:
        n letters, `A`, `B` or `C`, in the order of `scores`.

    Raises:
        ValueError: if a percentage is out of range or both together exceed 100, if a score is not finite, or if
            there is not one key per score.

    Examples:
        >>> grade_levels([0.5, 2.0, -1.0, 1.0], top_percent=25, bottom_percent=50)
        ['C', 'A', 'C', 'B']
        >>> grade_levels([1.0, 1.0], top_percent=50, bottom_percent=0, keys=["b", "a"])
        ['B', 'A']

    The paper gives percentages and does not say how they are rounded, nor what becomes of ties. Rounded up, in exact
    arithmetic on the numbers as written, 3.73 % gives its Table 1; given keys, the order of the samples is of no
    account.
    """
    _check_percent(top_percent, bottom_percent)
    values, names = _checked(scores, keys)
    return list(map(str, _grade(values, names, top_percent, bottom_percent)))


def grade_within(
    scores: Sequence[float] | np.ndarray,
    groups: Iterable[Hashable],
    *,
    top_percent: float,
    bottom_percent: float,
    keys: Sequence[str] | np.ndarray | None = None,
) -> np.ndarray:
    """Level of each sample, from its rank within its own group (section 4.1: each subset by itself, then gathered).

    Args:
        scores: `(n,)`, as in `grade_levels`.
        groups: n labels, say the data set of each sample.
        top_percent: as in `grade_levels`, of each group; rounded up in each.
        bottom_percent: as in `grade_levels`, of each group.
        keys: n row keys, as in `grade_levels`.

    Returns:
        `(n,)` letters, `A`, `B` or `C`, in the order of `scores`.

    Raises:
        ValueError: as `grade_levels`, and if there is not one label per score.

    Examples:
        >>> grade_within([1.0, 2.0, 9.0], ["x", "x", "y"], top_percent=50, bottom_percent=50).tolist()
        ['C', 'A', 'A']
    """
    _check_percent(top_percent, bottom_percent)
    values, names = _checked(scores, keys)
    members: dict[Hashable, list[int]] = {}
    for position, label in enumerate(groups):
        members.setdefault(label, []).append(position)
    if (given := sum(map(len, members.values()))) != len(values):
        raise ValueError(f"groups: {given} for {len(values)} scores; give one label per sample")
    levels = np.empty(len(values), dtype="<U1")
    for inside in members.values():
        levels[inside] = _grade(values[inside], names[inside], top_percent, bottom_percent)
    return levels


def _grade(scores: np.ndarray, keys: np.ndarray, top_percent: float, bottom_percent: float) -> np.ndarray:
    total = len(scores)
    best = top_percent_count(top_percent, total)
    worst = min(top_percent_count(bottom_percent, total), total - best)
    order = np.lexsort((keys, -scores))
    levels = np.full(total, "B", dtype="<U1")
    levels[order[:best]] = "A"
    levels[order[total - worst :]] = "C"
    return levels


def _check_percent(top_percent: float, bottom_percent: float) -> None:
    if not 0 < top_percent <= 100:
        raise ValueError(f"top_percent: {top_percent}; above 0 and at most 100")
    if not 0 <= bottom_percent <= 100:
        raise ValueError(f"bottom_percent: {bottom_percent}; 0 to 100")
    if Fraction(str(top_percent)) + Fraction(str(bottom_percent)) > 100:
        raise ValueError(
            f"top_percent: {top_percent} and bottom_percent: {bottom_percent}; at most 100 together: lower one of them"
        )


def _checked(
    scores: Sequence[float] | np.ndarray, keys: Sequence[str] | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"scores: shape {values.shape}; give one number per sample, the highest of its responses")
    if keys is not None and len(keys) != len(values):
        raise ValueError(f"keys: {len(keys)} for {len(values)} scores; give one key per sample")
    for number in np.flatnonzero(~np.isfinite(values))[:1]:
        name = "" if keys is None else f" (row {keys[number]})"
        raise ValueError(
            f"scores: sample {number}{name} has the score {values[number]}; it must be finite: score the row again"
        )
    return values, np.arange(len(values)) if keys is None else np.asarray(keys, dtype=str)
