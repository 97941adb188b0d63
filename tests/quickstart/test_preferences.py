"""The quickstart's preference pairs: the closer answer is chosen, exactly the share exchanged, nothing given away."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quickstart import preferences, task
from quickstart.preferences import Pair

SIZE = 200
EXCHANGED = 0.2


@pytest.fixture(scope="module")
def questions() -> list[task.Row]:
    return task.splits({"preference": 400}, seed=3)["preference"]


@pytest.fixture(scope="module")
def answers(questions: list[task.Row]) -> list[list[str]]:
    """Right next to spoiled answers; every fifth question has two different wrong ones."""
    once, twice = task.spoil(questions, 1.0, seed=4), task.spoil(questions, 1.0, seed=5)
    return [
        [a.answer, b.answer] if index % 5 == 0 else [a.answer, row.answer, b.answer]
        for index, (row, a, b) in enumerate(zip(questions, once, twice, strict=True))
    ]


def make(questions: list[task.Row], answers: list[list[str]], exchanged: float, seed: int = 6) -> list[Pair]:
    return preferences.make_pairs(questions, answers, size=SIZE, exchanged=exchanged, seed=seed)


def pair(chosen: str, rejected: str) -> Pair:
    return Pair("x", "upper: badge", chosen, rejected)


def test_closeness_is_one_for_the_right_answer_alone() -> None:
    assert preferences.closeness("upper: badge", "BADGE") == 1
    assert preferences.closeness("upper: badge", "hil") == 0
    assert 0 < preferences.closeness("upper: badge", "BADG") < 1


@pytest.mark.parametrize(
    ("chosen", "rejected", "kind"),
    [("BADGE", "BADG", "right"), ("BADG", "BADGE", "mislabelled"), ("BADG", "BA", "poor"), ("BA", "BADG", "poor")],
)
def test_kind_of_a_pair(chosen: str, rejected: str, kind: str) -> None:
    assert pair(chosen, rejected).kind == kind


def test_without_exchange_the_closer_answer_is_chosen(questions: list[task.Row], answers: list[list[str]]) -> None:
    for found in make(questions, answers, 0):
        assert preferences.closeness(found.prompt, found.chosen) > preferences.closeness(found.prompt, found.rejected)


def test_exactly_the_share_is_exchanged(questions: list[task.Row], answers: list[list[str]]) -> None:
    before, after = make(questions, answers, 0), make(questions, answers, EXCHANGED)
    assert len(before) == len(after) == SIZE
    turned = [a for a, b in zip(after, before, strict=True) if a != b]
    assert len(turned) == round(EXCHANGED * SIZE)
    assert {(a.id, a.rejected, a.chosen) for a in turned} < {(b.id, b.chosen, b.rejected) for b in before}


def test_every_kind_comes_up_and_is_counted(questions: list[task.Row], answers: list[list[str]]) -> None:
    count = preferences.count_kinds(make(questions, answers, EXCHANGED))
    assert set(count) == set(preferences.KINDS)
    assert sum(count.values()) == SIZE
    assert count["right"] > count["poor"] > 0 < count["mislabelled"]


def test_the_seed_decides_which(questions: list[task.Row], answers: list[list[str]]) -> None:
    assert make(questions, answers, EXCHANGED) == make(questions, answers, EXCHANGED)
    assert make(questions, answers, EXCHANGED) != make(questions, answers, EXCHANGED, seed=7)


def test_answers_that_cannot_be_compared_are_passed_over() -> None:
    question = task.Row("x", "upper: badge", "BADGE")
    cases = [["BADGE", "BADGE"], ["BADG", "ADGE"], ["", "BADGE"], ["BADGE", " ", "\ufffd"], []]
    with pytest.raises(ValueError, match="0 of 5 questions have two answers to compare; 1 pairs are wanted"):
        preferences.make_pairs([question] * 5, cases, size=1, exchanged=0, seed=1)


def test_the_own_answers_of_the_questions_are_not_looked_at(
    questions: list[task.Row], answers: list[list[str]]
) -> None:
    blind = [replace(row, answer="") for row in questions]
    assert make(blind, answers, EXCHANGED) == make(questions, answers, EXCHANGED)


def test_the_training_file_does_not_say_which_labels_are_wrong(
    questions: list[task.Row], answers: list[list[str]], tmp_path: Path
) -> None:
    pairs = make(questions, answers, EXCHANGED)
    preferences.write_pairs(pairs, tmp_path / "pairs.jsonl")
    read = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert {key for row in read for key in row} == {"id", "messages", "chosen", "rejected"}
    for row, its in zip(read, pairs, strict=True):
        for name, side in zip(("chosen", "rejected"), its.rows(), strict=True):
            assert [*row["messages"], row[name]] == side.messages()
