"""Raw preference rows that cannot be used, and entries that cannot be read: each said with the row's name."""

from typing import Any

import pytest

from poft_plugin.config import parse_block
from poft_plugin.data.ranked import RankedSample
from poft_plugin.data.rows import RowError
from poft_plugin.hosts.axolotl.ranked_fields import DIALOGUES, HH_RLHF, PAIRS, RANKED, RankedFields
from poft_plugin.hosts.axolotl.ranked_rows import ranked_reader

PAIR = PAIRS[1]
USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
WORSE = {"role": "assistant", "content": "no"}
TWO = {"chosen": "ho", "rejected": "no"}
CHAT = {"messages": [USER], **TWO}
OF_OBJECTS = {"field_response_text": "text", "field_response_score": "score"}


def read(kind: str, row: dict[str, Any], **entry: Any) -> RankedSample:
    """One row, by the entry's own keys."""
    return ranked_reader(kind, parse_block(RankedFields, entry, "datasets[0]"))(row, "data row 3")


def human(text: str, *answers: str) -> str:
    """A dialogue of hh-rlhf."""
    return f"\n\nHuman: {text}" + "".join(f"\n\nAssistant: {answer}" for answer in answers)


NO_TEXT = r": response {} of {} has no text \({}\)\. Remove the row"
NO_ANSWER = r": the {} dialogue does not end with an assistant turn\. Remove the row$"
DIFFER = r": the two dialogues differ before the last answer.*`on_unusable_row: drop`"
EMPTY_PROMPT = r": an empty prompt\. Remove the row"
NO_NAMES = r"a message without text under 'role' and 'content': {}\. Set `message_property_mappings:`"


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (PAIR, {"messages": [USER], "rejected": "no"},
         r": no 'chosen'; the row has \['messages', 'rejected'\]\. Check the field names of the dataset entry$"),
        (PAIR, {**CHAT, "rejected": None}, r": no 'rejected'; the row has \['chosen', 'messages', 'rejected'\]"),
        (PAIR, TWO, r": no prompt under 'messages' or 'prompt'; the row has \['chosen', 'rejected'\]\. Set `field_"),
        (PAIR, {"messages": [USER], "responses": ["a", "b"]},
         r": a list of responses; set `type: poft_plugin\.ranked` for the data set, or give `chosen`$"),
        (PAIR, {**CHAT, "chosen": ""}, NO_TEXT.format(0, 2, "''")),
        (PAIR, {**CHAT, "rejected": " "}, NO_TEXT.format(1, 2, "' '")),
        (PAIR, {**CHAT, "messages": []}, EMPTY_PROMPT),
        (PAIR, {**CHAT, "messages": ""}, EMPTY_PROMPT),
        (PAIR, {**CHAT, "messages": 3}, r": expected messages or text, found 3$"),
        (PAIR, {**CHAT, "messages": {"role": "user"}}, r": expected messages or text, found \{'role': 'user'\}$"),
        (PAIR, {**CHAT, "messages": ["hi"]}, ": " + NO_NAMES.format("'hi'")),
        (PAIR, {**CHAT, "messages": [{"role": "user"}]}, ": " + NO_NAMES.format(r"\{'role': 'user'\}")),
        (PAIR, {**CHAT, "messages": [{"from": "human", "value": "hi"}]}, ": " + NO_NAMES.format(r"\{.*\}")),
        (PAIR, {**CHAT, "messages": [{"role": "them", "content": "hi"}]},
         r": a message of the unknown role 'them'; set `roles:` for the data set$"),
        (PAIR, {**CHAT, "chosen": USER}, r": 'chosen' is a user turn; a response is the assistant's$"),
        (PAIR, {**CHAT, "rejected": [BOT, USER]}, r": 'rejected' is a user turn; a response is the assistant's$"),
        (PAIR, {**CHAT, "rejected": 3}, ": rejected: " + NO_NAMES.format(3)),
        (PAIR, {**CHAT, "chosen": []}, ": chosen: " + NO_NAMES.format(r"\[\]")),
        (PAIR, {**CHAT, "chosen": {**BOT, "role": "them"}}, r": chosen: a message of the unknown role 'them'"),
        (DIALOGUES, {"chosen": [USER, BOT]}, r": no 'rejected'; the row has \['chosen'\]"),
        (DIALOGUES, {"chosen": [USER, BOT], "rejected": [USER]}, NO_ANSWER.format("rejected")),
        (DIALOGUES, {"chosen": [], "rejected": [USER, BOT]}, NO_ANSWER.format("chosen")),
        (DIALOGUES, {"chosen": "ho", "rejected": "no"}, NO_ANSWER.format("chosen")),
        (DIALOGUES, {"chosen": [USER, BOT], "rejected": [USER, USER, BOT]}, DIFFER),
        (DIALOGUES, {"chosen": [USER, BOT], "rejected": [{**USER, "content": "hi "}, BOT]}, DIFFER),
        (DIALOGUES, {"chosen": [BOT], "rejected": [WORSE]}, EMPTY_PROMPT),
        (DIALOGUES, {"chosen": 3, "rejected": [BOT]}, r": expected messages or text, found 3$"),
        (DIALOGUES, {"chosen": [USER, {**BOT, "content": ""}], "rejected": [USER, BOT]}, NO_TEXT.format(0, 2, "''")),
        (HH_RLHF, {"chosen": human("hi", "ho")}, r": no 'rejected'; the row has \['chosen'\]"),
        (HH_RLHF, {"chosen": [USER], "rejected": human("hi", "ho")}, r": 'chosen' is \[\{.*\}\], not text$"),
        (HH_RLHF, {"chosen": human("hi", "ho"), "rejected": human("hi")}, NO_ANSWER.format("rejected")),
        (HH_RLHF, {"chosen": human("hi", "ho"), "rejected": human("hi", "no") + human("")},
         NO_ANSWER.format("rejected")),
        (HH_RLHF, {"chosen": human("hi", "ho"), "rejected": human("you", "ho")}, DIFFER),
        (HH_RLHF, {"chosen": human("hi", "ho"), "rejected": human("hi", "")}, NO_TEXT.format(1, 2, "''")),
        (HH_RLHF, {"chosen": human("", "ho"), "rejected": human("", "no")}, EMPTY_PROMPT),
        (RANKED, {"prompt": "hi"}, r": no 'responses'; the row has \['prompt'\]"),
        (RANKED, {"prompt": "hi", "responses": "ho"}, r": 'responses' is no list but 'ho'$"),
        (RANKED, {"prompt": "hi", "responses": {"a": 1}}, r": 'responses' is no list but \{'a': 1\}$"),
        (RANKED, {"prompt": "hi", "responses": 3}, r": 'responses' is no list but 3$"),
        (RANKED, {"prompt": "hi", "responses": []}, r": 0 response\(s\); a ranked row needs at least two"),
        (RANKED, {"prompt": "hi", "responses": ["a"]}, r": 1 response\(s\); a ranked row needs at least two"),
        (RANKED, {"prompt": "hi", "responses": ["a", None]}, NO_TEXT.format(1, 2, "None")),
        (RANKED, {"prompt": "hi", "responses": ["a", ["b"]]}, NO_TEXT.format(1, 2, r"\['b'\]")),
        (RANKED, {"prompt": "", "responses": ["a", "b"]}, EMPTY_PROMPT),
        (RANKED, {"responses": ["a", "b"]}, r": no prompt under 'messages' or 'prompt'; the row has \['responses'\]"),
        (RANKED, {"prompt": "hi", "responses": ["a", {"text": "b", "score": 1}]},
         r": response 1 is an object with \['score', 'text'\]; set `field_response_text:` \(and `field_response_sco"),
        (RANKED, {"prompt": "hi", "responses": ["a", "b"], "scores": [1]}, ": 1 scores for 2 responses; give one"),
        (RANKED, {"prompt": "hi", "responses": ["a", "b"], "scores": 1}, ": the scores are 1, not a list of numbers"),
        (RANKED, {"prompt": "hi", "responses": ["a", "b"], "scores": [1, "x"]},
         ": the score of response 1 is 'x', not a finite number$"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(kind: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=f"^data row 3{message}"):
        read(kind, row)


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ([{"text": "a", "score": 1}, {"score": 2}], r" response 1: no 'text'; the row has \['score'\]"),
        ([{"text": "a", "score": 1}, {"text": "b"}], r" response 1: no 'score'; the row has \['text'\]"),
        ([{"text": "a", "score": None}, {"text": "b"}], r" response 0: no 'score'; the row has \['score', 'text'\]"),
        ([{"text": "a", "score": 1}, "b"], ": 1 scores for 2 responses; give one each$"),
        ([{"text": "a", "score": "x"}, {"text": "b", "score": 1}], ": the score of response 0 is 'x', not a finite"),
        ([{"text": 3, "score": 1}, {"text": "b", "score": 1}], NO_TEXT.format(0, 2, 3)),
    ],
)
def test_response_objects_that_cannot_be_used(responses: list[Any], message: str) -> None:
    with pytest.raises(RowError, match=f"^data row 3{message}"):
        read(RANKED, {"prompt": "hi", "responses": responses}, **OF_OBJECTS)


def test_names_in_messages_are_the_entrys() -> None:
    names = {"field_messages": "talk", "field_prompt": "q", "field_chosen": "good", "field_responses": "answers"}
    for kind, row, message in (
        (PAIR, {"talk": "hi", "rejected": "no"}, "no 'good'"),
        (PAIR, {"good": "ho", "rejected": "no"}, "no prompt under 'talk' or 'q'"),
        (PAIR, {"talk": "hi", "answers": ["a"]}, "a list of responses; .* or give `good`"),
        (RANKED, {"talk": "hi"}, "no 'answers'"),
        (DIALOGUES, {"rejected": [USER, BOT]}, "no 'good'"),
        (HH_RLHF, {"good": 3}, "'good' is 3, not text"),
    ):
        with pytest.raises(RowError, match=f"^data row 3: {message}"):
            read(kind, row, **names)


def test_given_roles_replace_the_usual_ones() -> None:
    with pytest.raises(RowError, match="unknown role 'user'"):
        read(PAIR, CHAT, roles={"user": ["them"]})
    with pytest.raises(RowError, match="unknown role 'assistant'"):
        read(PAIR, {**CHAT, "chosen": BOT}, roles={"user": ["user"]})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"field_chosn": "x"},
            r"\.field_chosn: unknown key; allowed here: field_chosen, field_input, field_messages, field_prompt",
        ),
        ({"field_chosen": ""}, r"\.field_chosen: .*at least 1 character"),
        ({"on_unusable_row": "skip"}, r"\.on_unusable_row: .*'error' or 'drop' \(given: 'skip'\)"),
        ({"roles": {"user": "human"}}, r"\.roles\.user"),
    ],
)
def test_refusals_of_an_entry(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^datasets\[0\]{message}"):
        parse_block(RankedFields, entry, "datasets[0]")


def test_every_key_of_an_entry_says_what_it_is() -> None:
    assert [name for name, field in RankedFields.model_fields.items() if not field.description] == []
