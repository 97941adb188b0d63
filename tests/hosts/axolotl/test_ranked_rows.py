"""Raw preference rows of every supported dataset type: the ranked sample, field names, and every refusal."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from poft_plugin.config import parse_block
from poft_plugin.data.ranked import RankedSample
from poft_plugin.data.rows import RowError, Turn
from poft_plugin.hosts.axolotl.ranked_fields import DIALOGUES, HH_RLHF, PAIRS, RANKED, RANKED_TYPES, RankedFields
from poft_plugin.hosts.axolotl.ranked_rows import ranked_reader
from poft_plugin.hosts.axolotl.ranked_turns import parse_hh_dialogue

PAIR = PAIRS[1]
QUESTION, ANSWER, NOTE = Turn("user", "hi"), Turn("assistant", "ho"), Turn("system", "be")
USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
WORSE = {"role": "assistant", "content": "no"}
TWO = {"chosen": "ho", "rejected": "no"}
CHAT = {"messages": [USER], **TWO}
SHAREGPT = {"message_property_mappings": {"role": "from", "content": "value"}}


def read(kind: str, row: dict[str, Any], **entry: Any) -> RankedSample:
    """One row, by the entry's own keys."""
    return ranked_reader(kind, parse_block(RankedFields, entry, "datasets[0]"))(row, "data row 3")


def human(text: str, *answers: str) -> str:
    """A dialogue of hh-rlhf."""
    return f"\n\nHuman: {text}" + "".join(f"\n\nAssistant: {answer}" for answer in answers)


def said(name: str, text: str) -> dict[str, str]:
    """A message under other names."""
    return {"from": name, "value": text}


def test_the_types() -> None:
    assert RANKED_TYPES == (
        "chat_template", "chat_template.default", "chat_template.argilla_chat", "poft_plugin.hh_rlhf",
        "poft_plugin.ranked",
    )  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(
    ("row", "entry", "prompt"),
    [
        (CHAT, {}, (QUESTION,)),
        ({"messages": [{"role": "system", "content": "be"}, USER], **TWO}, {}, (NOTE, QUESTION)),
        ({"messages": [USER, BOT, USER], **TWO}, {}, (QUESTION, ANSWER, QUESTION)),
        ({"messages": "hi", **TWO}, {}, (QUESTION,)),
        ({"prompt": "hi", **TWO}, {}, (QUESTION,)),
        ({"prompt": [USER], **TWO}, {}, (QUESTION,)),
        ({"messages": None, "prompt": "hi", **TWO}, {}, (QUESTION,)),
        ({"messages": [USER], "prompt": "hi ", **TWO}, {}, (QUESTION,)),
        ({"messages": [USER], "prompt": "other", **TWO}, {"field_prompt": "messages"}, (QUESTION,)),
        ({"messages": [USER], "chosen": BOT, "rejected": WORSE}, {}, (QUESTION,)),
        ({"messages": [USER], "chosen": [USER, BOT], "rejected": [WORSE]}, {}, (QUESTION,)),
        ({"messages": [USER], "chosen": BOT, "rejected": "no"}, {}, (QUESTION,)),
        ({"talk": [USER], "good": "ho", "bad": "no"},
         {"field_messages": "talk", "field_chosen": "good", "field_rejected": "bad"}, (QUESTION,)),
        ({"question": "hi", **TWO}, {"field_prompt": "question"}, (QUESTION,)),
        ({"messages": [said("human", "hi")], "chosen": said("gpt", "ho"), "rejected": said("assistant", "no")},
         SHAREGPT, (QUESTION,)),
        ({"messages": [{"role": "user", "value": "hi"}], **TWO}, {"message_property_mappings": {"content": "value"}},
         (QUESTION,)),
        ({"messages": [{"role": "them", "content": "hi"}], "chosen": {"role": "us", "content": "ho"},
          "rejected": "no"}, {"roles": {"user": ["them"], "assistant": ["us"]}}, (QUESTION,)),
        ({"messages": [USER, {"role": "tool", "content": "42"}], **TWO}, {}, (QUESTION, Turn("tool", "42"))),
    ],
)  # fmt: skip
def test_pairs(kind: str, row: dict[str, Any], entry: dict[str, Any], prompt: tuple[Turn, ...]) -> None:
    """Text or messages for the prompt; text, a message or a list's last message for a response."""
    assert read(kind, row, **entry) == RankedSample(prompt, ("ho", "no"), (0, 1))


@pytest.mark.parametrize(
    ("row", "entry", "prompt"),
    [
        ({"chosen": [USER, BOT], "rejected": [USER, WORSE]}, {}, (QUESTION,)),
        ({"chosen": [USER, BOT, USER, BOT], "rejected": [USER, BOT, USER, WORSE]}, {}, (QUESTION, ANSWER, QUESTION)),
        ({"a": [said("human", "hi"), said("gpt", "ho")], "b": [said("human", "hi"), said("gpt", "no")]},
         {"field_chosen": "a", "field_rejected": "b", **SHAREGPT}, (QUESTION,)),
        ({"messages": "other", "prompt": "other", "chosen": [USER, BOT], "rejected": [USER, WORSE]}, {}, (QUESTION,)),
    ],
)  # fmt: skip
def test_dialogues(row: dict[str, Any], entry: dict[str, Any], prompt: tuple[Turn, ...]) -> None:
    """The prompt is what both have before their last answer."""
    assert read(DIALOGUES, row, **entry) == RankedSample(prompt, ("ho", "no"), (0, 1))


def test_dialogues_of_hh_rlhf() -> None:
    row = {"chosen": human("hi", "ho") + human("more", "yes"), "rejected": human("hi", "ho") + human("more", "no")}
    sample = read(HH_RLHF, row)
    assert sample == RankedSample((QUESTION, ANSWER, Turn("user", "more")), ("yes", "no"), (0, 1))
    other = {"good": row["chosen"], "bad": row["rejected"]}
    assert read(HH_RLHF, other, field_chosen="good", field_rejected="bad") == sample


OBJECTS = [{"text": "no", "score": -1}, {"text": "ho", "score": 2.5}, {"text": "so", "score": -1.0}]
OF_OBJECTS = {"field_response_text": "text", "field_response_score": "score"}
SORTED = RankedSample((QUESTION,), ("ho", "no", "so"), (0, 1, 1), (2.5, -1.0, -1.0))


@pytest.mark.parametrize(
    ("row", "entry", "expected"),
    [
        ({"prompt": "hi", "responses": ["ho", "no"]}, {}, RankedSample((QUESTION,), ("ho", "no"), (0, 1))),
        ({"messages": [USER], "responses": ("no", "ho")}, {}, RankedSample((QUESTION,), ("no", "ho"), (0, 1))),
        ({"prompt": "hi", "responses": ["no", "ho", "so"], "scores": [-1, 2.5, -1]}, {}, SORTED),
        ({"prompt": "hi", "answers": ["no", "ho", "so"], "marks": [-1, 2.5, -1], "scores": [9, 8, 7]},
         {"field_responses": "answers", "field_scores": "marks"}, SORTED),
        ({"prompt": "hi", "responses": OBJECTS}, OF_OBJECTS, SORTED),
        ({"prompt": "hi", "responses": OBJECTS, "scores": [9, 8, 7]}, OF_OBJECTS, SORTED),
        ({"prompt": "hi", "responses": OBJECTS, "scores": [-1, 2.5, -1]}, {"field_response_text": "text"}, SORTED),
        ({"prompt": "hi", "responses": OBJECTS}, {"field_response_text": "text"},
         RankedSample((QUESTION,), ("no", "ho", "so"), (0, 1, 2))),
        ({"prompt": "hi", "responses": ["no", {"text": "ho"}, "so"], "scores": [-1, 2.5, -1]},
         {"field_response_text": "text"}, SORTED),
    ],
)  # fmt: skip
def test_lists(row: dict[str, Any], entry: dict[str, Any], expected: RankedSample) -> None:
    """In order as they come; sorted where they have scores, their own before the row's."""
    assert read(RANKED, row, **entry) == expected


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (PAIR, CHAT),
        (DIALOGUES, {"chosen": [USER, BOT], "rejected": [USER, WORSE]}),
        (HH_RLHF, {"chosen": human("hi", "ho"), "rejected": human("hi", "no")}),
    ],
)
def test_scores_of_a_pair(kind: str, row: dict[str, Any]) -> None:
    """They come along; the label stands."""
    expected = RankedSample((QUESTION,), ("ho", "no"), (0, 1), (0.25, 0.5))
    assert read(kind, {**row, "scores": [0.25, 0.5]}) == expected
    assert read(kind, {**row, "marks": [0.25, 0.5], "scores": "others"}, field_scores="marks") == expected
    assert read(kind, {**row, "scores": None}).scores is None
    for scores, message in (([1], "1 scores for 2 responses"), (0.5, "the scores are 0.5, not a list of numbers")):
        with pytest.raises(RowError, match=f"^data row 3: {message}"):
            read(kind, {**row, "scores": scores})


def turns(text: str) -> list[tuple[str, str]]:
    """Roles and texts of a dialogue."""
    found = parse_hh_dialogue(text, "data row 3")
    assert not any(turn.counted for turn in found)
    return [(turn.role, turn.content) for turn in found]


def test_turns_of_a_dialogue() -> None:
    assert turns(human("hi", "ho") + human("more")) == [("user", "hi"), ("assistant", "ho"), ("user", "more")]
    assert turns("\n\nAssistant: ho\n\nHuman: hi") == [("assistant", "ho"), ("user", "hi")]


def test_white_space_around_turns_goes_and_inside_stays() -> None:
    text = "\n\n\nHuman:  a\n b\n\n c \n\nAssistant:\n\n ho\n\nHuman:\n\nAssistant: "
    assert turns(text) == [("user", "a\n b\n\n c"), ("assistant", "ho"), ("user", ""), ("assistant", "")]


def test_a_dialogue_may_begin_without_its_blank_lines() -> None:
    assert turns(human("hi", "ho").lstrip()) == turns(human("hi", "ho"))


def test_two_marks_of_one_role_are_one_turn() -> None:
    assert turns(human("a") + human("b", "c", "d")) == [("user", "a\n\nb"), ("assistant", "c\n\nd")]
    assert turns(human("a", "b", "", "c")) == [("user", "a"), ("assistant", "b\n\nc")]
    assert turns(human("a", "", "b")) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    "text",
    ["he said Human: no", "a\nHuman: b", "a\n\n Human: b", "a\n\nhuman: b", "a\n\nHumans: b", "a\n\nHuman b",
     "a\n\nAssistants:", "Human: b", "\\n\\nHuman: b"],
)  # fmt: skip
def test_a_mark_is_one_at_the_start_of_a_paragraph_only(text: str) -> None:
    assert turns(human(f"x {text}", text)) == [("user", f"x {text}"), ("assistant", text)]


@pytest.mark.parametrize(
    "text", ["", " ", "hello", "\nHuman: hi", "Be nice.\n\nHuman: hi", "\n\nSystem: x\n\nHuman: hi"]
)
def test_what_is_no_dialogue(text: str) -> None:
    message = f"data row 3: not a dialogue of hh-rlhf: it begins {text[:40]!r}, not '\\n\\nHuman:'"
    with pytest.raises(RowError, match=f"^{re.escape(message)}$"):
        parse_hh_dialogue(text, "data row 3")
    with pytest.raises(RowError, match="not a dialogue of hh-rlhf"):
        read(HH_RLHF, {"chosen": human("hi", "ho"), "rejected": text})


def test_unusable_rows_are_errors_but_for_hh_rlhf() -> None:
    assert [kind for kind in RANKED_TYPES if RankedFields().drops(kind)] == [HH_RLHF]
    assert all(RankedFields(on_unusable_row="drop").drops(kind) for kind in RANKED_TYPES)
    assert not any(RankedFields(on_unusable_row="error").drops(kind) for kind in RANKED_TYPES)


def lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a file."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        yield from enumerate(json.loads(line) for line in stream)


@pytest.mark.parametrize(
    ("name", "rows", "refused"), [("harmless-base", 1500, 4), ("helpful-base", 1500, 4), ("helpful-online", 922, 0)]
)
def test_real_dialogues(shared_data: Path, name: str, rows: int, refused: int) -> None:
    """Rows that cannot be used are those with an empty answer; of all others not a character is lost."""
    reader, reasons, total = ranked_reader(HH_RLHF, RankedFields()), Counter[str](), 0
    for number, row in lines(shared_data / "hh_rlhf" / f"{name}.train.jsonl.gz"):
        total += 1
        answers = [row[key].rpartition("\n\nAssistant:")[2].strip() for key in ("chosen", "rejected")]
        try:
            sample = reader(row, f"{name} row {number}")
        except RowError as error:
            reasons[re.sub(r"response \d", "response N", str(error).partition(f"{name} row {number}: ")[2])] += 1
            assert "" in answers
            continue
        assert all(answers)
        assert [text[-len(answer) :] for text, answer in zip(sample.responses, answers, strict=True)] == answers
        for key, response in zip(("chosen", "rejected"), sample.responses, strict=True):
            marks = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
            spoken = [*sample.prompt, Turn("assistant", response)]
            again = "".join(marks[turn.role] + turn.content for turn in spoken)
            plain = re.sub(r"\n\n(Human|Assistant):", "", row[key])
            assert re.sub(r"\n\n(Human|Assistant):", "", again).split() == plain.split()
            assert all(turn.role != following.role for turn, following in pairwise(spoken))
    assert total == rows
    reason = "response N of 2 has no text (''). Remove the row, or check the field names of the dataset entry"
    assert reasons == ({reason: refused} if refused else {})


def test_real_lists(shared_data: Path) -> None:
    """Ten responses each, judged; every row reads, sorted by its judge."""
    fields = RankedFields(field_response_text="output", field_response_score="score")
    reader, total, tied = ranked_reader(RANKED, fields), 0, 0
    for number, row in lines(shared_data / "ranked" / "alpaca_eval2.jsonl.gz"):
        sample = reader(row, f"row {number}")
        total += 1
        tied += len(set(sample.ranks)) < 10
        assert sample.prompt == (Turn("user", row["prompt"]),)
        by_score = sorted(row["responses"], key=lambda response: response["score"], reverse=True)
        assert sample.responses == tuple(response["output"] for response in by_score)
        assert sample.scores == tuple(float(response["score"]) for response in by_score)
        assert [a < b for a, b in pairwise(sample.ranks)] == [a > b for a, b in pairwise(sample.scores)]
    assert total == 803
    assert tied
