"""What is said where rows are left out, and where none are left."""

from collections.abc import Mapping
from typing import Any


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
