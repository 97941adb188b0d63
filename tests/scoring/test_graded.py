"""Graded rows as files: a line per response, and rows that the same methods read again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from poft_plugin.config import parse_block
from poft_plugin.data.columns import LEVEL, ORDER, RANKS, SCORES
from poft_plugin.data.groups import ragged
from poft_plugin.data.preparation import Rows
from poft_plugin.data.ranked import RankedSample, dense_ranks
from poft_plugin.data.rows import Turn, load_conversation, row_key
from poft_plugin.hosts.axolotl.ranked_fields import PAIRS, RANKED, RankedFields
from poft_plugin.hosts.axolotl.ranked_rows import ranked_reader
from poft_plugin.scoring.graded import EXPORTED, export_graded, write_graded_rows
from scoring.ranked_support import ranked

PROMPT = (Turn("system", "be"), Turn("user", "Äther?"), Turn("assistant", "so"), Turn("user", "and?"))
PAIR_ROWS = [RankedSample((*PROMPT[:3], Turn("user", f"{n}?")), (f"good {n}", f"bad {n}"), (0, 1)) for n in range(3)]
PAIR_SCORES = [[1.0, 2.0], [0.5, -3.0], [2.0, 2.0]]


def with_columns(samples: list[RankedSample], scores: list[list[float]], levels: str, *, by_reward: bool) -> Rows:
    """As the preprocessors leave them."""
    columns: dict[str, Any] = {SCORES: ragged(scores), LEVEL: np.array(list(levels))}
    columns[RANKS] = ragged([list(sample.ranks) for sample in samples])
    if by_reward:
        columns[RANKS] = ragged([list(dense_ranks(row)) for row in scores])
        columns[ORDER] = ragged([sorted(range(len(row)), key=lambda i, row=row: -row[i]) for row in scores])
    return Rows(ranked(samples).table, columns)


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(kind: str, row: dict[str, Any]) -> RankedSample:
    fields = parse_block(RankedFields, {}, "datasets[0]")
    return ranked_reader(kind, fields)(row, "row")


@pytest.mark.parametrize("by_reward", [False, True])
def test_lines(tmp_path: Path, by_reward: bool) -> None:
    """The best response by the run's own order is 0; evaluation rows have no level."""
    train = with_columns(PAIR_ROWS, PAIR_SCORES, "ABC", by_reward=by_reward)
    held_out = with_columns(PAIR_ROWS[:1], PAIR_SCORES[:1], "A", by_reward=by_reward)
    evaluation = Rows(held_out.table, {k: v for k, v in held_out.attached.items() if k != LEVEL})
    path = tmp_path / "new" / "scores.parquet"
    assert export_graded(path, [train, evaluation], (), {}, texts=False) == 8
    table = pq.read_table(path)
    assert table.schema.names == EXPORTED.names
    lines = table.to_pylist()
    assert [line["response"] for line in lines] == [0, 1] * 4
    assert [line["level"] for line in lines] == ["A", "A", "B", "B", "C", "C", None, None]
    assert {(line["model"], line["source"], line["num_tokens"]) for line in lines} == {("data", "data.jsonl", None)}
    rewards = [line["reward"] for line in lines]
    assert rewards == ([2.0, 1.0] if by_reward else [1.0, 2.0]) + [0.5, -3.0, 2.0, 2.0] + rewards[:2]
    first = 1 if by_reward else 0
    assert lines[0]["row_key"] == row_key(PAIR_ROWS[0].conversation(first))
    assert lines[0]["sample_key"] == PAIR_ROWS[0].key
    assert json.loads(table.schema.metadata[b"poft_plugin"]) == {"scorers": {"data": None}}
    assert not list(tmp_path.rglob(".*"))


def test_levels_and_texts(tmp_path: Path) -> None:
    train = with_columns(PAIR_ROWS, PAIR_SCORES, "ABC", by_reward=False)
    path = tmp_path / "scores.parquet"
    assert export_graded(path, [train], ("A", "C"), {}, texts=True) == 4
    table = pq.read_table(path)
    assert set(table["level"].to_pylist()) == {"A", "C"}
    for line in table.to_pylist():
        assert row_key(load_conversation(line["conversation"])) == line["row_key"]
    ungraded = Rows(train.table, {k: v for k, v in train.attached.items() if k != LEVEL})
    assert export_graded(path, [ungraded], ("A",), {}, texts=False) == 0
    assert pq.read_table(path).schema.names == EXPORTED.names
    assert export_graded(path, [ungraded], ("A",), {}, texts=True) == 0
    assert pq.read_table(path).schema.names == [*EXPORTED.names, "conversation"]


@pytest.mark.parametrize("by_reward", [False, True])
def test_pairs_are_read_again(tmp_path: Path, by_reward: bool) -> None:
    rows = with_columns(PAIR_ROWS, PAIR_SCORES, "ABA", by_reward=by_reward)
    path = tmp_path / "new" / "a.jsonl"
    assert write_graded_rows(path, rows, ("A",)) == 2
    found = written(path)
    assert [row["level"] for row in found] == ["A", "A"]
    assert {row["source"] for row in found} == {"data.jsonl"}
    for row, sample, scores in zip(found, PAIR_ROWS[::2], PAIR_SCORES[::2], strict=True):
        texts = sample.responses[::-1] if by_reward and scores[1] > scores[0] else sample.responses
        expected = tuple(sorted(scores, reverse=True)) if by_reward else tuple(scores)
        assert read(PAIRS[1], row) == RankedSample(sample.prompt, texts, (0, 1), expected)
    assert write_graded_rows(path, rows, ()) == 3
    assert "Äther" in path.read_text(encoding="utf-8")


LIST_ROWS = [
    RankedSample((Turn("user", "one?"),), ("a", "b", "c"), (0, 1, 1), (3.0, 1.0, 1.0)),
    RankedSample((Turn("user", "two?"),), ("a", "b"), (0, 1), (2.0, -1.0)),
    RankedSample((Turn("user", "three?"),), ("a", "b", "c", "d"), (0, 1, 2, 3)),
]


def test_lists_are_read_again(tmp_path: Path) -> None:
    """Of one file, by one dataset type: a list of two among longer ones is a list, too."""
    samples = LIST_ROWS[1::-1]
    rows = with_columns(samples, [list(s.scores or ()) for s in samples], "AA", by_reward=False)
    path = tmp_path / "a.jsonl"
    assert write_graded_rows(path, rows, ()) == 2
    assert [read(RANKED, row) for row in written(path)] == samples


@pytest.mark.parametrize("by_reward", [False, True])
def test_a_list_is_read_again_in_the_runs_order(tmp_path: Path, by_reward: bool) -> None:
    """A list is sorted by `scores` when it is read: those of another order are called otherwise."""
    scores = [[0.0, 5.0, 2.0], [1.0, 4.0], [4.0, 3.0, 2.0, 1.0]]
    rows = with_columns(LIST_ROWS, scores, "AAA", by_reward=by_reward)
    path = tmp_path / "a.jsonl"
    write_graded_rows(path, rows, ())
    found = written(path)
    again = [read(RANKED, row) for row in found]
    orders = [[1, 2, 0], [1, 0], [0, 1, 2, 3]] if by_reward else [[0, 1, 2], [0, 1], [0, 1, 2, 3]]
    for index, (row, sample) in enumerate(zip(found, again, strict=True)):
        assert sample.responses == tuple(LIST_ROWS[index].responses[position] for position in orders[index])
        given = [scores[index][position] for position in orders[index]]
        name = "scores" if given == sorted(given, reverse=True) else "reward_scores"
        assert row[name] == given and len({"scores", "reward_scores"} & row.keys()) == 1
