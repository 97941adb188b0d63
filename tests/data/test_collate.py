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


def sample(*sequences: list[int], **columns: Any) -> Row:
    """A sample whose sequences lie end to end, each one's first token the prompt, with all that a row may hold."""
    return {
        "input_ids": [token for ids in sequences for token in ids],
        "labels": [X if position == 0 else token for ids in sequences for position, token in enumerate(ids)],
        "attention_mask": [1 for ids in sequences for _ in ids],
        "position_ids": [position for ids in sequences for position in range(len(ids))],
        "sequence_lengths": [len(ids) for ids in sequences],
        **columns,
    }


TWO = sample([1, 2, 3], [4, 5], score=[-1.0, -2.0], other=torch.tensor([7.0, 8.0]))
ONE = sample([6, 7], score=[-3.0], other=torch.tensor(9.0))
THREE = sample([8], [9, 10, 11, 12], [13, 14], score=(-4.0, -5.0, -6.0), other=0.5)


@pytest.mark.parametrize("packed", [True, False])
def test_columns_of_several_sequences(packed: bool) -> None:
    """One number a sequence, a single one for all of a sample's; one group a sample."""
    features = [[TWO, ONE], [THREE]] if packed else [TWO, ONE, THREE]
    batch = collate(features, packing if packed else padded, ("score", "other"))
    assert batch["group_ids"].tolist() == [0, 0, 1, 2, 2, 2]
    assert batch["score"].tolist() == [-1, -2, -3, -4, -5, -6]
    assert batch["other"].tolist() == [7, 8, 9, 0.5, 0.5, 0.5]
    assert batch["score"].dtype == batch["other"].dtype == torch.float64


def test_packed_samples_lie_as_they_are() -> None:
    batch = collate([[TWO, ONE], [THREE]], packing)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 0], [8, 9, 10, 11, 12, 13, 14, 0]]
    assert batch["labels"].tolist() == [[X, 2, 3, X, 5, X, 7, X], [X, X, 10, 11, 12, X, 14, X]]
    assert batch["sequence_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2, -1], [3, 4, 4, 4, 4, 5, 5, -1]]


def test_unpacked_every_sequence_is_a_row() -> None:
    batch = collate([TWO, ONE, THREE])
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 0, 0], [8, 0, 0, 0], [9, 10, 11, 12], [13, 14, 0, 0],
    ]  # fmt: skip
    assert batch["labels"].tolist() == [
        [X, 2, 3, X], [X, 5, X, X], [X, 7, X, X], [X, X, X, X], [X, 10, 11, 12], [X, 14, X, X],
    ]  # fmt: skip
    assert batch["sequence_ids"].tolist() == [
        [0, 0, 0, -1], [1, 1, -1, -1], [2, 2, -1, -1], [3, -1, -1, -1], [4, 4, 4, 4], [5, 5, -1, -1],
    ]  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
def test_several_sequences_padded_on_the_left(packed: bool) -> None:
    def left(rows: Any) -> dict[str, Tensor]:
        rows = [row for pack in rows for row in pack] if packed else rows  # one sample a pack
        return padded(rows, "left", multiple=4)

    batch = collate([[TWO], [ONE]] if packed else [TWO, ONE], left, side="left")
    apart = [[-1, 0, 0, 0], [-1, -1, 1, 1], [-1, -1, 2, 2]]
    together = [[-1, -1, -1, 0, 0, 0, 1, 1], [-1, -1, -1, -1, -1, -1, 2, 2]]
    assert batch["sequence_ids"].tolist() == (together if packed else apart)


SHARED = {  # a prompt of two tokens, then three responses
    "input_ids": [1, 2, 3, 4, 5, 6, 7],
    "labels": [X, X, 3, 4, X, 6, 7],
    "attention_mask": [1] * 7,
    "position_ids": [0, 1, 2, 3, 2, 3, 2],
    "sequence_lengths": [4, 2, 1],
    "score": [-1.0, -2.0, -3.0],
}


def test_a_shared_prompt_bears_the_first_responses_number() -> None:
    batch = collate([[SHARED, ONE]], packing)
    assert batch["sequence_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 2, 3, 3, -1, -1, -1]]
    assert batch["group_ids"].tolist() == [0, 0, 0, 1]
    assert batch["score"].tolist() == [-1, -2, -3, -3]
    positions = torch.tensor([[*SHARED["position_ids"], 0, 1, 0, 1, 2]])
    found = response_positions(batch["labels"], batch["sequence_ids"], positions)
    assert [values.tolist() for values in found] == [[1, 2, 4, 1, 7], [3, 4, 6, 7, 7], [0, 0, 1, 2, 3]]


def test_unpacked_every_response_has_its_prompt() -> None:
    whole = sample([1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 7], score=SHARED["score"])
    whole["labels"] = [X, X, 3, 4, X, X, X, 6, X, X, 7]
    assert as_lists(collate([SHARED, ONE])) == as_lists(collate([whole, ONE]))


def test_what_the_host_is_given() -> None:
    """Packed, position ids say where sequences end; a sequence alone in its row needs none."""
    seen: list[Row] = []

    def tokens(rows: Any) -> dict[str, Tensor]:
        seen.extend(rows[0] if isinstance(rows[0], list) else rows)
        return {"input_ids": torch.zeros(3, 8)}

    collate([TWO], tokens)
    assert seen == [
        {"input_ids": [1, 2, 3], "labels": [X, 2, 3], "attention_mask": [1, 1, 1]},
        {"input_ids": [4, 5], "labels": [X, 5], "attention_mask": [1, 1]},
    ]
    seen.clear()
    collate([[TWO]], tokens)
    assert seen == [{name: TWO[name] for name in ("input_ids", "labels", "attention_mask", "position_ids")}]
    assert seen[0]["position_ids"] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("packed", [True, False])
def test_packing_changes_neither_targets_nor_columns(packed: bool) -> None:
    features = [[TWO, ONE, THREE]] if packed else [TWO, ONE, THREE]
    batch = collate(features, packing if packed else padded, ("score",))
    _, targets, sequences = response_positions(batch["labels"], batch["sequence_ids"])
    assert targets.tolist() == [2, 3, 5, 7, 10, 11, 12, 14]
    assert batch["group_ids"][sequences].tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert batch["score"][sequences].tolist() == [-1, -1, -2, -3, -5, -5, -5, -6]


@pytest.mark.parametrize("number", [7, 7.0, torch.tensor(7.0), torch.tensor(7)])
def test_one_number_is_for_all_sequences_of_a_row(number: Any) -> None:
    assert collate([sample([1, 2], [3], [4], score=number), ONE])["score"].tolist() == [7, 7, 7, -3]


def test_optional_columns_are_taken_along_where_all_rows_have_them() -> None:
    collator = MethodCollator(padded, ("score",), optional=("other", "elsewhere"))
    rows = [{**TWO, "elsewhere": 1.0}, ONE]
    assert collator(rows).keys() == {"input_ids", "labels", "sequence_ids", "group_ids", "score", "other"}
    assert collator(rows)["other"].tolist() == [7, 8, 9]
    assert collator(rows[:1])["elsewhere"].tolist() == [1, 1]


def test_an_optional_column_with_other_numbers_than_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match=r"column 'other' has 1 number\(s\) in a row of 2 sequence\(s\)"):
        MethodCollator(padded, (), optional=("other",))([{**TWO, "other": [7.0]}])


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


@pytest.mark.parametrize("score", [[], [-1.0], torch.tensor([-1.0]), [-1.0, -2.0, -3.0]])
def test_numbers_that_do_not_fit_the_sequences_are_refused(score: Any) -> None:
    """Flattened, they would belong to other rows' sequences."""
    pair = row(1, 2, 3, sequence_lengths=[2, 1], score=score)
    with pytest.raises(ValueError, match=r"column 'score' has \d number\(s\) in a row of 2 sequence\(s\)"):
        collate([pair, row(4, score=-9.0)])


@pytest.mark.parametrize(
    ("side", "positions", "expected"),
    [
        ("right", [[0, 1, 0, 1, 2, 0, 1, 2, 3, 4]], [[0, 1, 0, 1, 2, 0, 1, 2, 0, 1]]),
        ("left", [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2]], [[0, 1, 2, 0, 1, 0, 1, 0, 1, 2]]),
    ],
)
def test_positions_of_padding_go_no_farther_than_those_of_sequences(side: str, positions: Any, expected: Any) -> None:
    """The host counts a run of padding through; some models take other frequencies by the highest position."""

    def tokens(packs: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(1, 10, dtype=torch.long), "position_ids": torch.tensor(positions)}

    batch = collate([[row(1, 2, score=1.0), row(3, 4, 5, score=2.0)]], tokens, side=side)
    assert batch["position_ids"].tolist() == expected


@pytest.mark.parametrize(("side", "expected"), [("right", [[0, 1, 2], [0, 1, 2]]), ("left", [[0, 1, 2], [2, 0, 1]])])
def test_positions_are_counted_where_asked_for(side: str, expected: Any) -> None:
    collator = MethodCollator(lambda rows: padded(rows, side), ("score",), side, count_positions=True)
    assert collator([row(1, 2, 3, score=1.0), row(4, 5, score=2.0)])["position_ids"].tolist() == expected
    assert "position_ids" not in collate([row(1, 2, score=1.0)])
