"""The quickstart's task family: right answers, exactly the share of wrong ones, nothing shared with held-out rows."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from quickstart import task

SIZES = {"heldout": 200, "train": 1000, "reference": 500}
SHARE = 0.3


@pytest.fixture(scope="module")
def rows() -> dict[str, list[task.Row]]:
    return task.splits(SIZES, seed=3)


def word(row: task.Row) -> str:
    return row.prompt.split(": ")[1]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("copy", "badge"),
        ("upper", "BADGE"),
        ("reverse", "egdab"),
        ("sort", "abdeg"),
        ("rotate", "adgeb"),
        ("ends", "be"),
    ],
)
def test_every_task_does_what_its_name_says(name: str, answer: str) -> None:
    assert task.solve(f"{name}: badge") == answer


def test_the_table_above_is_complete() -> None:
    assert set(task.TASKS) == {"copy", "upper", "reverse", "sort", "rotate", "ends"}


def test_splits_have_their_sizes_and_right_answers(rows: dict[str, list[task.Row]]) -> None:
    assert {name: len(found) for name, found in rows.items()} == SIZES
    for row in (row for found in rows.values() for row in found):
        assert row.answer == task.solve(row.prompt)
        assert not row.spoiled


def test_every_task_comes_up(rows: dict[str, list[task.Row]]) -> None:
    for found in rows.values():
        assert {row.prompt.split(": ")[0] for row in found} == set(task.TASKS)


def test_no_word_and_no_id_comes_twice_in_any_set(rows: dict[str, list[task.Row]]) -> None:
    everything = [row for found in rows.values() for row in found]
    assert len({word(row) for row in everything}) == sum(SIZES.values())
    assert len({row.id for row in everything}) == sum(SIZES.values())


def test_the_seed_decides_everything(rows: dict[str, list[task.Row]]) -> None:
    assert task.splits(SIZES, seed=3) == rows
    assert task.splits(SIZES, seed=4) != rows
    assert task.spoil(rows["train"], SHARE, seed=5) == task.spoil(rows["train"], SHARE, seed=5)
    assert task.spoil(rows["train"], SHARE, seed=5) != task.spoil(rows["train"], SHARE, seed=6)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_exactly_the_share_is_spoiled_and_every_spoiled_answer_is_wrong(
    rows: dict[str, list[task.Row]], share: float
) -> None:
    spoiled = task.spoil(rows["train"], share, seed=5)
    wrong = [row for row in spoiled if row.answer != task.solve(row.prompt)]
    assert len(wrong) == round(share * SIZES["train"])
    assert all(bool(row.spoiled) == (row.answer != task.solve(row.prompt)) for row in spoiled)


def test_both_ways_to_spoil_have_half_of_it_each(rows: dict[str, list[task.Row]]) -> None:
    count = Counter(row.spoiled for row in task.spoil(rows["train"], SHARE, seed=5))
    assert count == {"": 700, "swapped": 150, "edited": 150}
    assert set(task.SPOILED) == set(count) - {""}


def test_spoiling_changes_answers_only(rows: dict[str, list[task.Row]]) -> None:
    before = list(rows["train"])
    spoiled = task.spoil(rows["train"], SHARE, seed=5)
    assert rows["train"] == before
    assert [(row.id, row.prompt) for row in spoiled] == [(row.id, row.prompt) for row in before]


def test_a_swapped_answer_is_another_rows_and_an_edited_one_is_never_empty(rows: dict[str, list[task.Row]]) -> None:
    answers = {row.answer for row in rows["train"]}
    for row in task.spoil(rows["train"], SHARE, seed=5):
        assert row.answer
        assert row.spoiled != "swapped" or row.answer in answers


@pytest.mark.parametrize(("edit", "growth"), [(task._insert, 1), (task._delete, -1), (task._change, 0)])
def test_an_edit_inserts_deletes_or_changes_one_character(
    edit: Callable[[str, random.Random], str], growth: int
) -> None:
    rng = random.Random(0)
    assert {len(edit("badge", rng)) - len("badge") for _ in range(200)} == {growth}


def test_the_training_file_does_not_say_which_rows_are_spoiled(rows: dict[str, list[task.Row]], tmp_path: Path) -> None:
    spoiled = task.spoil(rows["train"], SHARE, seed=5)
    task.write_jsonl(spoiled, tmp_path / "train.jsonl")
    task.write_labels(spoiled, tmp_path / "spoiled.json")
    read = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert read == [{"id": row.id, "messages": row.messages()} for row in spoiled]
    assert json.loads((tmp_path / "spoiled.json").read_text()) == {row.id: row.spoiled for row in spoiled}
