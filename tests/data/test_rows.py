"""Conversations, their keys, and rows as preprocessors and filters see them."""

import hashlib
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poft_plugin.data.preparation import Rows, RunContext
from poft_plugin.data.rows import (
    RowError,
    Turn,
    checked_conversation,
    dump_conversation,
    load_conversation,
    row_key,
)

QUESTION, ANSWER = Turn("user", "hi"), Turn("assistant", "ho", counted=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TURNS = st.lists(st.builds(Turn, TEXT, TEXT, st.booleans()), max_size=4).map(tuple)


def rows(*conversations: tuple[Turn, ...], sources: list[str] | None = None, groups: list[str] | None = None) -> Rows:
    """Rows over conversations, numbered from 10."""
    columns = {
        "row_key": [row_key(c) for c in conversations],
        "conversation": [dump_conversation(c) for c in conversations],
        "source": sources or ["data.jsonl"] * len(conversations),
        "row_number": list(range(10, 10 + len(conversations))),
    }
    return Rows(pa.table(columns | ({"group": groups} if groups else {})), {})


def test_key_by_hand() -> None:
    """The first 128 bits of SHA-256 over the turns as JSON; a stored score is found by this number."""
    text = '[["user","hi",false],["assistant","hö\\n",true]]'
    key = row_key([Turn("user", "hi"), Turn("assistant", "hö\n", counted=True)])
    assert key == hashlib.sha256(text.encode()).hexdigest()[:32]


@pytest.mark.parametrize(
    "other",
    [
        (Turn("system", "hi"), ANSWER),
        (Turn("user", "hi "), ANSWER),
        (QUESTION, Turn("assistant", "ho")),
        (ANSWER, QUESTION),
        (QUESTION, ANSWER, QUESTION),
        (Turn("user", 'hi",false],["assistant","ho'),),
    ],
    ids=["role", "white-space", "counted", "order", "more", "quotes"],
)
def test_key_changes_with_the_content(other: tuple[Turn, ...]) -> None:
    assert row_key(other) != row_key((QUESTION, ANSWER))


@settings(deadline=None)
@given(TURNS, TURNS)
def test_keys_are_equal_where_the_turns_are(a: tuple[Turn, ...], b: tuple[Turn, ...]) -> None:
    assert (row_key(a) == row_key(b)) == (a == b)
    assert row_key(list(a)) == row_key(tuple(a))


@settings(deadline=None)
@given(TURNS)
def test_load_undoes_dump(turns: tuple[Turn, ...]) -> None:
    assert load_conversation(dump_conversation(turns)) == turns


def test_a_conversation_with_a_response_passes() -> None:
    turns = (Turn("system", ""), QUESTION, Turn("assistant", ""), QUESTION, ANSWER)
    assert checked_conversation(iter(turns), "here") == turns


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((), "no assistant turn is trained on.*`roles_to_train`"),
        ((QUESTION, Turn("assistant", "ho")), "no assistant turn is trained on.*`message_field_training`"),
        ((Turn("user", "hi", counted=True), ANSWER), "a turn of role 'user' is trained on.*`roles_to_train`"),
        ((QUESTION, ANSWER, QUESTION, Turn("assistant", " \n\t", True)), "has no text.*Remove the row or fill in"),
    ],
    ids=["empty", "nothing-counts", "user-counts", "blank"],
)
def test_a_conversation_without_a_response_is_refused(turns: tuple[Turn, ...], message: str) -> None:
    with pytest.raises(RowError, match=f"^data.jsonl row 3: .*{message}"):
        checked_conversation(turns, "data.jsonl row 3")


def test_errors_survive_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(RowError("data.jsonl row 3: wrong")))
    assert isinstance(error, RowError)
    assert isinstance(error, ValueError)
    assert str(error) == "data.jsonl row 3: wrong"


def test_a_row_is_named_by_data_set_position_and_key() -> None:
    table = rows((QUESTION,), (QUESTION, ANSWER))
    assert table.where(1) == f"data.jsonl row 11 (key {row_key((QUESTION, ANSWER))})"
    assert table.conversation(1) == (QUESTION, ANSWER)


def test_a_key_names_its_first_row() -> None:
    table = rows((QUESTION,), (ANSWER,), (ANSWER,))
    assert table.where_key(row_key((ANSWER,))) == table.where(1)


def test_groups() -> None:
    table = rows((QUESTION,), (ANSWER,), (QUESTION,), sources=["a", "b", "a"], groups=["x", "x", "y"])
    assert len(set(table.groups("none").tolist())) == 1
    assert table.groups("dataset").tolist() == table.sources.tolist() == ["a", "b", "a"]
    assert table.groups("topic").tolist() == ["x", "x", "y"]


def test_unique_rows_are_the_first_of_their_key() -> None:
    table = rows((ANSWER,), (QUESTION,), (ANSWER,), (QUESTION,))
    attached = Rows(table.table, {"score": np.zeros(4)})
    assert attached.unique().table.to_pylist() == table.table.to_pylist()[:2]
    assert attached.unique().attached == {}
    assert len(attached) == 4


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, RunContext("train", 0, 1, 0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, RunContext("train", 5, 8, 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, RunContext("train", 1, 2, 1, 2)),
    ],
    ids=["none", "two-machines", "without-local-size"],
)
def test_a_launchers_environment(
    variables: dict[str, str], expected: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert RunContext.from_environment("train") == expected
