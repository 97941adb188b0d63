"""Graded rows as files: one line per response with its score and level, or the rows themselves, ready to train on."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from poft_plugin.data.columns import LEVEL, ORDER, RANKS, SCORES, SOURCE
from poft_plugin.data.preparation import Rows
from poft_plugin.data.ranked import RankedSample, dense_ranks
from poft_plugin.data.rows import dump_conversation, row_key
from poft_plugin.scoring.cache import atomic_file
from poft_plugin.scoring.exchange import METADATA
from poft_plugin.scoring.identity import Identity

EXPORTED = pa.schema(
    [
        ("model", pa.string()), ("row_key", pa.string()), ("reward", pa.float64()), ("num_tokens", pa.int32()),
        ("sample_key", pa.string()), ("response", pa.int32()), ("level", pa.string()), ("source", pa.string()),
    ]
)  # fmt: skip


def export_graded(
    path: Path, parts: Sequence[Rows], levels: Sequence[str], scored_by: Mapping[str, Identity | None], *, texts: bool
) -> int:
    """Writes one line per response: `row_key, model, reward, num_tokens, sample_key, response, level, source`.

    Args:
        path: the parquet file to write, atomically.
        parts: training rows with `scores` and `level` attached, and evaluation rows, which have no level; those without
            scores are left out.
        levels: letters of the rows to write; none means all rows.
        scored_by: the name of the job whose scores they are, with its identity; empty for the data's own.
        texts: a column `conversation` besides.

    Returns:
        The number of lines. `response` counts from 0, the best by the run's own order; `row_key` is the response's own
        key, as `axolotl poft import` asks for it.
    """
    ((model, identity),) = scored_by.items() or [("data", None)]
    scored = [rows for rows in parts if SCORES in rows.attached]
    lines = [(model, *line) for rows in scored for index in _chosen(rows, levels) for line in _responses(rows, index)]
    schema = EXPORTED.append(pa.field("conversation", pa.string())) if texts else EXPORTED
    columns = list(zip(*lines, strict=True)) or [()] * len(schema)
    described = {model: None if identity is None else dict(identity.fields)}
    metadata = {METADATA: json.dumps({"scorers": described}).encode()}
    table = pa.table(list(columns[: len(schema)]), schema=schema).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)
    return len(lines)


def write_graded_rows(path: Path, rows: Rows, levels: Sequence[str]) -> int:
    """Writes the rows as JSON lines that the same methods read again.

    Where all rows are pairs, they have `messages`, `chosen` and `rejected`; otherwise all have `messages` and
    `responses`, best first: one file is of one dataset type. Both have `scores` (`reward_scores` where the responses of
    a list are in another order), `level` and `source`.

    Args:
        path: the file to write, atomically.
        rows: training rows with `scores`, `ranks` and `level` attached.
        levels: letters of the rows to write; none means all.

    Returns:
        The number of rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = _chosen(rows, levels)
    pairs = all(len(rows.attached[SCORES][index]) == 2 for index in chosen)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for index in chosen:
            file.write(json.dumps(_as_row(rows, index, pair=pairs), ensure_ascii=False) + "\n")
    return len(chosen)


def _responses(rows: Rows, index: int) -> Iterator[tuple[Any, ...]]:
    """The lines of one row, the best response first; who scored it elsewhere may not have counted tokens."""
    sample, levels = rows.sample(index), rows.attached.get(LEVEL)
    level = None if levels is None else str(levels[index])
    for response, position in enumerate(_positions(rows, index, sample)):
        conversation, score = sample.conversation(position), rows.attached[SCORES][index][position]
        where = (rows.keys[index].as_py(), response, level, rows.table[SOURCE][index].as_py())
        yield row_key(conversation), score, None, *where, dump_conversation(conversation)


def _as_row(rows: Rows, index: int, *, pair: bool) -> dict[str, Any]:
    sample = rows.sample(index)
    positions = _positions(rows, index, sample)
    responses = [sample.responses[position] for position in positions]
    row: dict[str, Any] = {"messages": [{"role": turn.role, "content": turn.content} for turn in sample.prompt]}
    if pair:
        answers = [{"role": "assistant", "content": text} for text in responses]
        row |= dict(zip(("chosen", "rejected"), answers, strict=True))
    else:
        row["responses"] = responses
    scores = [rows.attached[SCORES][index][position] for position in positions]
    ranks = tuple(rows.attached[RANKS][index][position] for position in positions)
    # a list is sorted by `scores` when it is read: scores that would change its ranks are called otherwise
    return row | {
        "scores" if pair or dense_ranks(scores) == ranks else "reward_scores": scores,
        "level": str(rows.attached[LEVEL][index]),
        "source": rows.table[SOURCE][index].as_py(),
    }


def _positions(rows: Rows, index: int, sample: RankedSample) -> list[int]:
    order = rows.attached.get(ORDER)
    return list(range(len(sample.responses))) if order is None else list(order[index])


def _chosen(rows: Rows, levels: Sequence[str]) -> list[int]:
    if not levels:
        return list(range(len(rows)))
    return [] if LEVEL not in rows.attached else np.flatnonzero(np.isin(rows.attached[LEVEL], levels)).tolist()
