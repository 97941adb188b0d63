"""What layouts of preference rows must not be read as: each refusal with a remedy, and the entries that ask for it."""

import json
from typing import Any

import pytest

from poft_plugin.config import parse_block
from poft_plugin.data.ranked import RankedSample
from poft_plugin.data.rows import RowError, Turn
from poft_plugin.hosts.axolotl.entries import take_over_entries
from poft_plugin.hosts.axolotl.ranked_fields import (
    DIALOGUES,
    HH_RLHF,
    PAIRS,
    RANKED,
    RANKED_TYPES,
    READ_BY,
    RankedFields,
)
from poft_plugin.hosts.axolotl.ranked_host_types import STYLES, from_host_type
from poft_plugin.hosts.axolotl.ranked_rows import ranked_reader
from poft_plugin.plugins import registry

PAIR = PAIRS[0]
USER, BOT, WORSE = (
    {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "ho"), ("assistant", "no"))
)
TWO = {"chosen": "ho", "rejected": "no"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "w"}]}
COLUMNS = {"field_responses": ["a", "b"]}
HH = "\n\nHuman: hi\n\nAssistant:"
SAMPLE = RankedSample((Turn("user", "hi"),), ("ho", "no"), (0, 1))


def read(kind: str, row: dict[str, Any], **entry: Any) -> RankedSample:
    return ranked_reader(kind, parse_block(RankedFields, entry, "datasets[0]"))(row, "data row 3")


@pytest.mark.parametrize(
    ("kind", "row", "entry", "message"),
    [
        (PAIR, {"prompt": "hi", "chosen": [{"role": "system", "content": "be"}, USER, BOT], "rejected": [WORSE]}, {},
         r"response 0 has 2 turn\(s\) before the answer \(system, user\) that are not the prompt's.*argilla_chat`"),
        (PAIR, {"prompt": "hi", "chosen": BOT, "rejected": [BOT, USER, WORSE]}, {}, r"response 1 has 2 turn\(s\)"),
        (PAIR, {"chosen": [USER, BOT], "rejected": [USER, WORSE]}, {}, "no prompt under .*Set `type: chat_template"),
        (RANKED, {"prompt": "hi", "responses": [[USER, BOT], [BOT, WORSE]]}, {}, r"response 1 has 1 turn\(s\) before"),
        (RANKED, {"responses": [[USER, BOT], [{**USER, "content": "you"}, WORSE]]}, {}, "no common prompt"),
        (PAIR, {"messages": [USER, BOT], **TWO}, {}, "the prompt ends with an assistant turn.*`field_messages:`"),
        (PAIR, {"prompt": f"{HH} ho", **TWO}, {}, "the prompt ends with an assistant turn"),
        (DIALOGUES, {"chosen": [USER, BOT, BOT], "rejected": [USER, BOT, WORSE]}, {}, "ends with an assistant turn"),
        (PAIR, {"prompt": "hi", **TWO, "tools": [{"name": "w"}]}, {}, r"it has tools \(\[\{'name'.*Remove such rows"),
        (HH_RLHF, {"chosen": f"{HH} ho", "rejected": f"{HH} no", "tools": "[{}]"}, {}, r"it has tools"),
        (PAIR, {"messages": [USER, CALL, {"role": "tool", "content": "sun"}], **TWO}, {},
         r"a message has 'tool_calls' .*Write it into `content` as the policy's template writes calls, or remove"),
        (PAIR, {"prompt": "hi", "chosen": {**BOT, "tool_calls": [1]}, "rejected": "no"}, {}, "chosen: a message has"),
        (RANKED, {"prompt": "hi", "responses": [{**BOT, "thinking": "hm"}, WORSE]}, {},
         r"a message has 'thinking' \('hm'\).*Set `field_thinking: thinking`"),
        (RANKED, {"prompt": "hi", "responses": [{**BOT, "reasoning_content": ["hm"]}, WORSE]}, {},
         r"a message whose 'reasoning_content' is \['hm'\], not text"),
        (PAIR, {"prompt": "hi", "chosen": [{**USER, "reasoning_content": "hm"}, BOT], "rejected": WORSE}, {},
         r"response 0 has 1 turn\(s\) before the answer"),
        (PAIR, {"messages": [{"role": "user", "content": None}], **TWO}, {},
         "a message whose 'content' is None, not text.*Write it as one text, or remove the row"),
        (PAIR, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], **TWO}, {},
         "a message whose 'content' is .*Write it as one text"),
        (PAIR, {"prompt": "Be nice.\n\nHuman: hi\n\nAssistant:", **TWO}, {}, "not begin with such a mark.*`text_f"),
        (PAIR, {"prompt": "<|im_start|>user\nhi<|im_end|>", **TWO}, {}, r"begins with '<\|im_start\|>', a chat templ"),
        (PAIR, {"prompt": "hi", "chosen": "<s>[INST] ho", "rejected": "no"}, {}, r"'chosen' begins with '\[INST\]'"),
        (PAIR, {"prompt": HH, "chosen": " ho\n\nHuman: more", "rejected": " no"}, {}, "'chosen' goes on with another"),
        (PAIR, {"prompt": "hi", "chosen": json.dumps([USER, BOT]), "rejected": "no"}, {}, "Set `text_format: json`"),
        (PAIR, {"messages": [USER], "prompt": "you", **TWO}, {}, "'messages' and 'prompt' are both there, and differ"),
        (PAIR, {"messages": [{"role": "system", "content": "be"}, USER], **TWO, "system": "other"},
         {"field_system": "system"}, "the prompt has a system turn, and 'system' another text"),
        (PAIR, {"prompt": "hi", **TWO, "sys": 3}, {"field_system": "sys"}, "'sys' is 3, not text"),
        (PAIR, {"prompt": "hi", **TWO}, {"field_system": "sytem"}, r"no 'sytem'; the row has \['chosen'"),
        (PAIR, {"messages": [{"role": "system", "content": "be"}], **TWO, "input": "x"}, {"field_input": "input"},
         "'input' has a text, but the prompt does not end with a user turn"),
        (PAIR, {"prompt": "hi", **TWO, "a": 1.0, "b": None}, {"field_scores": ["a", "b"]}, "no score under 'b'"),
        (RANKED, {"prompt": "hi", "a": "ho", "b": "no", "won": "tie"},
         {"field_responses": ["a", "b"], "field_winner": "won"},
         r"'won' is 'tie', which names none of the 2 responses \(0, 1\)\. Set `winner_values:`"),
        (RANKED, {"prompt": "hi", "a": "ho", "b": "no"}, {**COLUMNS, "field_winner": "won"}, "no 'won'"),
        (RANKED, {"prompt": "hi", "responses": ["ho", "no"], "place": [1]}, {"field_ranks": "place"},
         "1 ranks for 2 responses"),
        (RANKED, {"prompt": "hi", "responses": ["ho", "no"], "place": [1, 10**400]}, {"field_ranks": "place"},
         "the rank of response 1 is 1000.*, not a finite number"),
        (RANKED, {"prefix": [["<|prompter|>hi", "<|assistant|>"], ["<|prompter|>you", "<|assistant|>"]],
                  "responses": ["ho", "no"]}, {"field_prompt": "prefix"}, "the prompts of its responses differ"),
    ],
)  # fmt: skip
def test_rows_that_would_be_read_wrongly(kind: str, row: dict[str, Any], entry: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=f"(?s)^data row 3.*{message}"):
        read(kind, row, **entry)


@pytest.mark.parametrize(
    ("kind", "row", "entry"),
    [
        (PAIR, {"prompt": "hi", **TWO, "tools": []}, {}),
        (PAIR, {"messages": [{**USER, "tool_calls": None, "reasoning_content": ""}], **TWO, "tools": "[]"}, {}),
        (PAIR, {"messages": [{"role": "system", "content": " "}, USER], "chosen": [USER, BOT], "rejected": "no"}, {}),
        (PAIR, {"prompt": HH, "chosen": f"{HH} ho", "rejected": " no\n"}, {}),
        (PAIR, {"prompt": "Human: hi\n\nAssistant:", **TWO}, {}),
        (PAIR, {"prompt": "<|prompter|>hi<|endoftext|><|assistant|>", "chosen": " ho", "rejected": "no"}, {}),
        (PAIR, {"prompt": json.dumps([USER]), "chosen": json.dumps([USER, BOT]), "rejected": json.dumps(WORSE)},
         {"text_format": "json"}),
        (HH_RLHF, {"prompt": HH, "chosen": " ho", "rejected": " no"}, {}),
        (HH_RLHF, {"prompt": [USER], "chosen": "\n\nAssistant: ho", "rejected": "\n\nAssistant: no"}, {}),
        (HH_RLHF, {"prompt": HH, "chosen": "\n\nAssistant: ho", "rejected": " no"}, {}),
        (RANKED, {"prompt": "hi", "a": "no", "b": "ho", "won": 1.0}, {**COLUMNS, "field_winner": "won"}),
        (RANKED, {"prompt": "hi", "a": "no", "b": "ho", "won": "b"}, {**COLUMNS, "field_winner": "won"}),
        (RANKED, {"prompt": "hi", "a": "ho", "b": "no", "won": True},
         {"field_responses": ["a", "b"], "field_winner": "won", "winner_values": ["true", "false"]}),
        (RANKED, {"prompt": "hi", "responses": ["no", "ho"], "place": [2, 1]}, {"field_ranks": "place"}),
        (RANKED, {"prompt": "hi", "responses": [WORSE, BOT], "won": 1}, {"field_winner": "won"}),
    ],
)  # fmt: skip
def test_the_same_pair_in_many_layouts(kind: str, row: dict[str, Any], entry: dict[str, Any]) -> None:
    assert read(kind, row, **entry) == SAMPLE


def test_plain_texts_stay_as_they_are() -> None:
    texts = [HH, json.dumps([USER]), "<|im_start|>hi", "<|prompter|>hi<|assistant|>", "so\n\nHuman: hi"]
    for text in texts:
        for other in texts:
            sample = read(PAIR, {"prompt": text, "chosen": other, "rejected": "no"}, text_format="plain")
            assert sample == RankedSample((Turn("user", text),), (other, "no"), (0, 1))


def test_ranks_and_scores_come_along_with_their_responses() -> None:
    items = [{"t": "c", "s": 0.5, "r": 2}, {"t": "a", "s": -3, "r": 1}, {"t": "d", "s": 9, "r": 2}]
    entry = {"field_response_text": "t", "field_response_score": "s", "field_response_rank": "r"}
    sample = read(RANKED, {"prompt": "hi", "responses": items}, **entry)
    assert (sample.responses, sample.ranks, sample.scores) == (("a", "c", "d"), (0, 1, 1), (-3.0, 0.5, 9.0))
    columns = {"field_responses": ["x", "y", "z"], "field_winner": "won", "field_scores": ["sx", "sy", "sz"]}
    row = {"prompt": "hi", "x": "b", "y": "a", "z": "c", "won": 1, "sx": 1, "sy": 2, "sz": 3}
    sample = read(RANKED, row, **columns)
    assert (sample.responses, sample.ranks, sample.scores) == (("a", "b", "c"), (0, 1, 1), (2.0, 1.0, 3.0))


def take_over(**entry: Any) -> dict[str, Any]:
    cfg: dict[str, Any] = {"datasets": [{"path": "data", **entry}]}
    take_over_entries(cfg, registry().methods["deft_pro"], None)
    return cfg


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": PAIR, "train_on_eos": "all"}, r"train_on_eos: 'all' trains on ends of turns.*use `turn` or `last`"),
        ({"type": PAIR, "field_winner": "x"}, r"field_winner: not read by `type: chat_template`, but by poft_plugin\."),
        ({"type": DIALOGUES, "field_messages": "x"}, r"field_messages: not read by .*, but by chat_template, "),
        ({"type": HH_RLHF, "text_format": "json"}, r"text_format: not read by `type: poft_plugin\.hh_rlhf`"),
        ({"type": RANKED, "winner_values": [1, 0]}, "winner_values: there, but no `field_winner:`"),
        ({"type": RANKED, "field_winner": "w", "field_ranks": "r"}, "field_ranks: `field_winner` says the order, too"),
        ({"type": RANKED, "field_responses": ["a", "b"], "field_winner": "w", "winner_values": [1]},
         "winner_values: 1 for 2 responses; give one for each"),
        ({"type": PAIR, "field_scores": ["a"]}, "field_scores: 1 for 2 responses"),
        ({"type": PAIR, "weight": 2.0}, "weight: 2.0 is (not read by this version|no share of a data set)"),
        ({"type": "chatml.default"}, r"\(data\): type 'chatml\.default' reads whichever.*\n    type: chat_template\n"),
        ({"type": "llama3"}, "\n    chat_template: llama3$"),
        ({"type": "zephyr.nectar"}, r"markup.*\n    type: poft_plugin\.ranked\n.*\n    field_response_rank: rank$"),
        ({"type": "user_defined.default"}, "names no columns.*\n    type: chat_template\n    field_prompt: prompt$"),
        ({"type": {"field_prompt": "q", "prompt_format": "<s>{prompt}"}}, "puts text around.*\n.*\n.*prompt: q$"),
        ({"type": {"field_prompt": "q", "field_output": "x"}}, r"has unknown keys \['field_output'\] for"),
        ({"type": "chatml.intel", "chat_template": "llama3"}, "markup of chatml, and `chat_template: llama3`"),
    ],
)  # fmt: skip
def test_entries_that_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^datasets\[0\].*{message}"):
        take_over(**entry)


@pytest.mark.parametrize("template", ["chatml", "llama3"])
@pytest.mark.parametrize("style", STYLES)
def test_the_hosts_types_are_entries_of_ours(style: str, template: str) -> None:
    """The user's own keys stand; the template is the one whose markup the host would write."""
    found = from_host_type({"path": "data", "type": f"{template}.{style}", "field_chosen": "good"}, "datasets[0]")
    assert found["type"] in RANKED_TYPES
    assert (found["chat_template"], found["field_chosen"]) == (template, "good")
    assert set(found) - {"path", "type", "chat_template"} <= READ_BY[found["type"]]
    assert take_over(type=f"{template}.{style}")["datasets"][0]["chat_template"] == template


def test_other_entries_stay_as_they_are() -> None:
    for kind in RANKED_TYPES:
        assert from_host_type({"path": "data", "type": kind}, "datasets[0]") == {"path": "data", "type": kind}


def test_every_key_is_read_by_some_type() -> None:
    assert set().union(*READ_BY.values()) == set(RankedFields.model_fields)
    assert set(READ_BY) == set(RANKED_TYPES)
