"""Laws of reading preference rows: whatever a row holds, it is read whole or refused by name; no text is lost."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poft_plugin.config import parse_block
from poft_plugin.data.ranked import RankedSample
from poft_plugin.data.rows import RowError, Turn
from poft_plugin.hosts.axolotl.ranked_fields import DIALOGUES, HH_RLHF, PAIRS, RANKED, RankedFields
from poft_plugin.hosts.axolotl.ranked_rows import ranked_reader, unread_columns
from poft_plugin.hosts.axolotl.reasoning import reasoning_of

KINDS = (PAIRS[0], DIALOGUES, HH_RLHF, RANKED)
COLUMNS = ("messages", "prompt", "system", "input", "chosen", "rejected", "responses", "scores", "ranks", "winner",
           "tools", "a", "b", "score_a", "score_b")  # fmt: skip

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "score", "rank", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "field_system": st.just("system"),
        "field_input": st.just("input"),
        "field_responses": st.just(["a", "b"]),
        "field_response_text": st.just("text"),
        "field_response_score": st.just("score"),
        "field_response_rank": st.just("rank"),
        "field_ranks": st.just("ranks"),
        "field_winner": st.just("winner"),
        "field_scores": st.just(["score_a", "score_b"]),
        "text_format": st.sampled_from(["plain", "hh", "json"]),
    },
)


def read(kind: str, row: dict[str, Any], **entry: Any) -> RankedSample:
    return ranked_reader(kind, parse_block(RankedFields, entry, "datasets[0]"))(row, "data row 3")


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(KINDS), ENTRIES, st.fixed_dictionaries({}, optional=dict.fromkeys(COLUMNS, ANY)))
def test_any_json_is_a_sample_or_an_error_of_the_row(kind: str, entry: dict[str, Any], row: dict[str, Any]) -> None:
    """Never another exception."""
    try:
        sample = read(kind, row, **entry)
    except RowError as refused:
        assert str(refused).startswith("data row 3")  # noqa: PT017
        return
    assert len(sample.responses) >= 2
    assert all(isinstance(text, str) and text.strip() for text in sample.responses)
    assert len(sample.ranks) == len(sample.responses)
    assert RankedSample.loads(sample.dumps()) == sample
    unread_columns(row, sample, parse_block(RankedFields, entry, "datasets[0]"))


WORDS = st.integers(0, 999).map("w{}".format)
ROLES = st.sampled_from(["user", "user", "assistant", "assistant", "system", "gpt", "human", "tool", "them"])
EXTRA = st.sampled_from([{}, {}, {}, {}, {"reasoning_content": "w1000"}, {"tool_calls": [{"name": "w1001"}]}])
MESSAGE = st.builds(lambda role, content, extra: {"role": role, "content": content, **extra}, ROLES, WORDS, EXTRA)


def hh(turns: list[dict[str, Any]]) -> str:
    """As text of hh-rlhf."""
    marks = {"assistant": "\n\nAssistant: ", "gpt": "\n\nAssistant: "}
    return "".join(marks.get(turn["role"], "\n\nHuman: ") + str(turn["content"]) for turn in turns)


def forms(turns: list[dict[str, Any]]) -> list[Any]:
    """The ways in which people write the same turns, with and without an open assistant turn at the end."""
    pieces = [("<|assistant|>" if t["role"] == "assistant" else "<|prompter|>") + t["content"] for t in turns]
    return [
        turns, json.dumps(turns), hh(turns), f"{hh(turns)}\n\nAssistant:", f"note w77{hh(turns)}",
        "\n".join(turn["content"] for turn in turns), "<|im_start|>user\n" + turns[0]["content"],
        [pieces, pieces], [[*pieces, "<|assistant|>"]] * 2, turns[-1], turns[-1]["content"],
    ]  # fmt: skip


NAMES = (
    "messages",
    "json",
    "hh",
    "hh open",
    "hh after text",
    "joined",
    "markup",
    "pieces",
    "open pieces",
    "message",
    "text",
)
FORMS = len(NAMES)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """Rows that mostly have a meaning: one dialogue and answers to it, each written in one of many ways."""
    middle = draw(st.lists(MESSAGE, max_size=2))
    turns = [*middle, {"role": draw(st.sampled_from(["user", "user", "user", "assistant"])), "content": draw(WORDS)}]
    answers = [{"role": "assistant", "content": draw(WORDS), **draw(EXTRA)} for _ in range(3)]
    before, form = draw(st.sampled_from([turns, [], middle])), draw(st.integers(0, FORMS - 1))
    if draw(st.booleans()):
        written = [forms([*before, answer])[form] for answer in answers]
    else:
        written = [draw(st.sampled_from(forms([*before, answer]))) for answer in answers]
    row = {"chosen": written[0], "rejected": written[1], "responses": written, "a": written[0], "b": written[1]}
    for name in draw(st.sampled_from([("messages",), ("prompt",), ("messages", "prompt"), ()])):
        row[name] = draw(st.sampled_from(forms(turns)))
    for name in ("system", "input"):
        row[name] = draw(st.none() | WORDS)
    return row


def words(value: Any) -> set[str]:
    """All words of a value."""
    return set(re.findall(r"w\d+", json.dumps(value)))


@settings(deadline=None, max_examples=250)
@given(st.sampled_from(KINDS), ENTRIES, rows())
def test_no_text_of_the_fields_named_is_lost(kind: str, entry: dict[str, Any], row: dict[str, Any]) -> None:
    """A row that is read has every word under its fields in the sample, and no other; each turn is one turn."""
    entry = {name: value for name, value in entry.items() if not name.startswith(("field_response_", "field_w"))}
    entry = {name: value for name, value in entry.items() if name not in ("field_ranks", "field_scores")}
    try:
        sample = read(kind, row, **entry)
    except RowError:
        return
    lists = entry.get("field_responses", ["responses"]) if kind == RANKED else ["chosen", "rejected"]
    bare = kind == HH_RLHF and "\n\nHuman" not in f"{row['chosen']}{row['rejected']}"
    prompts = ["messages", "prompt"] if kind in (PAIRS[0], RANKED) else ["prompt"] if bare else []
    named = [*lists, *prompts, *(entry[name] for name in ("field_system", "field_input") if name in entry)]
    texts = [*(turn.content for turn in sample.prompt), *sample.responses]
    found = words([*texts, *map(reasoning_of, texts)])
    assert words([row.get(name) for name in named]) == found
    if entry.get("text_format") != "plain":
        for turn in sample.prompt:
            assert not re.search(r"\n\n(Human|Assistant):|<\|(prompter|assistant)\|>|^<\|im_start", turn.content)
        assert not any(text.startswith("\n\nHuman:") for text in sample.responses)


USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "w1"), ("assistant", "w2"), ("assistant", "w3"))
)


@pytest.mark.parametrize(
    ("kind", "dialogues", "answers"),
    [
        (PAIRS[0], ["messages", "hh", "hh open"], ["messages", "hh", "hh open", "message", "text"]),
        (DIALOGUES, ["messages", "json", "hh", "hh open"], []),
        (HH_RLHF, ["hh", "hh open"], ["hh", "hh open", "text"]),
        (RANKED, ["messages", "hh", "hh open"], ["messages", "hh", "hh open", "message", "text"]),
    ],
)
def test_the_law_is_not_kept_by_refusing_everything(kind: str, dialogues: list[str], answers: list[str]) -> None:
    """What is read of one dialogue in every form: whole, or the answer after a prompt in its own form."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for whole in (True, False):
        before = [USER] if whole else []
        for form, good, bad in zip(NAMES, forms([*before, GOOD]), forms([*before, BAD]), strict=True):
            if form == "joined":  # a text like any other
                continue
            row = {"chosen": good, "rejected": bad, "responses": [good, bad], "prompt": hh([USER])}
            try:
                sample = read(kind, row)
            except RowError:
                continue
            assert (sample.prompt, sample.responses) == ((Turn("user", "w1"),), ("w2", "w3"))
            found[whole].append(form)
    assert found == {
        True: [
            *dialogues,
            *(["message", "text"] if kind in (PAIRS[0], RANKED) else ["text"] if kind == HH_RLHF else []),
        ],
        False: answers,
    }


@pytest.mark.parametrize("name", ["system", "input", "context", "system_prompt", "history"])
def test_columns_that_are_not_read_are_told(name: str) -> None:
    row = {"prompt": "hi there", "chosen": "ho", "rejected": "no", name: "be nice"}
    fields = RankedFields()
    sample = read(PAIRS[0], row)
    assert unread_columns(row, sample, fields) == [name]
    for text in ("", None, "  ", "there"):
        assert unread_columns({**row, name: text}, sample, fields) == []
    assert unread_columns({**row, name: [["a", "b"]]}, sample, fields) == [name]
    assert unread_columns(row, sample, RankedFields(field_input=name)) == []
