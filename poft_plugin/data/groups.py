"""Ranked rows as the batch layout wants them: the sequences of a sample end to end, position ids restarting at each.

Where prompts are shared, what the sequences of a sample begin with in common lies there once, in front of the first:
`[prompt response][response][response]`. The other responses keep their position ids, which say what they go on from.

Axes: n rows (samples), S sequences of all rows, N tokens of all rows.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from poft_plugin.data.columns import ORDER, RANKED_INPUT_IDS, RANKED_LABELS, SEQUENCE_LENGTHS
from poft_plugin.data.preparation import Rows

CHUNK_ROWS = 8192
"""Rows laid out at a time: what exists twice meanwhile."""


def longest_sequences(rows: Rows) -> np.ndarray:
    """`(n,)`: tokens of the longest sequence of each row."""
    lengths, starts = _sequences(rows.table)
    return np.maximum.reduceat(lengths, starts) if len(starts) else np.zeros(0, dtype=np.int64)


def sequence_lengths(rows: Rows) -> list[np.ndarray]:
    """Tokens of each sequence of each row."""
    lengths, starts = _sequences(rows.table)
    return np.split(lengths, starts[1:])


def lay_out(rows: Rows, *, share_prompts: bool = False) -> pa.Table:
    """Token columns for the trainer, the sequences of each row from best to worst.

    Args:
        rows: ranked rows; where `order` is attached, it says which response comes when.
        share_prompts: leave a row's common prompt out of all its sequences but the first.

    Returns:
        `input_ids`, `labels`, `attention_mask`, `position_ids` (restarting at each sequence; behind the prompt that is
        shared), `sequence_lengths` (tokens that lie there) and `length` (all of a row's tokens).
    """
    order = rows.attached.get(ORDER)
    parts = []
    for start in range(0, max(len(rows), 1), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        table = _lay_out(rows.table.slice(start, CHUNK_ROWS), None if order is None else order[part])
        parts.append(shared(table) if share_prompts else table)
    return pa.concat_tables(parts)


def shared(table: pa.Table) -> pa.Table:
    """Takes a row's common prompt out of all its sequences but the first.

    Args:
        table: as `lay_out` gives it, its sequences whole.

    Returns:
        The same columns. A prompt is the longest run of tokens that all sequences of the row begin with, up to the
        first label that counts in any of them; rows whose sequences share none stay as they are.

    Examples:
        >>> def lists(*values): return pa.array([values], pa.large_list(pa.int32()))
        >>> ids, labels = lists(5, 6, 7, 5, 6, 8), lists(-100, -100, 7, -100, -100, 8)
        >>> plain = {"input_ids": ids, "labels": labels, "attention_mask": ids, "position_ids": lists(0, 1, 2, 0, 1, 2)}
        >>> table = shared(pa.table({**plain, "sequence_lengths": lists(3, 3), "length": [6]}))
        >>> [table[name][0].as_py() for name in ("input_ids", "position_ids", "sequence_lengths", "length")]
        [[5, 6, 7, 8], [0, 1, 2, 2], [3, 1], 4]
    """
    lengths, starts = _sequences(table)
    if not len(lengths):
        return table
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    row = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(lengths))))
    prompt = _prompt_lengths(table, lengths, starts)
    first = np.zeros(len(lengths), dtype=bool)
    first[starts] = True
    keep = np.repeat(first, lengths) | (position >= np.repeat(prompt[row], lengths))
    left = lengths - np.where(first, 0, prompt[row])
    sequences = np.append(starts, len(lengths))
    tokens = np.concatenate([[0], np.cumsum(left)])[sequences]
    columns = {name: table[name] for name in table.column_names}
    for name in ("input_ids", "labels", "attention_mask", "position_ids"):
        columns[name] = _lists(tokens, _values(table, name)[keep], table[name].type.value_type.to_pandas_dtype())
    columns[SEQUENCE_LENGTHS] = _lists(sequences, left, np.int32)
    columns["length"] = np.diff(tokens)
    return pa.table(columns)


def in_order(values: np.ndarray, order: np.ndarray | None) -> list[list[float]]:
    """A per-response column from best to worst.

    Args:
        values: `(n,)` lists in the order of the data.
        order: `(n,)` lists of positions, or None where the data's order stands.

    Examples:
        >>> in_order(ragged([[0.5, 0.9]]), ragged([[1, 0]]))
        [[0.9, 0.5]]
    """
    if order is None:
        return [list(row) for row in values]
    return [[row[position] for position in positions] for row, positions in zip(values, order, strict=True)]


def ragged(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """`(n,)` array of lists, whatever their lengths."""
    values = np.empty(len(rows), dtype=object)
    for number, row in enumerate(rows):
        values[number] = row
    return values


def responses(rows: Rows) -> Iterator[list[np.ndarray]]:
    """For each row the counted token ids of its responses, from best to worst."""
    order = rows.attached.get(ORDER)
    for start in range(0, len(rows), CHUNK_ROWS):
        table = rows.table.slice(start, CHUNK_ROWS)
        lengths, starts = _sequences(table)
        labels = _values(table, RANKED_LABELS)
        sequences = np.split(labels, np.cumsum(lengths)[:-1])
        groups = np.split(np.arange(len(lengths)), starts[1:])
        for number, group in enumerate(groups):
            positions = group if order is None else group[np.asarray(order[start + number])]
            yield [_counted(sequences[position]) for position in positions]


def _counted(labels: np.ndarray) -> np.ndarray:
    """Labels that count; a sequence's first token is predicted by nothing."""
    return labels[1:][labels[1:] >= 0]


def _lay_out(table: pa.Table, order: np.ndarray | None) -> pa.Table:
    lengths, starts = _sequences(table)
    input_ids, labels = _values(table, RANKED_INPUT_IDS), _values(table, RANKED_LABELS)
    if order is not None and len(order):
        within = np.concatenate([np.asarray(positions) for positions in order])
        moved = within + np.repeat(starts, np.diff(np.append(starts, len(lengths))))
        begins = np.cumsum(lengths) - lengths
        lengths, begins = lengths[moved], begins[moved]
        index = np.repeat(begins - (np.cumsum(lengths) - lengths), lengths) + np.arange(len(input_ids))
        input_ids, labels = input_ids[index], labels[index]
    positions = np.arange(len(input_ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = np.append(starts, len(lengths))
    tokens = np.concatenate([[0], np.cumsum(lengths)])[rows]
    return pa.table(
        {
            "input_ids": _lists(tokens, input_ids, np.int32),
            "labels": _lists(tokens, labels, np.int32),
            "attention_mask": _lists(tokens, np.ones(len(input_ids)), np.int8),
            "position_ids": _lists(tokens, positions, np.int32),
            SEQUENCE_LENGTHS: _lists(rows, lengths, np.int32),
            "length": np.diff(tokens),
        }
    )


def _prompt_lengths(table: pa.Table, lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """`(n,)`: tokens that all sequences of a row begin with, before any that counts."""
    input_ids, labels = _values(table, "input_ids"), _values(table, "labels")
    begins = np.cumsum(lengths) - lengths
    position = np.arange(len(input_ids)) - np.repeat(begins, lengths)
    first = np.repeat(starts, np.diff(np.append(starts, len(lengths))))  # each sequence's row's first sequence
    there = position < np.repeat(lengths[first], lengths)
    opposite = np.where(there, np.repeat(begins[first], lengths) + position, 0)
    common = there & (labels < 0) & (input_ids == input_ids[opposite])
    # a token is left to every sequence, whatever counts in it
    agreed = np.minimum.reduceat(np.where(common, np.repeat(lengths - 1, lengths), position), begins)
    return np.asarray(np.minimum.reduceat(agreed, starts))


def _lists(offsets: np.ndarray, values: np.ndarray, dtype: type) -> pa.LargeListArray:
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values.astype(dtype)))


def _sequences(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """`(S,)` tokens of each sequence, and `(n,)` the first sequence of each row."""
    column = table[SEQUENCE_LENGTHS].combine_chunks()
    counts = np.asarray(column.value_lengths())
    return np.asarray(column.flatten(), dtype=np.int64), np.cumsum(counts) - counts


def _values(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(table[name].combine_chunks().flatten())
