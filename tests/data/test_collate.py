"""The batch layout, by hand: which sequence each token belongs to, and the numbers beside the tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from poft_plugin.data.collate import MethodCollator
from poft_plugin.losses import response_positions

Row = dict[str, Any]
X = -100


def padded(rows: Sequence[Row], side: str = "right", multiple: int = 1) -> dict[str, Tensor]:
    """A stub of the host's collator: ids padded with 0, labels with -100; it refuses columns that it cannot lay out."""
    length = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
    batch = {}
    for name, filler in (("input_ids", 0), ("labels", X)):
        lines = []
        for row in rows:
            assert row.keys() <= {"input_ids", "labels", "position_ids", "attention_mask"}
            padding = [filler] * (length - len(row[name]))
            lines.append(padding + row[name] if side == "left" else row[name] + padding)
        batch[name] = torch.tensor(lines)
    return batch


def packing(packs: Sequence[Sequence[Row]]) -> dict[str, Tensor]:
    """A stub of the host's collator for packs: the rows of a pack end to end, padded to a multiple of 4."""
    joined = [{n: [token for row in pack for token in row[n]] for n in ("input_ids", "labels")} for pack in packs]
    return padded(joined, multiple=4)


def row(*ids: int, **columns: Any) -> Row:
    """A row whose first token is the prompt."""
    return {"input_ids": list(ids), "labels": [X, *ids[1:]], **columns}


def collate(
    features: Any, tokens: Callable[..., Any] = padded, columns: tuple[str, ...] = ("score",), side: str = "right"
) -> dict[str, Any]:
    """A batch."""
    return MethodCollator(tokens, columns, side)(features)


def as_lists(batch: dict[str, Any]) -> dict[str, Any]:
    """Tensors as lists."""
    return {name: value.tolist() for name, value in batch.items()}


def test_one_sequence_a_row() -> None:
    batch = collate([row(1, 2, 3, score=-1.5), row(4, 5, score=-2.5)])
    assert as_lists(batch) == {
        "input_ids": [[1, 2, 3], [4, 5, 0]],
        "labels": [[X, 2, 3], [X, 5, X]],
        "sequence_ids": [[0, 0, 0], [1, 1, -1]],
        "group_ids": [0, 1],
        "score": [-1.5, -2.5],
    }
    assert batch["score"].dtype == torch.float64
    assert batch["sequence_ids"].dtype == batch["group_ids"].dtype == torch.long


def test_packed() -> None:
    """A row of the batch holds several rows of the data set; a further pack goes on counting."""
    packs = [[row(1, 2, score=1.0), row(3, score=2.0), row(4, 5, score=3.0)], [row(6, 7, 8, score=4.0)]]
    assert as_lists(collate(packs, packing)) == {
        "input_ids": [[1, 2, 3, 4, 5, 0, 0, 0], [6, 7, 8, 0, 0, 0, 0, 0]],
        "labels": [[X, 2, X, X, 5, X, X, X], [X, 7, 8, X, X, X, X, X]],
        "sequence_ids": [[0, 0, 1, 2, 2, -1, -1, -1], [3, 3, 3, -1, -1, -1, -1, -1]],
        "group_ids": [0, 1, 2, 3],
        "score": [1, 2, 3, 4],
    }


def test_padded_on_the_left() -> None:
    def left(rows: Sequence[Row]) -> dict[str, Tensor]:
        return padded(rows, "left")

    batch = collate([row(1, 2, 3, score=1.0), row(4, score=2.0)], left, side="left")
    assert batch["input_ids"].tolist() == [[1, 2, 3], [0, 0, 4]]
    assert batch["sequence_ids"].tolist() == [[0, 0, 0], [-1, -1, 1]]


@pytest.mark.parametrize("packed", [True, False])
def test_groups_of_several_sequences(packed: bool) -> None:
    """A sample whose sequences lie end to end: one number a sequence, one group a sample."""
    pair = row(1, 2, 3, 4, 5, sequence_lengths=[3, 2], score=[-1.0, -2.0], other=torch.tensor([7.0, 8.0]))
    single = row(6, 7, sequence_lengths=[2], score=[-3.0], other=torch.tensor(9.0))
    features = [[pair, single]] if packed else [pair, single]
    batch = collate(features, packing if packed else padded, ("score", "other"))
    expected = [[0, 0, 0, 1, 1, 2, 2, -1]] if packed else [[0, 0, 0, 1, 1], [2, 2, -1, -1, -1]]
    assert batch["sequence_ids"].tolist() == expected
    assert batch["group_ids"].tolist() == [0, 0, 1]
    assert batch["score"].tolist() == [-1, -2, -3]
    assert batch["other"].tolist() == [7, 8, 9]


def test_only_the_asked_columns_and_no_others_reach_the_batch() -> None:
    """Text columns and those of other methods stay out, from the host's collator (it refuses them here) too."""
    batch = collate([row(1, 2, score=1.0, row_key="00", conversation="[]", elsewhere=3.0)])
    assert set(batch) == {"input_ids", "labels", "sequence_ids", "group_ids", "score"}


def test_float64_survives() -> None:
    score = -1 / 3
    assert collate([row(1, 2, score=score)])["score"].item() == score


def test_packing_does_not_change_which_tokens_count() -> None:
    """The same rows, packed and not: the same targets for the same sequences."""
    rows = [row(1, 2, 3, score=0.0), row(4, 5, score=0.0), row(6, 7, 8, 9, score=0.0)]
    apart, together = collate(rows), collate([rows], packing)
    found = [response_positions(batch["labels"], batch["sequence_ids"])[1:] for batch in (apart, together)]
    torch.testing.assert_close(found[0], found[1])
    assert found[0][0].tolist() == [2, 3, 5, 7, 8, 9]


@pytest.mark.parametrize("features", [[row(1, 2)], [row(1, 2, score=1.0), row(3)]], ids=["no-row", "one-row"])
def test_a_missing_column_is_named(features: list[Row]) -> None:
    with pytest.raises(ValueError, match=r"without the column 'score'.*`axolotl preprocess`"):
        collate(features)


@pytest.mark.parametrize("score", [-1.0, [-1.0], [-1.0, -2.0, -3.0]])
def test_numbers_that_do_not_fit_the_sequences_are_refused(score: Any) -> None:
    """Flattened, they would belong to other rows' sequences."""
    pair = row(1, 2, 3, sequence_lengths=[2, 1], score=score)
    with pytest.raises(ValueError, match=r"column 'score' has \d number\(s\) in a row of 2 sequence\(s\)"):
        collate([pair, row(4, score=-9.0)])
