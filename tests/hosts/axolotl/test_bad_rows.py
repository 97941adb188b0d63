"""Conversations that cannot be used are errors of their row, or are left out where asked; reasoning is text."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poft_plugin.data.preparation import RunContext
from poft_plugin.data.rows import RowError, load_conversation
from poft_plugin.hosts.axolotl.chat_rows import ChatReader
from poft_plugin.hosts.axolotl.conversations import host_tokens
from poft_plugin.hosts.axolotl.field_rows import FieldReader
from poft_plugin.hosts.axolotl.host_rows import load_host_rows
from poft_plugin.hosts.axolotl.stages import RunStages

ASK, SAY = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}
GOOD = {"messages": [ASK, SAY]}
THINK = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
THINKING = tiny.CHATML.replace("\n{{ m['content'] }}", "\n" + THINK + "{{ m['content'] }}")
REASONED = {"messages": [ASK, {**SAY, "reasoning_content": "because"}]}


def config(
    models: SimpleNamespace, folder: Path, rows: list[dict[str, Any]], poft: dict[str, Any], **entry: Any
) -> Any:
    data = tiny.write_jsonl(folder / "data.jsonl", rows)
    path = tiny.write_config(
        folder / "config.yml",
        base_model=str(models.policy),
        datasets=[{"path": str(data), "ds_type": "json", "type": "chat_template", **entry}],
        plugins=["poft_plugin.PoftPlugin"],
        rl="poft",
        poft={"references": [{"model": str(models.ref_a)}], "score_cache": str(folder / "scores"), **poft},
        output_dir=str(folder / "out"),
        dataset_prepared_path=str(folder / "prepared"),
        dataset_num_proc=None,
        shuffle_merged_datasets=False,
    )
    return hosting.load_config(path)


def texts(cfg: Any) -> list[list[str]]:
    train, _, _ = load_host_rows(cfg)
    return [[turn.content for turn in load_conversation(text)] for text in train.rows.table["conversation"].to_pylist()]


@pytest.mark.parametrize(
    ("row", "entry", "message"),
    [
        (
            {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {},
            r"row 1: .*under 'role'.*message_property_mappings: {role: from, content: value}.*\(1 of 2",
        ),
        ({"messages": json.dumps(["hi"])}, {}, r"row 1: messages\[0\] is 'hi', not a message"),
        ({"messages": "[{"}, {}, r"row 1: the messages under 'messages' are text that is no JSON"),
        ({**GOOD, "tools": "foo"}, {}, r"row 1: the tools under 'tools' are text that is no JSON.*'foo'"),
        (
            {"messages": [{"role": "system", "content": "s"}, ASK, SAY]},
            {"chat_template": "jinja", "chat_template_jinja": tiny.INST},
            r"row 1: the policy's chat template refuses the turns.*only user and assistant turns",
        ),
        (REASONED, {}, r"row 1: .*chat template does not write 'reasoning_content' of the turn 1.*'because'"),
        (
            {"messages": [ASK, {**SAY, "thinking": "hm"}]},
            {},
            r"row 1: messages\[1\].thinking is not read: 'hm'. Set `field_thinking: thinking`",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_said_of_it(
    models: SimpleNamespace, tmp_path: Path, row: dict[str, Any], entry: dict[str, Any], message: str
) -> None:
    good = {"messages": json.dumps(GOOD["messages"])} if isinstance(row["messages"], str) else GOOD
    with pytest.raises(RowError, match=message):
        texts(config(models, tmp_path, [good, row], {}, **entry))


@pytest.mark.parametrize(
    ("row", "entry", "expected"),
    [
        *[({**GOOD, "tools": tools}, {}, ["one?", "two."]) for tools in ("", "null", "[]", "{}")],
        ({"messages": json.dumps(GOOD["messages"])}, {}, ["one?", "two."]),
        ({"prompt": [ASK], "completion": [SAY]}, {"type": "poft_plugin.prompt_completion"}, ["one?", "two."]),
        ({"prompt": "one?", "completion": "two."}, {"type": "poft_plugin.prompt_completion"}, ["one?", "two."]),
        ({"instruction": "double", "input": 21, "output": "42"}, {"type": "alpaca"}, ["double\n\n21", "42"]),
        (
            REASONED,
            {"chat_template": "jinja", "chat_template_jinja": THINKING},
            ["one?", "<think>\nbecause\n</think>\n\ntwo."],
        ),
        (
            {"messages": [ASK, {**SAY, "thinking": "hm"}]},
            {"chat_template": "jinja", "chat_template_jinja": THINKING, "field_thinking": "thinking"},
            ["one?", "<think>\nhm\n</think>\n\ntwo."],
        ),
    ],
)  # fmt: skip
def test_rows_that_people_have_are_read(
    models: SimpleNamespace, tmp_path: Path, row: dict[str, Any], entry: dict[str, Any], expected: list[str]
) -> None:
    assert texts(config(models, tmp_path, [row, row], {}, **entry)) == [expected, expected]


def test_bad_rows_are_left_out_counted_and_named(
    models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [GOOD, *[{"messages": [ASK]}] * 6, {"messages": [ASK, {**SAY, "content": "three."}]}]
    cfg = config(models, tmp_path, rows, {"on_bad_row": "drop"})
    assert texts(cfg) == [["one?", "two."], ["one?", "three."]]
    said = capsys.readouterr().out
    assert "6 of 8 rows left out (poft.on_bad_row: drop)" in said
    assert [f"row {number}:" in said for number in range(1, 7)] == [True] * 5 + [False]


def test_where_no_row_is_left_it_is_an_error_all_the_same(models: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"row 0: .*\(2 of 2 rows cannot be used\)"):
        texts(config(models, tmp_path, [{"messages": [ASK]}] * 2, {"on_bad_row": "drop"}))


def test_rows_that_a_reference_refuses_are_left_out(models: SimpleNamespace, tmp_path: Path) -> None:
    rows = [GOOD, {"messages": [{"role": "system", "content": "s"}, ASK, SAY]}]
    cfg = config(models, tmp_path, rows, {"on_bad_row": "drop"})
    from axolotl.integrations.base import PluginManager

    plugin = PluginManager.get_instance().plugins["poft_plugin.PoftPlugin"]
    (kept,) = [part.rows for part in RunStages(cfg, plugin.method_run, RunContext("score")).graded]
    assert [len(load_conversation(text)) for text in kept.table["conversation"].to_pylist()] == [2]
    assert np.isfinite(kept.attached["reference_logp"]).all()


def test_a_data_set_of_long_rows_alone_says_what_to_set(models: SimpleNamespace, tmp_path: Path) -> None:
    long = {"messages": [ASK, {**SAY, "content": "two " * 600}]}
    with pytest.raises(ValueError, match=r"data.jsonl: no rows left: all 3 are longer than sequence_len 512"):
        texts(config(models, tmp_path, [long] * 3, {}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "thinking", "train"]), JSON, max_size=4)
VALUES = JSON | st.lists(MESSAGE | st.just(ASK) | st.just(SAY), max_size=4)
NAMES = st.sampled_from(["messages", "tools", "system", "images", "instruction", "input", "output"])
ROWS = st.dictionaries(NAMES, VALUES, max_size=5)


@pytest.mark.parametrize("kind", ["chat_template", "alpaca"])
def test_any_value_in_any_field_is_read_or_refused_by_row(models: SimpleNamespace, kind: str) -> None:
    from axolotl.prompt_strategies import load
    from axolotl.prompt_strategies.alpaca_chat import AlpacaPrompter
    from axolotl.prompt_tokenizers import AlpacaPromptTokenizingStrategy
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.policy)
    cfg = DictDefault(sequence_len=512, train_on_inputs=False, chat_template="tokenizer_default")
    if kind == "chat_template":
        strategy = load("chat_template", tokenizer, cfg, DictDefault(chat_template="tokenizer_default"))
        reader: Any = ChatReader(strategy)
    else:
        strategy = AlpacaPromptTokenizingStrategy(AlpacaPrompter("instruct"), tokenizer, False, 512)
        reader = FieldReader(strategy)

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(ROWS)
    def holds(row: dict[str, Any]) -> None:
        refusal = "data.jsonl row 3"
        try:
            assert host_tokens(strategy, reader(row, "data.jsonl row 3"), "data.jsonl row 3")["input_ids"]
        except RowError as refused:
            refusal = str(refused)
        assert refusal.startswith("data.jsonl row 3")

    holds()
