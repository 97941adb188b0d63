"""The host contract, part 3: from a raw row to a tokenized row. See `test_contract.py`."""

from __future__ import annotations

from contract_support import WORDS, chat, host_fact, tiny_tokenizer, valid_config

# isort: split
# (the line above sets the environment, before Axolotl is imported)
import sys
from types import ModuleType
from typing import Any

import pytest
from axolotl.datasets import TokenizedPromptDataset
from axolotl.prompt_strategies import load as load_strategy
from axolotl.prompt_strategies.alpaca_w_system import InstructionWSystemPromptTokenizingStrategy
from axolotl.prompt_strategies.input_output import RawInputOutputStrategy
from axolotl.prompt_tokenizers import DatasetWrappingStrategy, InstructionPromptTokenizingStrategy
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from datasets import Dataset

ENTRIES, STRATEGY = "hosts/axolotl/entries.py", "hosts/axolotl/strategy.py"
STRATEGIES = "axolotl/prompt_strategies/__init__.py load"


class NotingStrategy(DatasetWrappingStrategy):
    """Keeps what the host gave it and adds a column of its own."""

    def __init__(self, *given: Any) -> None:
        self.given = given
        self.options: dict[str, Any] = {}

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


def wrap(strategy: str, rows: list[dict[str, Any]], **entry: Any) -> Dataset:
    """The rows after the host's wrapper for this `type:`."""
    cfg = valid_config(datasets=[{"path": "unused", "type": strategy, **entry}])
    cfg.dataset_num_proc = 1
    base_type, _, style = strategy.partition(":")
    arguments = (cfg.datasets[0], tiny_tokenizer(), cfg, base_type, Dataset.from_list(rows), style or None)
    return get_dataset_wrapper(*arguments)[0]


@pytest.mark.parametrize("name", ["axolotl.contract_rows", "contract_rows_package.salted_0a1b"])
@host_fact(
    "`type: some.module` calls getattr(module, 'load')(tokenizer, cfg, ds_cfg=entry), also when `load` comes "
    "from a module __getattr__ and the module is in sys.modules only; wrap_dataset gets process_count and "
    "keep_in_memory, and its dataset is used as it is, columns included",
    breaks=f"{STRATEGY} load: it would not be found, or rows would lose their key",
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
    breaks=f"{ENTRIES} STRATEGY names a module, never a function; a missing import in it is reported misleadingly",
    look=STRATEGIES,
)
def test_a_dotted_type_cannot_name_a_function(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy_module(monkeypatch, "contract_rows_package.rows")
    with pytest.raises(ValueError, match="unhandled prompt tokenization strategy"):
        wrap(f"contract_rows_package.rows{suffix}", [chat("a", "b")])


@host_fact(
    "the host's own strategies give a TokenizedPromptDataset that keeps .prompt_tokenizer and no raw column",
    breaks=f"{STRATEGY}: the host's own strategy is read from there, and our columns are put beside its tokens",
    look="axolotl/datasets.py TokenizedPromptDataset",
)
def test_tokenized_dataset_keeps_its_strategy() -> None:
    wrapped = wrap("chat_template", [chat("a", "b", score=0.5)])
    assert isinstance(wrapped, TokenizedPromptDataset)
    assert type(wrapped.prompt_tokenizer).__name__ == "ChatTemplateStrategy"
    assert set(wrapped.column_names) == {"input_ids", "labels", "attention_mask"}


@host_fact(
    "TokenizedPromptDataset tokenizes through dataset.map alone",
    breaks=f"{STRATEGY} _Unmapped: it would tokenize every row just to get at the host's strategy",
    look="axolotl/datasets.py TokenizedPromptDataset.process",
)
def test_a_dataset_that_does_not_map_is_not_tokenized() -> None:
    class Unmapped(Dataset):
        def map(self, *_: Any, **__: Any) -> Dataset:
            return self

    strategy = load_strategy("chat_template", tiny_tokenizer(), valid_config(), {})
    wrapped = TokenizedPromptDataset(strategy, Unmapped(Dataset.from_list([chat("a", "b")]).data))
    assert wrapped.column_names == ["messages"]
    assert wrapped.prompt_tokenizer is strategy


@host_fact(
    "ChatTemplateStrategy maps a raw row to turns (get_conversation_thread) and knows what is trained on: "
    "roles_to_train, train_on_inputs, prompter.message_field_training, message_field_training_detail",
    breaks="hosts/axolotl/conversations.py: what references score and what the policy trains on would differ",
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
    assert (strategy.train_on_inputs, strategy.train_on_eos, strategy.train_on_eot) == (False, "turn", "turn")
    assert strategy.split_thinking is False
    prompter = strategy.prompter
    assert (prompter.field_messages, prompter.field_tools) == ("turns", "tools")
    assert (prompter.message_field_training, prompter.message_field_training_detail) == ("train", "detail")


@pytest.mark.parametrize(
    ("strategy", "family", "expected"),
    [
        ("alpaca", InstructionPromptTokenizingStrategy, ("a", "b", "c")),
        ("alpaca_chat.load_concise", InstructionPromptTokenizingStrategy, ("a", "b", "c")),
        ("alpaca_w_system.load_open_orca", InstructionWSystemPromptTokenizingStrategy, ("a", "", "c", "h")),
    ],
)
@host_fact(
    "alpaca-family strategies map a raw row to (instruction, input, response), or (..., system)",
    breaks="hosts/axolotl/conversations.py: rows of instruction datasets get their conversation from it",
    look="axolotl/prompt_tokenizers.py, prompt_strategies/alpaca_w_system.py parse_instruction_fields",
)
def test_instruction_strategies_parse_a_row(strategy: str, family: type[Any], expected: tuple[str, ...]) -> None:
    row = {"instruction": "a", "input": "b", "output": "c"}
    orca = {"question": "a", "response": "c", "system_prompt": "h"}
    tokenizing = wrap(strategy, [{**row, **orca}]).prompt_tokenizer
    assert isinstance(tokenizing, family)
    assert tokenizing.parse_instruction_fields({**row, **orca}) == expected
    assert tokenizing.train_on_inputs is False


@host_fact(
    "input_output rows are segments; the prompter's build_prompt yields (label, text)",
    breaks="hosts/axolotl/conversations.py: rows without a template get their conversation from it",
    look="axolotl/prompt_strategies/input_output.py",
)
def test_input_output_yields_labelled_segments() -> None:
    segments = [{"label": False, "text": "a b"}, {"label": True, "text": "c"}]
    wrapped = wrap("input_output", [{"segments": segments}])
    assert type(wrapped.prompt_tokenizer) is RawInputOutputStrategy
    built = wrapped.prompt_tokenizer.prompter.build_prompt(segments)
    assert list(built) == [(False, "a b"), (True, "c")]
    assert wrapped["labels"][0] == [-100, -100, WORDS.index("c")]
    assert wrapped.prompt_tokenizer.train_on_inputs is False
