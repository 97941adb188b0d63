"""The dataset strategy of preference rows: what the host raises, what is left out, and what is said of it."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from transformers import AutoTokenizer

from poft_plugin.data.columns import CONVERSATION, DROPPABLE, RANKED_LABELS, ROW_NUMBER
from poft_plugin.data.ranked import RankedSample
from poft_plugin.data.rows import RowError
from poft_plugin.hosts.axolotl.entries import take_over_entries
from poft_plugin.hosts.axolotl.strategy import load
from poft_plugin.plugins import registry

STRICT = tiny.CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}",
)


@pytest.fixture(scope="module")
def tokenizer(models: SimpleNamespace) -> Any:
    return AutoTokenizer.from_pretrained(models.policy)


def wrap(rows: list[dict[str, Any]], tokenizer: Any, *, processes: int | None = None, **entry: Any) -> Dataset:
    """Rows as the host gets them."""
    settings = {"path": "data.jsonl", "type": "poft_plugin.ranked", **entry}
    cfg = DictDefault({"datasets": [settings], "sequence_len": 512, "base_model": "none"})
    take_over_entries(cfg, registry().methods["deft_pro"], None)
    return load(tokenizer, cfg, cfg["datasets"][0]).wrap_dataset(Dataset.from_list(rows), process_count=processes)


def row(number: int, *responses: str, system: str = "") -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    return {"messages": [*turns, {"role": "user", "content": f"{number}: alpha?"}], "responses": list(responses)}


ROWS = [row(0, "one", "two"), row(1, "one", "two", system="be"), row(2, "six", "two"), row(3, "a", "b", system="be")]


@pytest.mark.parametrize("processes", [None, 2])
def test_what_a_template_refuses_is_an_error_of_the_row(tokenizer: Any, processes: int | None) -> None:
    """In worker processes, too."""
    template = {"chat_template": "jinja", "chat_template_jinja": STRICT}
    message = (
        r"^data\.jsonl row 1: the policy's chat template refuses the turns \['system', 'user', 'assistant'\]: no "
        r"system turns\. Set another `chat_template:`, remove or merge the system turn, remove the row, or set "
        r"`on_unusable_row: drop` for the data set \(2 of 4 rows cannot be used\)$"
    )
    with pytest.raises(RowError, match=message):
        wrap(ROWS, tokenizer, processes=processes, **template)


def test_such_rows_are_left_out_where_asked(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    template = {"chat_template": "jinja", "chat_template_jinja": STRICT}
    rows = wrap(ROWS, tokenizer, on_unusable_row="drop", **template)
    assert list(rows[ROW_NUMBER]) == [0, 2]
    assert list(rows[DROPPABLE]) == [True, True]
    assert "data.jsonl: 2 of 4 rows left out; the first: data.jsonl row 1: the policy's" in capsys.readouterr().out
    with pytest.raises(RowError, match=r"not one of its 2 rows can be used; the first: data\.jsonl row 0"):
        wrap([ROWS[1], ROWS[3]], tokenizer, on_unusable_row="drop", **template)
    assert list(wrap(ROWS, tokenizer)[DROPPABLE]) == [False] * 4


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("1 // 0", "ZeroDivisionError"),
        ("m.nothing.at.all", "has no attribute"),
        ("m.content + 1", "TypeError"),
        ("m.content.index('zzz')", "ValueError"),
    ],
)
def test_whatever_it_raises(tokenizer: Any, expression: str, reason: str) -> None:
    broken = tiny.CHATML.replace("{{ m['content'] }}", f"{{{{ {expression} }}}}{{{{ m['content'] }}}}")
    with pytest.raises(RowError, match=rf"^data\.jsonl row 0: the policy's chat template refuses .*{reason}"):
        wrap(ROWS[:1], tokenizer, chat_template="jinja", chat_template_jinja=broken)


def test_rows_that_prefer_nothing_are_left_out_and_counted(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """So is a response that repeats a better one; all of it as the policy sees it, and by any setting."""
    rows = [row(0, "one", "two"), row(1, "six", "six"), row(2, "a", "b", "a", "c", "b"), row(3, "x", "x", "x")]
    prepared = wrap(rows, tokenizer)
    samples = [RankedSample.loads(text) for text in prepared[CONVERSATION]]
    assert [(s.responses, s.ranks) for s in samples] == [(("one", "two"), (0, 1)), (("a", "b", "c"), (0, 1, 2))]
    trained = tokenizer.decode([label for label in prepared[RANKED_LABELS][1] if label != -100])
    assert trained.replace("<|im_end|>", " ").split() == ["a", "b", "c"]
    said = capsys.readouterr().out
    assert "data.jsonl: 2 of 4 rows left out, whose responses are all the same; 2 responses left out of other" in said
    assert "the first: data.jsonl row 1. They are not graded, counted or trained on" in said
    trimming = tiny.CHATML.replace("m['content']", "m['content'] | trim")
    assert len(wrap([row(0, "one", "one "), row(1, "a", "b")], tokenizer)) == 2
    trimmed = {"chat_template": "jinja", "chat_template_jinja": trimming}
    assert len(wrap([row(0, "one", "one "), row(1, "a", "b")], tokenizer, **trimmed)) == 1
    with pytest.raises(RowError, match=r"^data\.jsonl row 0: all its responses are the same .*\(2 of 2\)"):
        wrap([rows[1], rows[3]], tokenizer, on_unusable_row="drop")


def test_columns_that_nobody_reads_are_told_once(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row(number, "one", "two"), "system": "be" if number else "", "input": "x"} for number in range(3)]
    wrap(rows, tokenizer)
    said = capsys.readouterr().out
    assert "data.jsonl: the column 'system' is not read, though 2 of 3 rows have something there. Name it" in said
    assert said.count("is not read") == 2
    prepared = wrap(rows, tokenizer, field_system="system", field_input="input")
    assert "is not read" not in capsys.readouterr().out
    prompts = [
        [(turn.role, turn.content) for turn in RankedSample.loads(text).prompt] for text in prepared[CONVERSATION]
    ]
    assert prompts[0] == [("user", "0: alpha?\n\nx")]
    assert prompts[1] == [("system", "be"), ("user", "1: alpha?\n\nx")]
