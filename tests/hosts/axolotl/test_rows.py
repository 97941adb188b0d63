"""Raw rows of every supported dataset type: the conversation that references see, and the refusals."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny

from poft_plugin.data.rows import RowError, Turn, load_conversation
from poft_plugin.hosts.axolotl.host_rows import load_host_rows

CHAT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}]
LONG = [*CHAT, {"role": "user", "content": "three?"}, {"role": "assistant", "content": "four."}]
SHAREGPT = [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two."}]
SHAREGPT_ENTRY = {
    "type": "chat_template",
    "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
}


def rows_of(models: SimpleNamespace, folder: Path, rows: list[dict[str, Any]], **entry: Any) -> list[tuple[Turn, ...]]:
    data = tiny.write_jsonl(folder / "data.jsonl", rows)
    settings = {"type": "chat_template", **entry}
    path = tiny.write_config(
        folder / "config.yml",
        base_model=str(models.policy),
        datasets=[{"path": str(data), "ds_type": "json", **settings}],
        plugins=["poft_plugin.PoftPlugin"],
        rl="poft",
        poft={"references": [{"model": str(models.ref_a)}]},
        output_dir=str(folder / "out"),
        dataset_prepared_path=str(folder / "prepared"),
        dataset_num_proc=None,
        shuffle_merged_datasets=False,
    )
    train, _, _ = load_host_rows(hosting.load_config(path))
    assert len(train.dataset) == len(rows)
    return [load_conversation(text) for text in train.rows.table["conversation"].to_pylist()]


def user(text: str) -> Turn:
    return Turn("user", text)


def answer(text: str, counted: bool = True) -> Turn:
    return Turn("assistant", text, counted, ends=int(counted))


@pytest.mark.parametrize(
    ("row", "entry", "expected"),
    [
        ({"messages": CHAT}, {}, (user("one?"), answer("two."))),
        ({"messages": LONG}, {}, (user("one?"), answer("two."), user("three?"), answer("four."))),
        ({"conversations": SHAREGPT}, SHAREGPT_ENTRY, (user("one?"), answer("two."))),
        (
            {"messages": [CHAT[0], {**CHAT[1], "train": False}, LONG[2], {**LONG[3], "train": True}]},
            {"message_field_training": "train"},
            (user("one?"), answer("two.", False), user("three?"), answer("four.")),
        ),
        (
            {"instruction": "add", "input": "1 2", "output": "3"},
            {"type": "alpaca"},
            (user("add\n\n1 2"), answer("3")),
        ),
        ({"instruction": "add", "input": "", "output": "3"}, {"type": "alpaca:chat"}, (user("add"), answer("3"))),
        ({"question": "q", "answer": "a"}, {"type": "alpaca_chat.load_qa"}, (user("q"), answer("a"))),
        (
            {"instruction": "add", "output": "3", "system": "Be kind."},
            {"type": "alpaca_w_system.load_chat"},
            (Turn("system", "Be kind."), user("add"), answer("3")),
        ),
        (
            {"segments": [{"label": False, "text": "<|im_start|>one?"}, {"label": True, "text": " two.<|im_end|>"}]},
            {"type": "input_output"},
            (user("one?"), answer(" two.")),
        ),
        (
            {
                "segments": [
                    {"label": False, "text": "<|im_start|>system\nBe kind.<|im_end|>\n"},
                    {"label": False, "text": "<|im_start|>user\none?<|im_end|>\n"},
                    {"label": False, "text": "<|im_start|>assistant\n"},
                    {"label": True, "text": "two.<|im_end|>\n"},
                ]
            },
            {"type": "input_output"},
            (Turn("system", "Be kind."), user("one?"), answer("two.")),
        ),
        (
            {"q": "one", "a": "two"},
            {"type": {"field_instruction": "q", "field_output": "a", "no_input_format": "{instruction} "}},
            (user("one"), answer("two")),
        ),
    ],
)  # fmt: skip
def test_conversations(
    models: SimpleNamespace, tmp_path: Path, row: dict[str, Any], entry: dict[str, Any], expected: tuple[Turn, ...]
) -> None:
    assert rows_of(models, tmp_path, [row, row], **entry) == [expected, expected]


def test_an_older_version_of_ours_leaves_nothing_in_the_cache_of_datasets(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` hashes a function of a package by its name: another body under the same name gets the old result."""
    from poft_plugin.hosts.axolotl import strategy

    rows_of(models, tmp_path, [{"messages": CHAT}])
    shutil.rmtree(tmp_path / "prepared")
    monkeypatch.setattr(tiny, "write_jsonl", lambda path, _: path)  # the very same file
    monkeypatch.setattr(strategy, "dump_conversation", lambda _: '[["user","newer version",false]]')
    assert rows_of(models, tmp_path, [{"messages": CHAT}]) == [(user("newer version"),)]


@pytest.mark.parametrize(
    ("row", "entry", "error", "message"),
    [
        ({"messages": CHAT[:1]}, {}, RowError, r"data.jsonl row 1: a row without a response"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, {}, RowError, r"row 1: a row without a resp"),
        ({"messages": [{"role": "user", "content": None}, CHAT[1]]}, {}, RowError, r"row 1: a turn without text"),
        ({"messages": None}, {}, RowError, r"row 1: a row without a response: no messages under 'messages'"),
        ({"messages": CHAT}, {"roles_to_train": ["user"]}, ValueError, r"roles_to_train: \['user'\]"),
        ({"messages": CHAT}, {"train_on_eos": "all"}, ValueError, r"train_on_eos: all"),
        ({"messages": CHAT}, {"message_field_training_detail": "d"}, ValueError, r"message_field_training_detail"),
        ({"messages": CHAT}, {"split_thinking": True}, ValueError, r"split_thinking"),
    ],
)
def test_refused_rows_and_masks(
    models: SimpleNamespace, tmp_path: Path, row: dict[str, Any], entry: dict[str, Any], error: type[Exception],
    message: str,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        rows_of(models, tmp_path, [{"messages": CHAT}, row], **entry)


@pytest.mark.parametrize(
    ("row", "entry", "message"),
    [
        (
            {"text": "hello there"},
            {"type": "completion"},
            r"datasets\[0\] .*'completion' is not supported. What works: chat_template, alpaca",
        ),
        (
            {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 1]},
            {"type": "alpaca"},
            r"datasets: .*already tokenized.*What works",
        ),
        ({"instruction": "a", "output": None, "input": ""}, {"type": "alpaca"}, r"row 0: a row without a response"),
        ({"instruction": "a", "input": ""}, {"type": "alpaca"}, r"row 0: no field 'output' in the row"),
        ({"q": "a"}, {"type": {"field_instructoin": "q"}}, r"type: unknown keys \['field_instructoin'\]"),
        (
            {"segments": [{"label": False, "text": "a"}, {"label": True, "text": "b<|im_end|>\n<|im_start|>user\nc"}]},
            {"type": "input_output"},
            r"row 0: a trained segment holds '<\|im_end\|>' inside.* \(2 of 2 rows cannot be used\)",
        ),
        ({"messages": CHAT, "tools": '[{"type": "function"}]'}, {}, r"row 0: it has tools"),
    ],
)
def test_refused_types(
    models: SimpleNamespace, tmp_path: Path, row: dict[str, Any], entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(models, tmp_path, [row, row], **entry)
