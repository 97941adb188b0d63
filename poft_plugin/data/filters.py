"""Row filters: which training rows stay."""

from fractions import Fraction
from math import ceil
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from poft_plugin.data.columns import LEVEL, REFERENCE_LOGP
from poft_plugin.data.preparation import Rows

Percent = Annotated[float, Field(gt=0, le=100)]


def top_percent_count(percent: float, total: int) -> int:
    """`ceil(percent * total / 100)` in exact arithmetic on the number as written.

    Examples:
        >>> top_percent_count(8.8, 375)  # in floats, 8.8 * 375 / 100 is a little above 33
        33
    """
    return ceil(Fraction(str(percent)) * total / 100)


def keep_top_percent(rows: Rows, *, percent: Percent, within: str = "none", column: str = REFERENCE_LOGP) -> np.ndarray:
    """Keeps the rows with the highest score, the paper's filter by preference score (section 4.3, Fig. 4).

    Args:
        rows: training rows with `column` attached.
        percent: share to keep, in percent of the rows of each group; rounded up, in exact arithmetic.
        within: `none`, `dataset` or the name of the column that rows carry as their group.
        column: the score to sort by, descending; ties are broken by row key.

    Returns:
        `(len(rows),)` booleans.

    Raises:
        ValueError: if `percent` is not above 0 and at most 100.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"keep_top_percent: percent: {percent}; above 0 and at most 100")
    scores = rows.attached[column]
    keys = np.asarray(rows.keys.to_pylist())
    order = np.lexsort((keys, -scores))
    keep = np.zeros(len(rows), dtype=bool)
    groups = rows.groups(within)[order]
    for group in dict.fromkeys(groups.tolist()):
        members = order[groups == group]
        keep[members[: top_percent_count(percent, len(members))]] = True
    return keep


def keep_levels(rows: Rows, *, levels: Literal["A", "B", "C", "A+B", "B+C"]) -> np.ndarray:
    """Keeps the rows of the given grades, DEFT's level A for instance (section 3.1).

    Args:
        rows: training rows with `level` attached.
        levels: letters, joined by `+`.

    Returns:
        `(len(rows),)` booleans.

    Raises:
        ValueError: if the rows carry no level: the method grades nothing.
    """
    if LEVEL not in rows.attached:
        raise ValueError("keep_levels: the rows have no level; it goes with an `rl: deft_...` that grades")
    return np.isin(rows.attached[LEVEL], levels.split("+"))
