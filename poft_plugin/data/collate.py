"""The one batch layout: sequences, packed or one a row, with per-sequence numbers beside them.

Axes: R rows and L tokens of the padded batch, S sequences in it, G groups (samples).

A dataset row is one *sample*. It holds one or more sequences end to end in `input_ids` (`sequence_lengths` says where
they end; without that column a row is one sequence). Packed, samples lie in a pack as they are; unpacked, every
sequence becomes a row of its own. The host's own collator lays the tokens out; this one takes the per-sequence columns
out before and puts them back beside the tokens, as flat tensors in the order of the sequences.

A sample may hold a prompt once for all of its sequences (`groups.shared`): in front of the first, whose number its
tokens bear. The others' position ids then begin behind it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from poft_plugin.data.columns import SEQUENCE_LENGTHS, TOKEN_COLUMNS

SEQUENCE_IDS = "sequence_ids"
GROUP_IDS = "group_ids"
PADDING = -1
PER_TOKEN = ("input_ids", "labels", "attention_mask", "token_type_ids")

Row = Mapping[str, Any]
TokenCollator = Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class MethodCollator:
    """Lays out a batch.

    Args:
        tokens: the host's collator for the token columns (`input_ids`, `labels`, `position_ids`, `attention_mask`).
        columns: names of the columns that the method needs; each value is a list of one number per sequence of the
            row, or a number for all of them.
        padding_side: where the host pads.
        optional: columns that are taken along where the rows have them.
        count_positions: give batches without position ids some: models count padding, too, without them.

    Returns:
        On call: the host's batch, plus `sequence_ids (R, L)` (the sequence of each token, -1 on padding),
        `group_ids (S,)` (the sample of each sequence) and each column as `(S,)` float64.

    Raises:
        ValueError: where a row lacks a column, or its numbers are not as many as its sequences, naming the column.
    """

    tokens: TokenCollator
    columns: tuple[str, ...]
    padding_side: str = "right"
    optional: tuple[str, ...] = ()
    count_positions: bool = False

    def __call__(self, features: Sequence[Row] | Sequence[Sequence[Row]]) -> dict[str, Any]:
        """Features come as a list of rows, or, packed, as a list of packs of rows."""
        packed = bool(features) and not isinstance(features[0], Mapping)
        packs = [[item] if isinstance(item, Mapping) else list(item) for item in features]
        columns = self._columns([row for pack in packs for row in pack])
        if not packed:
            packs = [[sequence] for pack in packs for row in pack for sequence in _split(row)]
        tokens = [[{k: v for k, v in row.items() if k in TOKEN_COLUMNS} for row in pack] for pack in packs]
        batch = dict(self.tokens(tokens if packed else [row for pack in tokens for row in pack]))
        batch[SEQUENCE_IDS] = _sequence_ids(packs, batch["input_ids"], self.padding_side)
        if self.count_positions or "position_ids" in batch:
            batch["position_ids"] = _within_reach(batch.get("position_ids"), batch[SEQUENCE_IDS])
        return batch | columns

    def _columns(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        lengths = [len(_lengths(row)) for row in rows]
        batch = {GROUP_IDS: torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))}
        taken_along = [name for name in self.optional if all(name in row for row in rows)]
        for name in (*self.columns, *taken_along):
            if any(name not in row for row in rows):
                raise ValueError(
                    f"a batch without the column {name!r}: this dataset did not come through the plugin's own "
                    "preparation (`axolotl preprocess` / `axolotl train`)"
                )
            values = [_as_list(row[name], length) for row, length in zip(rows, lengths, strict=True)]
            for row_values, length in zip(values, lengths, strict=True):
                if len(row_values) != length:
                    raise ValueError(
                        f"the column {name!r} has {len(row_values)} number(s) in a row of {length} sequence(s); "
                        "one per sequence"
                    )
            batch[name] = torch.tensor([value for part in values for value in part], dtype=torch.float64)
        return batch


def _sequence_ids(packs: Sequence[Sequence[Row]], input_ids: Tensor, padding_side: str) -> Tensor:
    """`(R, L)`: numbers the sequences through the batch; padding is -1."""
    ids = torch.full(input_ids.shape, PADDING, dtype=torch.long, device=input_ids.device)
    number = 0
    for row, pack in enumerate(packs):
        lengths = [length for sample in pack for length in _lengths(sample)]
        position = 0 if padding_side == "right" else input_ids.shape[1] - sum(lengths)
        for length in lengths:
            ids[row, position : position + length] = number
            number, position = number + 1, position + length
    return ids


def _within_reach(positions: Tensor | None, sequences: Tensor) -> Tensor:
    """Position ids whose padding goes no farther than the longest sequence: some models look at the highest one.

    Args:
        positions: `(R, L)`, as the host pads them; None to count each row's, which is one sequence, from its first.
        sequences: `(R, L)`, the sequence of each token, -1 on padding.
    """
    real = sequences != PADDING
    if positions is None:
        positions = torch.arange(real.shape[1], device=real.device) - real.int().argmax(dim=1, keepdim=True)
    return torch.where(real, positions, positions % (positions[real].max() + 1))


def _lengths(row: Row) -> list[int]:
    return [int(n) for n in row[SEQUENCE_LENGTHS]] if SEQUENCE_LENGTHS in row else [len(row["input_ids"])]


def _split(row: Row) -> list[Row]:
    """The sequences of a sample, each as a row with its prompt; position ids are left to the model."""
    if SEQUENCE_LENGTHS not in row:
        return [row]
    ends = list(accumulate(_lengths(row)))
    names = [name for name in PER_TOKEN if name in row]
    sequences: list[Row] = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        sequence = {name: row[name][start:end] for name in names}
        prompt = int(row["position_ids"][start]) if "position_ids" in row else 0
        if prompt:
            sequence = {name: [*row[name][:prompt], *part] for name, part in sequence.items()}
        sequences.append(sequence)
    return sequences


def _as_list(value: Any, length: int) -> list[float]:
    if isinstance(value, Tensor):
        value = value.reshape(-1).tolist() if value.ndim else value.item()
    return list(value) if isinstance(value, (list, tuple)) else [value] * length
