"""Which rows are set aside for evaluation: a matter of their keys alone."""

from collections.abc import Sequence

import numpy as np


def evaluation_rows(keys: Sequence[str], count: int) -> np.ndarray:
    """Sets the rows with the lowest keys aside; rows of one key stay together.

    Keys are hashes, so that this is a random choice that depends neither on the order of the rows nor on a seed. Where
    rows are added, each that enters evaluation takes the place of one other at most, and all others stay where they
    are.

    Args:
        keys: `(n,)`, row keys.
        count: rows to set aside; a few more where the last key has several rows.

    Returns:
        `(n,)` booleans: True for evaluation.

    Examples:
        >>> evaluation_rows(["c", "a", "b", "a"], 1).tolist()
        [False, True, False, True]
    """
    names = np.asarray(keys)
    if count < 1 or not len(names):
        return np.zeros(len(names), dtype=bool)
    return np.asarray(names <= np.sort(names)[min(count, len(names)) - 1])
