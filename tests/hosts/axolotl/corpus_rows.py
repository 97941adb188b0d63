"""Rows of the corpus: one wrong cell in a good row, for every layout, field and value."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from axolotl.utils.dict import DictDefault
from datasets import Dataset
from transformers import AutoTokenizer


@dataclass(frozen=True)
class Trial:
    """An entry of the corpus.

    Args:
        kind: what is wrong: `config`, `row`, `file`.
        label: the entry in the table and in failures.
        place: a word that a message has to name.
        act: what a user does with it.
    """

    kind: str
    label: str
    place: str
    act: Callable[[], Any]


NOTHING = object()
TURN = {"role": "user", "content": "hi"}
CELLS: dict[str, Any] = {
    "missing": NOTHING, "null": None, "number": 3, "true": True, "empty": "", "blank": " \n", "text": "yes",
    "empty list": [], "list of null": [None], "list of texts": ["a", "b"], "empty block": {}, "turns": [TURN],
    "turn without text": [{"role": "assistant"}], "turn without role": [{"content": "x"}],
    "text of null": [{"role": "assistant", "content": None}], "role of null": [{"role": None, "content": "x"}],
    "content in parts": [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
    "markup": "[/x]", "not a number": float("nan"), "infinite": float("inf"), "nested": [[[]]],
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "chat_template": {"messages": [TURN], "chosen": "good", "rejected": "bad", "scores": [1.0, 0.0]},
    "chat_template.argilla_chat": {
        name: [TURN, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")
    },
    "poft_plugin.hh_rlhf": {name: f"\n\nHuman: hi\n\nAssistant: {name}" for name in ("chosen", "rejected")},
    "poft_plugin.ranked": {"prompt": "hi", "responses": ["a", "b", "c"], "scores": [3.0, 2.0, 1.0]},
}


def rows() -> Iterator[Trial]:
    """One wrong cell in one preference row, for every field and value."""
    from poft_plugin.hosts.axolotl.ranked_rows import RankedFields, ranked_reader

    for kind, row in ROWS.items():
        reader = ranked_reader(kind, RankedFields())
        for field in row:
            for name, cell in CELLS.items():
                changed = {**row, field: cell}
                if cell is NOTHING:
                    del changed[field]
                label = f"{kind}: {field}: {name}"
                act = lambda changed=changed, reader=reader: reader(changed, "data.jsonl row 7")  # noqa: E731
                yield Trial("row", label, "data.jsonl row 7", act)


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "chat_template": {"messages": [TURN, {"role": "assistant", "content": "yes"}], "tools": [], "system": "be"},
    "poft_plugin.prompt_completion": {"prompt": [TURN], "completion": "yes"},
    "alpaca": {"instruction": "say", "input": "it", "output": "yes"},
    "input_output": {"segments": [{"label": False, "text": "say"}, {"label": True, "text": "yes"}], "id": 3},
}


def conversations(models: SimpleNamespace) -> Iterator[Trial]:
    """One wrong cell in one conversation, for every field, value and type, as the host gets it."""
    from poft_plugin.hosts.axolotl.entries import take_over_entries
    from poft_plugin.hosts.axolotl.strategy import load
    from poft_plugin.plugins import registry

    tokenizer = AutoTokenizer.from_pretrained(models.policy)
    for kind, row in CONVERSATIONS.items():
        entry = {"path": "data.jsonl", "type": kind}
        cfg = DictDefault({"datasets": [entry], "sequence_len": 512, "base_model": "none", "train_on_inputs": False})
        take_over_entries(cfg, registry().methods["poft"], None)
        strategy = load(tokenizer, cfg, cfg["datasets"][0])
        for field in row:
            for name, cell in CELLS.items():
                other = {**row, field: cell}
                if cell is NOTHING:
                    del other[field]
                act = lambda other=other, strategy=strategy: strategy.wrap_dataset(_as_dataset(other))  # noqa: E731
                yield Trial("conversation", f"{kind}: {field}: {name}", "data.jsonl row 0", act)


def _as_dataset(row: dict[str, Any]) -> Any:
    """A data set of one row, nested values as they come: what Arrow cannot type is no matter here."""
    return Dataset.from_list([row])
