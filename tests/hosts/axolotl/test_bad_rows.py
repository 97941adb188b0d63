"""Conversations that cannot be used are errors of their row, or are left out where asked; reasoning is text."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import corpus
import hosting
import numpy as np
import pytest
import tiny
from contract_support import SINCE_0_20
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
    models: SimpleNamespace, folder: Path, rows: list[dict[str, Any]], poft: dict[str, Any], *,
    top: dict[str, Any] | None = None, test_datasets: Any = None, **entry: Any,
) -> Any:  # fmt: skip
    data = tiny.write_jsonl(folder / "data.jsonl", rows)
    settings = {
        "base_model": str(models.policy),
        "datasets": [{"path": str(data), "ds_type": "json", "type": "chat_template", **entry}],
        "test_datasets": test_datasets,
        "plugins": ["poft_plugin.PoftPlugin"],
        "rl": "poft",
        "poft": {"references": [{"model": str(models.ref_a)}], "score_cache": str(folder / "scores"), **poft},
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": None,
        "shuffle_merged_datasets": False,
    }
    path = tiny.write_config(folder / "config.yml", **{**settings, **(top or {})})
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
    assert texts(cfg) == [["one?", "two."], ["one?", "three."]]  # as prepared before: the summary says it all the same
    again = capsys.readouterr().out
    assert again.count("data.jsonl: 6 of 8 rows left out when it was read: rows 1, 2, 3, 4, 5 and 1 more") == 1


def test_so_are_evaluation_rows_and_preference_rows(
    models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, other = {"messages": [ASK]}, {"messages": [ASK, {**SAY, "content": "three."}]}
    data = tiny.write_jsonl(tmp_path / "eval.jsonl", [bad, other])
    entry = {"path": str(data), "ds_type": "json", "type": "chat_template", "split": "train"}
    cfg = config(models, tmp_path, [GOOD, bad], {"on_bad_row": "drop"}, test_datasets=[entry])
    _, evaluation, _ = load_host_rows(cfg)
    assert evaluation is not None
    assert len(evaluation.rows) == 1
    said = capsys.readouterr().out
    assert "data.jsonl: 1 of 2 rows left out when it was read: row 1" in said
    assert "eval.jsonl train: 1 of 2 rows left out when it was read: row 0" in said

    pairs = [{"prompt": "one?", "chosen": "two", "rejected": text} for text in ("ten", "", "six", "two")]
    cfg = config(
        models, tmp_path / "pairs", pairs, {}, on_unusable_row="drop",
        top={"rl": "deft_dpo", "poft": None, "deft": {"train_on": "all", "omega": 0}},
    )  # fmt: skip
    load_host_rows(cfg)
    assert "data.jsonl: 2 of 4 rows left out when it was read: rows 1, 3" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [[GOOD, {"messages": [ASK]}, GOOD, {"messages": "[{"}]])
def test_worker_processes_find_them_too(models: SimpleNamespace, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    rows = [{"messages": row["messages"] if row["messages"] == "[{" else json.dumps(row["messages"])} for row in rows]
    with pytest.raises(RowError, match=r"data.jsonl row 1: a row without a response.*\(2 of 4 rows cannot be used\)"):
        texts(config(models, tmp_path, rows, {}, top={"dataset_num_proc": 2}))
    kept = texts(config(models, tmp_path / "drop", rows, {"on_bad_row": "drop"}, top={"dataset_num_proc": 2}))
    assert kept == [["one?", "two."]] * 2


@pytest.mark.parametrize("rl", ["poft", "deft_dpo"])
def test_a_weight_is_a_share_of_the_rows_or_refused_by_name(models: SimpleNamespace, tmp_path: Path, rl: str) -> None:
    """Axolotl takes it since 0.20; before, it drops the key without a word."""
    rows = (
        tiny.chat_rows(10)
        if rl == "poft"
        else [{k: row[k] for k in row if k != "scores"} for row in tiny.pair_rows(10)]
    )
    top = {"rl": rl} if rl == "poft" else {"rl": rl, "poft": None, "deft": {"train_on": "all", "omega": 0}}
    if not SINCE_0_20:
        with pytest.raises(ValueError, match=r"datasets\[0\].weight: 0.5 is not read by this version .*`shards: 2`"):
            config(models, tmp_path, rows, {}, weight=0.5, top=top)
        return
    train, _, _ = load_host_rows(config(models, tmp_path, rows, {}, weight=0.5, top=top))
    assert len(train.rows) == 5
    assert set(train.rows.sources) == {"data.jsonl (weight 0.5)"}  # its row numbers are those of the share
    with pytest.raises(ValueError, match=r"datasets\[0\].weight: 1.5 is no share of a data set"):
        config(models, tmp_path, rows, {}, weight=1.5, top=top)


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


def strategy_and_reader(models: SimpleNamespace, kind: str) -> tuple[Any, Any]:
    """The host's strategy of a type, and how its rows are read."""
    from axolotl.prompt_strategies import load
    from axolotl.prompt_strategies.alpaca_chat import AlpacaPrompter
    from axolotl.prompt_tokenizers import AlpacaPromptTokenizingStrategy
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.policy)
    cfg = DictDefault(sequence_len=512, train_on_inputs=False, chat_template="tokenizer_default")
    if kind == "chat_template":
        strategy = load("chat_template", tokenizer, cfg, DictDefault(chat_template="tokenizer_default"))
        return strategy, ChatReader(strategy)
    strategy = AlpacaPromptTokenizingStrategy(AlpacaPrompter("instruct"), tokenizer, False, 512)
    return strategy, FieldReader(strategy)


@pytest.mark.parametrize("kind", ["chat_template", "alpaca"])
def test_any_value_in_any_field_is_read_or_refused_by_row(models: SimpleNamespace, kind: str) -> None:
    strategy, reader = strategy_and_reader(models, kind)

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


FIELDS = {
    "chat_template": ["messages", "tools", "system", "messages.0.role", "messages.1.role", "messages.0.content",
                      "messages.1.content", "messages.1.tool_calls", "messages.1.thinking"],
    "alpaca": ["instruction", "input", "output"],
}  # fmt: skip
"""Fields of a good row, with dots between."""


@pytest.mark.parametrize("kind", FIELDS)
def test_what_is_wrong_with_one_field_is_said_of_that_field(models: SimpleNamespace, kind: str) -> None:
    strategy, reader = strategy_and_reader(models, kind)
    good = {"messages": [ASK, SAY], "instruction": "one?", "input": "", "output": "two."}
    refused: set[str] = set()

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(FIELDS[kind]), JSON)
    def holds(place: str, value: Any) -> None:
        row = corpus.changed(good, place, value)
        refusal = f"data.jsonl row 3: {place}"
        try:
            assert host_tokens(strategy, reader(row, "data.jsonl row 3"), "data.jsonl row 3")["input_ids"]
        except RowError as error:
            refused.add(place)
            refusal = str(error)
        assert refusal.startswith("data.jsonl row 3: ")
        assert place.rpartition(".")[2] in refusal

    holds()
    assert refused == set(FIELDS[kind])
