"""Rows as one pack in which what they begin with in common lies once: every prefix is read once.

Rows are sorted by their tokens. Each then shares more with the row before it than with any earlier one, and a pack
holds of each row what the row before does not have: as many tokens as a prefix tree of the rows has nodes. Nothing is
padded. `attention.shared` gives each row what a forward of its own would give.

Axes: n rows, T tokens of the pack.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from poft_plugin.scoring.scorer import PreparedRow


@dataclass(frozen=True)
class Pack:
    """Rows end to end, without what each has in common with the row before.

    Args:
        input_ids: `(T,)` token ids.
        position_ids: `(T,)`, the position of each token in its row; a row begins behind what it shares.
        places: n arrays: where in the pack the tokens of each row lie, all of them.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    places: tuple[np.ndarray, ...]


def lay_out(rows: Sequence[PreparedRow]) -> Pack:
    """One pack of the rows, in the order given.

    Examples:
        >>> row = lambda *ids: PreparedRow("", np.array(ids, np.int32), np.ones(len(ids), bool))
        >>> pack = lay_out([row(5, 6, 7), row(5, 6, 8, 9)])
        >>> pack.input_ids.tolist(), pack.position_ids.tolist(), pack.places[1].tolist()
        ([5, 6, 7, 8, 9], [0, 1, 2, 2, 3], [0, 1, 3, 4])
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    places: list[np.ndarray] = []
    begin = 0
    for row, shared in zip(rows, shared_lengths(rows), strict=True):
        own = len(row) - shared
        before = places[-1][:shared] if places else np.zeros(0, dtype=np.int64)
        ids.append(row.input_ids[shared:])
        positions.append(np.arange(shared, len(row)))
        places.append(np.concatenate([before, np.arange(begin, begin + own)]))
        begin += own
    return Pack(np.concatenate(ids), np.concatenate(positions), tuple(places))


def pack_batches(rows: Sequence[PreparedRow], batch_tokens: int) -> Iterator[list[PreparedRow]]:
    """Batches of rows that begin alike, each of at most so many tokens as a pack; a longer row is a batch of its own.

    Examples:
        >>> row = lambda *ids: PreparedRow("", np.array(ids, np.int32), np.ones(len(ids), bool))
        >>> batches = pack_batches([row(9, 9), row(1, 2, 4), row(1, 2, 3)], 4)
        >>> [[r.input_ids.tolist() for r in batch] for batch in batches]
        [[[1, 2, 3], [1, 2, 4]], [[9, 9]]]
    """
    ordered = sorted(rows, key=_by_tokens)
    batch: list[PreparedRow] = []
    tokens = 0
    for row, shared in zip(ordered, shared_lengths(ordered), strict=True):
        if batch and tokens + len(row) - shared > batch_tokens:
            yield batch
            batch, tokens, shared = [], 0, 0
        batch.append(row)
        tokens += len(row) - shared
    if batch:
        yield batch


def predictions(rows: Sequence[PreparedRow], pack: Pack) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the counted tokens of the rows are predicted: by the token before in the row, wherever that lies.

    Returns:
        `(N,)` positions in the pack, `(N,)` target ids, `(N,)` row numbers.
    """
    counted = [np.flatnonzero(row.counted) for row in rows]
    positions = [places[at - 1] for places, at in zip(pack.places, counted, strict=True)]
    targets = [row.input_ids[at] for row, at in zip(rows, counted, strict=True)]
    numbers = np.repeat(np.arange(len(rows)), [len(at) for at in counted])
    return np.concatenate(positions), np.concatenate(targets).astype(np.int64), numbers


def pack_inputs(pack: Pack, device: str) -> dict[str, torch.Tensor]:
    """`input_ids` and `position_ids`, `(1, T)`, on a device."""
    named = {"input_ids": pack.input_ids, "position_ids": pack.position_ids}
    return {name: torch.from_numpy(values.astype(np.int64))[None].to(device) for name, values in named.items()}


def shared_lengths(rows: Sequence[PreparedRow]) -> list[int]:
    """How many tokens each row has in common with the one before, at its beginning; a row's last is always its own."""
    lengths = [0] * len(rows)
    for number in range(1, len(rows)):
        before, here = rows[number - 1].input_ids, rows[number].input_ids
        most = min(len(before), len(here) - 1)
        differing = np.flatnonzero(before[:most] != here[:most])
        lengths[number] = int(differing[0]) if len(differing) else most
    return lengths


def probe_rows(vocabulary: int) -> list[PreparedRow]:
    """Rows of random ids that begin alike, in the order of their tokens: prefixes within prefixes, and none.

    Args:
        vocabulary: ids are below it.
    """
    words = np.arange(min(vocabulary, 1000))
    random = np.random.default_rng(0)
    stem = random.choice(words, 9)
    forms = [(9, 6), (9, 4), (6, 5), (0, 7), (3, 8)]  # tokens of the stem, and of the row's own
    ids = [np.concatenate([stem[:kept], random.choice(words, own)]).astype(np.int32) for kept, own in forms]
    rows = [PreparedRow(str(number), row, np.arange(len(row)) > 1) for number, row in enumerate(ids)]
    return sorted(rows, key=_by_tokens)


def _by_tokens(row: PreparedRow) -> bytes:
    return row.input_ids.astype(">u4").tobytes()
