"""The host contract, part 3: from raw rows to tokenized rows. See `test_contract.py`."""

from __future__ import annotations

from contract_support import WORDS, host_fact, pack_without_garbage_collection, tiny_tokenizer, valid_config

# isort: split
# (the line above sets the environment, before Axolotl is imported)
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
from axolotl.datasets import TokenizedPromptDataset
from axolotl.prompt_strategies import load as load_strategy
from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from axolotl.utils.data import prepare_datasets
from axolotl.utils.data.shared import generate_dataset_hash_from_config, load_dataset_with_config
from axolotl.utils.data.utils import handle_long_seq_in_dataset
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from datasets import Dataset

DATASETS = "hosts/axolotl/datasets.py"
STRATEGIES = "axolotl/prompt_strategies/__init__.py load"


@pytest.fixture(autouse=True)
def quick_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    pack_without_garbage_collection(monkeypatch)


class NotingStrategy(DatasetWrappingStrategy):
    """Keeps what the host gave it and adds a column of its own."""

    def __init__(self, *given: Any) -> None:
        self.given, self.options = given, {}

    def wrap_dataset(
        self, dataset: Dataset, process_count: int | None = None, keep_in_memory: bool | None = False, **_: Any
    ) -> Dataset:
        self.options = {"process_count": process_count, "keep_in_memory": keep_in_memory}
        return dataset.add_column("row_key", [f"key-{index}" for index in range(len(dataset))])


def strategy_module(monkeypatch: pytest.MonkeyPatch, name: str) -> list[NotingStrategy]:
    """Puts a module that serves `load` through PEP 562 into `sys.modules` only."""
    made: list[NotingStrategy] = []

    def load(tokenizer: Any, cfg: DictDefault, ds_cfg: DictDefault | None = None) -> NotingStrategy:
        made.append(NotingStrategy(tokenizer, cfg, ds_cfg))
        return made[-1]

    def module_getattr(attribute: str) -> Any:
        if attribute not in ("load", "load_ours"):
            raise AttributeError(attribute)
        return load

    module = ModuleType(name)
    module.__getattr__ = module_getattr  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, name, module)
    return made


def chat(*contents: str, **fields: Any) -> dict[str, Any]:
    """A conversation whose turns alternate between user and assistant."""
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": turns, **fields}


def write_rows(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def wrap(strategy: str, rows: list[dict[str, Any]], **entry: Any) -> Dataset:
    """The rows after the host's wrapper for this `type:`."""
    cfg = valid_config(datasets=[{"path": "unused", "type": strategy, **entry}])
    base_type, _, style = strategy.partition(":")
    arguments = (cfg.datasets[0], tiny_tokenizer(), cfg, base_type, Dataset.from_list(rows), style or None)
    return get_dataset_wrapper(*arguments)[0]


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that prepares one file the way `axolotl train` does, in one prepared folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(file: str, **changes: Any) -> list[str]:
        entry = {"path": file, "ds_type": "json", "type": "chat_template", "roles_to_train": ["assistant"]}
        cfg = valid_config(datasets=[entry], dataset_prepared_path=str(tmp_path / "prepared"), **changes)
        train, *_ = prepare_datasets(cfg, tiny_tokenizer())
        return sorted(" ".join(WORDS[index] for index in ids) for ids in train["input_ids"])

    return run


@host_fact(
    "the prepared-dataset hash is blind to the content of a local file: an edited row loads the stale set",
    breaks=f"nothing if it sees content now: the salt of the entry in {DATASETS} can go",
    look="axolotl/utils/data/shared.py generate_dataset_hash_from_config, load_preprocessed_dataset",
)
def test_an_edited_row_loads_the_stale_set(tmp_path: Path, prepare: Any) -> None:
    rows = [chat("a", "b"), chat("c", "d")]
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    before = prepare(file)
    assert before == ["user a </s> assistant b </s>", "user c </s> assistant d </s>"]
    write_rows(tmp_path / "rows.jsonl", rows[0], chat("c", "e"))
    assert prepare(file) == before
    assert "user c </s> assistant e </s>" in prepare(write_rows(tmp_path / "other.jsonl", chat("c", "e")))


@host_fact(
    "the hash depends on the entry's `type` (and on `input_format`, which nothing reads), not on keys of ours",
    breaks=f"{DATASETS}: SFT, PoFT and an edited file would share one prepared set",
    look="axolotl/utils/data/shared.py DATASET_HASH_* fields",
)
def test_the_hash_sees_type_but_not_our_settings() -> None:
    def hashed(**entry: Any) -> str:
        cfg = valid_config(datasets=[{"path": "rows.jsonl", "type": "chat_template", **entry}])
        cfg.poft = {"strength": len(entry)}
        return generate_dataset_hash_from_config(cfg, cfg.datasets, "tokenizer")

    assert hashed() == hashed(trust_remote_code=True)
    assert len({hashed(), hashed(type="ours.one"), hashed(type="ours.two"), hashed(input_format="salt")}) == 4


@pytest.mark.parametrize("name", ["axolotl.contract_rows", "contract_rows_package.salted_0a1b"])
@host_fact(
    "`type: some.module` calls getattr(module, 'load')(tokenizer, cfg, ds_cfg=entry), also when `load` comes "
    "from a module __getattr__ and the module is in sys.modules only; wrap_dataset gets process_count and "
    "keep_in_memory, and its dataset is used as it is, columns included",
    breaks=f"{DATASETS}: our strategy would not be found, or lose the row key",
    look=f"{STRATEGIES}; axolotl/utils/data/wrappers.py get_dataset_wrapper",
)
def test_a_dotted_type_loads_our_strategy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = strategy_module(monkeypatch, name)
    wrapped = wrap(name, [chat("a", "b")], field_messages="messages")
    tokenizer, cfg, entry = made[0].given
    assert (tokenizer.eos_token, cfg.sequence_len, entry.field_messages) == ("</s>", 32, "messages")
    assert made[0].options == {"process_count": 1, "keep_in_memory": False}
    assert wrapped["row_key"] == ["key-0"]


@pytest.mark.parametrize("suffix", [".load", ".load_ours", ":load_ours", ".no_such_module"])
@host_fact(
    "`some.module.load_x` is looked up under axolotl.prompt_strategies only; a module that is not found, or "
    "that misses an import of its own, ends as 'unhandled prompt tokenization strategy'",
    breaks=f"{DATASETS} names a module, never a function of it; a missing import there is reported misleadingly",
    look=STRATEGIES,
)
def test_a_dotted_type_cannot_name_a_function(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy_module(monkeypatch, "contract_rows_package.rows")
    with pytest.raises(ValueError, match="unhandled prompt tokenization strategy"):
        wrap(f"contract_rows_package.rows{suffix}", [chat("a", "b")])


@host_fact(
    "load_dataset_with_config reads the raw rows of an entry, all columns",
    breaks=f"{DATASETS}: raw rows for row keys and scorers come from it",
    look="axolotl/utils/data/shared.py load_dataset_with_config",
)
def test_raw_rows_come_from_the_hosts_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = write_rows(tmp_path / "rows.jsonl", chat("a", "b", score=0.5), chat("c", "d", score=1.5))
    entry = valid_config(datasets=[{"path": file, "ds_type": "json", "type": "chat_template"}]).datasets[0]
    raw = load_dataset_with_config(entry, False, streaming=False)
    assert raw["score"] == [0.5, 1.5]
    assert raw["messages"][1] == chat("c", "d")["messages"]


@host_fact(
    "the host's own strategies give a TokenizedPromptDataset that keeps .prompt_tokenizer and no raw column",
    breaks=f"{DATASETS}: the wrapped strategy is read from there, and the row key carried beside it",
    look="axolotl/datasets.py TokenizedPromptDataset",
)
def test_tokenized_dataset_keeps_its_strategy() -> None:
    wrapped = wrap("chat_template", [chat("a", "b", score=0.5)])
    assert isinstance(wrapped, TokenizedPromptDataset)
    assert type(wrapped.prompt_tokenizer).__name__ == "ChatTemplateStrategy"
    assert set(wrapped.column_names) == {"input_ids", "labels", "attention_mask"}


@host_fact(
    "ChatTemplateStrategy maps a raw row to turns (get_conversation_thread) and knows what is trained on: "
    "roles_to_train, train_on_inputs, prompter.message_field_training, message_field_training_detail",
    breaks="hosts/axolotl/datasets.py: what the scorer counts and what the trainer trains on would differ",
    look="axolotl/prompt_strategies/chat_template.py ChatTemplateStrategy, ChatTemplatePrompter",
)
def test_chat_template_strategy_offers_turns_and_rules() -> None:
    rules = {"message_field_training": "train", "message_field_training_detail": "detail"}
    entry = {"path": "unused", "type": "chat_template", "field_messages": "turns", "roles_to_train": ["gpt"], **rules}
    cfg = valid_config(datasets=[{**entry, "message_property_mappings": {"role": "from", "content": "value"}}])
    strategy = load_strategy("chat_template", tiny_tokenizer(), cfg, cfg.datasets[0])
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "train": False}]
    assert strategy.get_conversation_thread({"turns": turns, "system": "h"}) == [
        {"role": "system", "content": "h"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "training": False},
    ]
    assert strategy.roles_to_train == ["assistant"]
    assert strategy.train_on_inputs is False
    assert strategy.prompter.message_field_training == "train"
    assert strategy.prompter.message_field_training_detail == "detail"


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("alpaca", ("a", "b", "c")),
        ("alpaca_chat.load_concise", ("a", "b", "c")),
        ("alpaca_w_system.load_open_orca", ("a", "", "c", "h")),
    ],
)
@host_fact(
    "alpaca-family strategies map a raw row to (instruction, input, response), or (..., system)",
    breaks=f"{DATASETS}: rows of instruction datasets get their key and conversation from it",
    look="axolotl/prompt_tokenizers.py, prompt_strategies/alpaca_w_system.py parse_instruction_fields",
)
def test_instruction_strategies_parse_a_row(strategy: str, expected: tuple[str, ...]) -> None:
    row = {"instruction": "a", "input": "b", "output": "c"}
    orca = {"question": "a", "response": "c", "system_prompt": "h"}
    tokenizing = wrap(strategy, [{**row, **orca}]).prompt_tokenizer
    assert tokenizing.parse_instruction_fields({**row, **orca}) == expected
    assert tokenizing.train_on_inputs is False


@host_fact(
    "input_output rows are segments; the prompter's build_prompt yields (label, text)",
    breaks=f"{DATASETS}: template-free rows get their key and their response positions from it",
    look="axolotl/prompt_strategies/input_output.py",
)
def test_input_output_yields_labelled_segments() -> None:
    segments = [{"label": False, "text": "a b"}, {"label": True, "text": "c"}]
    wrapped = wrap("input_output", [{"segments": segments}])
    built = wrapped.prompt_tokenizer.prompter.build_prompt(segments)
    assert list(built) == [(False, "a b"), (True, "c")]
    assert wrapped["labels"][0] == [-100, -100, WORDS.index("c")]
    assert wrapped.prompt_tokenizer.train_on_inputs is False


@host_fact(
    "rows longer than sequence_len (or shorter than 2) are dropped; the other rows keep extra columns",
    breaks=f"{DATASETS}: group rows bypass this filter; single rows lean on it and carry their key through",
    look="axolotl/utils/data/utils.py handle_long_seq_in_dataset",
)
def test_long_rows_are_dropped_with_their_columns() -> None:
    rows = [{"input_ids": list(range(size)), "row_key": f"key-{size}"} for size in (1, 2, 4, 5)]
    kept = handle_long_seq_in_dataset(Dataset.from_list(rows), 4, valid_config())
    assert kept["row_key"] == ["key-2", "key-4"]


@host_fact(
    "rows without a trained token are dropped when packing only",
    breaks=f"{DATASETS} checks for responses on raw rows, for packed and unpacked runs alike",
    look="axolotl/utils/data/sft.py _load_raw_datasets; utils/trainer.py process_datasets_for_packing",
)
def test_rows_without_trained_tokens_stay_when_not_packing(tmp_path: Path, prepare: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", chat("a"), chat("c", "d"))
    assert len(prepare(file)) == 2
    assert prepare(file, sample_packing=True) == ["user c </s> assistant d </s>"]
