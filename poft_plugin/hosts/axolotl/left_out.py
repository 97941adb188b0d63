"""What is said where rows are left out, and where none are left."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets

from poft_plugin.data.columns import LEFT_OUT, ROW_NUMBER, SOURCE

NAMED = 5
"""Rows that were left out are named up to this many."""

LEFT_OUT_TYPE = Sequence(Value("int64"))


def without(rows: Dataset, bad: np.ndarray) -> Dataset:
    """The rows that can be used; each knows what was left out of its data set, for the summary of any later run.

    Args:
        rows: of one data set.
        bad: `(n,)` booleans.
    """
    if not bad.any():
        return rows
    numbers = np.asarray(rows[ROW_NUMBER])[bad][:NAMED].tolist()
    kept = rows.remove_columns(LEFT_OUT).select(np.flatnonzero(~bad))
    left_out = [[int(bad.sum()), len(bad), *numbers]] * len(kept)
    column = Dataset.from_dict({LEFT_OUT: left_out}, features=Features({LEFT_OUT: LEFT_OUT_TYPE}))
    return concatenate_datasets([kept, column], axis=1)


def left_out_lines(tables: Iterable[pa.Table]) -> list[str]:
    """A line for each data set that has lost rows when it was read.

    Args:
        tables: prepared rows.
    """
    known: dict[str, list[int]] = {}
    for table in tables:
        if LEFT_OUT in table.column_names and len(table):
            pairs = pa.table({SOURCE: table[SOURCE], LEFT_OUT: table[LEFT_OUT]})
            first = (
                pairs.append_column("at", pa.array(np.arange(len(pairs)))).group_by(SOURCE).aggregate([("at", "min")])
            )
            known |= {row[SOURCE]: row[LEFT_OUT] for row in pairs.take(first["at_min"]).to_pylist() if row[LEFT_OUT]}
    lines = []
    for source, (count, total, *numbers) in known.items():
        more = f" and {count - len(numbers)} more" if count > len(numbers) else ""
        named = f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}{more}"
        lines.append(f"{source}: {count:,} of {total:,} rows left out when it was read: {named}")
    return lines


def set_name(cfg: Mapping[str, Any], *, evaluation: bool) -> str:
    """The key that a set's rows come from, as messages name it."""
    if not evaluation:
        return "datasets"
    return "test_datasets" if cfg.get("test_datasets") else "val_set_size"


def nothing_left(total: int, name: str, why: str, remedy: str = "") -> ValueError:
    """An error for a set of which no row is left.

    Args:
        total: its rows before.
        name: where they come from, as `set_name` gives it.
        why: how the sentence goes on that says that they were left out.
        remedy: what helps.

    Examples:
        >>> nothing_left(3, "test_datasets", "by the filter short", "Change the filter")
        ValueError('no rows left to evaluate on: all 3 of test_datasets were left out by the filter short. Change the \
filter')
    """
    purpose = "train" if name == "datasets" else "evaluate"
    end = f". {remedy}" if remedy else ""
    return ValueError(f"no rows left to {purpose} on: all {total} of {name} were left out {why}{end}")


def over_length(sequence_len: int, longest: str, tokens: int) -> tuple[str, str]:
    """Why rows over `sequence_len` are left out, and the remedy.

    Args:
        sequence_len: the bound.
        longest: names the longest row.
        tokens: of its longest sequence.
    """
    why = f"for a sequence over sequence_len {sequence_len}, the longest {longest} with {tokens} tokens"
    return why, f"Set `sequence_len: {tokens}` or more, or shorten the rows"
