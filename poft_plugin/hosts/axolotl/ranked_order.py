"""What a preference row says about the order of its responses: scores, ranks, or which one won."""

from collections.abc import Sequence
from typing import Any

from poft_plugin.data.rows import RowError
from poft_plugin.hosts.axolotl.ranked_fields import RankedFields, Row, field_of, shown


def scores_of(row: Row, fields: RankedFields, where: str) -> Sequence[float] | None:
    """The scores that come with a row, in the order of its responses; None where it has none.

    Raises:
        RowError: where it has some of several columns.
    """
    if isinstance(fields.field_scores, str):
        return row.get(fields.field_scores)
    found: list[Any] = [row.get(name) for name in fields.field_scores]
    if all(value is None for value in found):
        return None
    missing = [name for name, value in zip(fields.field_scores, found, strict=True) if value is None]
    if missing:
        raise RowError(f"{where}: no score under {missing[0]!r}, though the row has others. Remove the row, or fill it")
    return found


def ranks_of(row: Row, fields: RankedFields, where: str) -> Sequence[float] | None:
    """The column of ranks, where the entry names one."""
    return None if fields.field_ranks is None else field_of(row, fields.field_ranks, where)


def ranks_by_winner(row: Row, names: Sequence[str], fields: RankedFields, where: str) -> Sequence[int] | None:
    """Ranks that follow from a column that says which response is the best: the others are equals.

    Raises:
        RowError: where it names none of them (a tie, say).
    """
    if fields.field_winner is None:
        return None
    found = _as_name(field_of(row, fields.field_winner, where))
    values = [_as_name(value) for value in fields.winner_values or range(len(names))]
    if fields.winner_values is None and found in names:
        values = list(names)
    if values.count(found) != 1 or len(values) != len(names):
        raise RowError(
            f"{where}: {fields.field_winner!r} is {shown(row[fields.field_winner])}, which names none of the "
            f"{len(names)} responses ({', '.join(values)}). Set `winner_values:` to what it says for each of "
            f"{', '.join(names)}, or remove the row"
        )
    return [int(value != found) for value in values]


def _as_name(value: Any) -> str:
    """A value of the winner's column as text: 1, 1.0 and "1" are the same, and so are true and "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
