"""Ranked rows laid out for the trainer, against loops over Python lists."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from poft_plugin.data import groups
from poft_plugin.data.groups import in_order, lay_out, longest_sequences, ragged, responses
from poft_plugin.data.preparation import Rows

X = -100
TokensAndLabels = tuple[list[int], list[int]]
"""Token ids and labels."""


@dataclass
class Sample:
    """The sequences of a row in the order of the data, and the positions from best to worst."""

    sequences: list[TokensAndLabels]
    order: list[int] = field(default_factory=list)

    def sorted(self) -> list[TokensAndLabels]:
        """From best to worst."""
        return [self.sequences[position] for position in self.order]


def samples(count: int, seed: int = 0, *, shuffled: bool) -> list[Sample]:
    """Random rows: one to five sequences of one to nine tokens; some count, and the first may."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        sequences = []
        for _ in range(rng.randint(1, 5)):
            ids = [rng.randint(0, 99) for _ in range(rng.randint(1, 9))]
            sequences.append((ids, [rng.choice([X, token]) for token in ids]))
        order = list(range(len(sequences)))
        if shuffled:
            rng.shuffle(order)
        found.append(Sample(sequences, order))
    return found


def rows(found: list[Sample], *, attach: bool, chunks: int = 1) -> Rows:
    """The samples as preparation holds them, maybe in several chunks."""

    def table(part: list[Sample]) -> pa.Table:
        ids = [[token for ids, _ in sample.sequences for token in ids] for sample in part]
        labels = [[label for _, labels in sample.sequences for label in labels] for sample in part]
        lengths = [[len(ids) for ids, _ in sample.sequences] for sample in part]
        lists = pa.list_(pa.int32())
        return pa.table(
            {
                "ranked_input_ids": pa.array(ids, lists),
                "ranked_labels": pa.array(labels, lists),
                "sequence_lengths": pa.array(lengths, lists),
            }
        )

    size = max(1, -(-len(found) // chunks))
    parts = [table(found[start : start + size]) for start in range(0, max(len(found), 1), size)]
    return Rows(pa.concat_tables(parts), {"order": ragged([sample.order for sample in found])} if attach else {})


def expected(found: list[Sample]) -> dict[str, list[Any]]:
    """The columns, a token at a time."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "labels", "attention_mask", "position_ids", "sequence_lengths", "length")
    }
    for sample in found:
        line: dict[str, list[int]] = {name: [] for name in columns}
        for ids, labels in sample.sorted():
            line["sequence_lengths"].append(len(ids))
            for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
                line["input_ids"].append(token)
                line["labels"].append(label)
                line["attention_mask"].append(1)
                line["position_ids"].append(position)
        for name, values in line.items():
            columns[name].append(len(line["input_ids"]) if name == "length" else values)
    return columns


CASES = pytest.mark.parametrize(
    ("attach", "chunk_rows", "chunks"),
    [(True, 8192, 1), (False, 8192, 1), (True, 7, 1), (False, 7, 3), (True, 40, 3), (True, 1, 2), (False, 39, 1)],
)


def test_a_row_by_hand() -> None:
    sample = Sample([([5, 6, 7], [X, 6, 7]), ([5, 8], [X, 8])], [1, 0])
    assert lay_out(rows([sample], attach=True)).to_pylist() == [
        {
            "input_ids": [5, 8, 5, 6, 7],
            "labels": [X, 8, X, 6, 7],
            "attention_mask": [1, 1, 1, 1, 1],
            "position_ids": [0, 1, 0, 1, 2],
            "sequence_lengths": [2, 3],
            "length": 5,
        }
    ]


@CASES
def test_rows_are_laid_out_as_by_a_loop(
    attach: bool, chunk_rows: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "CHUNK_ROWS", chunk_rows)
    found = samples(40, shuffled=attach)
    assert lay_out(rows(found, attach=attach, chunks=chunks)).to_pydict() == expected(found)


def in_common(sequences: list[TokensAndLabels]) -> int:
    """Tokens that all sequences begin with, none of them counted, and no sequence's last one."""
    shortest = min(len(ids) for ids, _ in sequences)
    for position in range(shortest - 1):
        here = {ids[position] for ids, _ in sequences}
        if len(here) > 1 or any(labels[position] != X for _, labels in sequences):
            return position
    return shortest - 1


def with_prompts(count: int, *, shuffled: bool) -> list[Sample]:
    """Random rows that begin alike: a prompt of up to five tokens of two kinds, which mostly does not count."""
    rng, found = random.Random(5), samples(count, seed=5, shuffled=shuffled)
    for sample in found:
        prompt = [rng.randint(0, 1) for _ in range(rng.randint(0, 5))]
        labels = [X if rng.random() < 0.95 else token for token in prompt]
        sample.sequences = [(prompt + ids, labels + counted) for ids, counted in sample.sequences]
    return found


def test_a_shared_prompt_by_hand() -> None:
    """Tokens 5 and 6 are common to all; 7 is, too, but counts in one of them."""
    best, second, worst = ([5, 6, 7, 1], [X, X, X, 1]), ([5, 6, 7, 2], [X, X, 7, 2]), ([5, 6, 7], [X, X, 7])
    assert lay_out(rows([Sample([best, second, worst])], attach=False), share_prompts=True).to_pylist() == [
        {
            "input_ids": [5, 6, 7, 1, 7, 2, 7],
            "labels": [X, X, X, 1, 7, 2, 7],
            "attention_mask": [1] * 7,
            "position_ids": [0, 1, 2, 3, 2, 3, 2],
            "sequence_lengths": [4, 2, 1],
            "length": 7,
        }
    ]


@pytest.mark.parametrize(
    ("sequences", "prompt"),
    [
        pytest.param([([1, 2], [X, 2]), ([3, 2], [X, 2])], 0, id="nothing-in-common"),
        pytest.param([([1, 2], [X, 2]), ([1, 2], [X, 2])], 1, id="equal-sequences"),
        pytest.param([([1, 2], [X, 2]), ([1, 2, 3, 4], [X, X, X, 4])], 1, id="up-to-the-first-that-counts"),
        pytest.param([([1, 2, 3], [X, X, X]), ([1, 2, 3], [X, X, X])], 2, id="nothing-counts"),
        pytest.param([([1, 2], [1, 2]), ([1, 3], [1, 3])], 0, id="the-first-counts"),
        pytest.param([([1], [X]), ([1, 3], [X, 3])], 0, id="one-token"),
        pytest.param([([1, 2, 3], [X, X, 3])], 2, id="one-sequence"),
    ],
)
def test_what_is_shared(sequences: list[TokensAndLabels], prompt: int) -> None:
    assert in_common(sequences) == prompt
    (row,) = lay_out(rows([Sample(sequences)], attach=False), share_prompts=True).to_pylist()
    lengths = [len(ids) for ids, _ in sequences]
    assert row["sequence_lengths"] == [lengths[0], *(length - prompt for length in lengths[1:])]


@CASES
def test_prompts_are_shared_as_by_a_loop(
    attach: bool, chunk_rows: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "CHUNK_ROWS", chunk_rows)
    found = with_prompts(40, shuffled=attach)
    plain = expected(found)
    prompts = [in_common(sample.sequences) for sample in found]
    assert set(prompts) >= {0, 1, 3}
    columns: dict[str, list[Any]] = {name: [] for name in plain}
    for number, (sample, prompt) in enumerate(zip(found, prompts, strict=True)):
        lengths = [len(ids) for ids, _ in sample.sorted()]
        kept = [p for s, length in enumerate(lengths) for p in [*[s == 0] * prompt, *[True] * (length - prompt)]]
        for name, values in plain.items():
            if name == "length":
                columns[name].append(sum(kept))
            elif name == "sequence_lengths":
                columns[name].append([lengths[0], *(length - prompt for length in lengths[1:])])
            else:
                columns[name].append([value for value, keep in zip(values[number], kept, strict=True) if keep])
    assert lay_out(rows(found, attach=attach, chunks=chunks), share_prompts=True).to_pydict() == columns


@CASES
def test_responses_are_counted_tokens_as_by_a_loop(
    attach: bool, chunk_rows: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence's first token is predicted by nothing, so that it never counts."""
    monkeypatch.setattr(groups, "CHUNK_ROWS", chunk_rows)
    found = samples(40, seed=1, shuffled=attach)
    assert any(labels[0] != X for sample in found for _, labels in sample.sequences)
    ours = [[part.tolist() for part in row] for row in responses(rows(found, attach=attach, chunks=chunks))]
    assert ours == [[[n for n in labels[1:] if n != X] for _, labels in sample.sorted()] for sample in found]


@pytest.mark.parametrize("chunks", [1, 3])
def test_lengths_as_by_a_loop(chunks: int) -> None:
    found = samples(40, seed=2, shuffled=True)
    lengths = [[len(ids) for ids, _ in sample.sequences] for sample in found]
    table = rows(found, attach=True, chunks=chunks)
    assert longest_sequences(table).tolist() == [max(row) for row in lengths]
    part = Rows(table.table.slice(11, 17), {})
    assert longest_sequences(part).tolist() == [max(row) for row in lengths[11:28]]


def test_rows_that_were_filtered_are_laid_out_as_by_a_loop() -> None:
    """Slices and selections share memory with the rows that are gone."""
    found = samples(30, seed=3, shuffled=True)
    whole, kept = rows(found, attach=True), [3, 4, 9, 10, 29]
    for places in (list(range(5, 25)), kept):
        table = whole.table.slice(5, 20) if len(places) == 20 else whole.table.take(places)
        part = Rows(table, {"order": whole.attached["order"][places]})
        assert lay_out(part).to_pydict() == expected([found[place] for place in places])


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("chunks", [0, 1])
def test_a_table_without_rows(attach: bool, chunks: int) -> None:
    """With an empty chunk, or none."""
    empty = rows([], attach=attach)
    if not chunks:
        empty = Rows(empty.table.schema.empty_table(), empty.attached)
    assert lay_out(empty).to_pydict() == lay_out(empty, share_prompts=True).to_pydict() == expected([])
    assert lay_out(empty).schema == lay_out(rows(samples(1, shuffled=False), attach=attach)).schema
    assert list(responses(empty)) == []
    lengths = longest_sequences(empty)
    assert (lengths.shape, lengths.dtype) == ((0,), np.int64)


def test_columns_have_the_same_types_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = samples(5, shuffled=True)
    whole = lay_out(rows(found, attach=True)).schema
    types = {name: whole.field(name).type for name in whole.names}
    assert types.pop("length") == pa.int64()
    assert {name: kind.value_type for name, kind in types.items()} == {
        "input_ids": pa.int32(),
        "labels": pa.int32(),
        "attention_mask": pa.int8(),
        "position_ids": pa.int32(),
        "sequence_lengths": pa.int32(),
    }
    assert lay_out(rows(found, attach=True), share_prompts=True).schema == whole
    monkeypatch.setattr(groups, "CHUNK_ROWS", 2)
    assert lay_out(rows(found, attach=True, chunks=2)).schema == whole


def test_columns_are_put_in_order_as_by_a_loop() -> None:
    found = samples(20, seed=4, shuffled=True)
    values = [[float(10 * number + position) for position in sample.order] for number, sample in enumerate(found)]
    order = ragged([sample.order for sample in found])
    ours = in_order(ragged(values), order)
    assert ours == [[row[position] for position in sample.order] for row, sample in zip(values, found, strict=True)]
    assert in_order(ragged(values), None) == values
    assert in_order(ragged([]), None) == in_order(ragged([]), ragged([])) == []


def test_a_column_with_other_rows_than_the_order_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        in_order(ragged([[1.0], [2.0]]), ragged([[0]]))


@pytest.mark.parametrize("values", [[[1.0, 2.0], [3.0]], [[1.0, 2.0], [3.0, 4.0]], [[1.0]], []])
def test_ragged_makes_one_list_a_row_even_of_equal_lengths(values: list[list[float]]) -> None:
    array = ragged(values)
    assert (array.shape, array.dtype) == ((len(values),), object)
    assert list(array) == values
