"""The host contract, part 4: loading, hashing and filtering of data sets. See `test_contract.py`."""

from __future__ import annotations

from contract_support import (
    WORDS,
    chat,
    host_fact,
    pack_without_garbage_collection,
    tiny_tokenizer,
    valid_config,
)

# isort: split
# (the line above sets the environment, before Axolotl is imported)
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from axolotl.utils.data import prepare_datasets
from axolotl.utils.data.shared import (
    datasets_with_name_generator,
    generate_dataset_hash_from_config,
    load_dataset_with_config,
)
from axolotl.utils.data.utils import handle_long_seq_in_dataset
from axolotl.utils.dict import DictDefault
from datasets import Dataset

ENTRIES, STRATEGY = "hosts/axolotl/entries.py", "hosts/axolotl/strategy.py"


@pytest.fixture(autouse=True)
def quick_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    pack_without_garbage_collection(monkeypatch)


def write_rows(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


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
    breaks=f"nothing if it sees content now: the digest of files in {ENTRIES} can go",
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
    "the hash depends on the entry's `type` and `input_format`, not on top-level keys of ours",
    breaks=f"{ENTRIES} SALT_FIELD: SFT, PoFT and an edited file would share one prepared set",
    look="axolotl/utils/data/shared.py DATASET_HASH_* fields",
)
def test_the_hash_sees_type_but_not_our_settings() -> None:
    def hashed(**entry: Any) -> str:
        cfg = valid_config(datasets=[{"path": "rows.jsonl", "type": "chat_template", **entry}])
        cfg.poft = {"strength": len(entry)}
        return generate_dataset_hash_from_config(cfg, cfg.datasets, "tokenizer")

    assert hashed() == hashed(trust_remote_code=True)
    assert len({hashed(), hashed(type="ours.one"), hashed(type="ours.two"), hashed(input_format="salt")}) == 4


@host_fact(
    "load_dataset_with_config reads the raw rows of an entry, all columns",
    breaks=f"{STRATEGY} wrap_dataset: what the host hands it is this",
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
    "an entry with several names, or preprocess_shards, becomes several entries with name / shards and shards_idx",
    breaks=f"{STRATEGY} _host_entry hands these on to the host's own strategy",
    look="axolotl/utils/data/shared.py datasets_with_name_generator",
)
def test_entries_are_expanded_by_name_and_shard() -> None:
    entries = [DictDefault(name=["x", "y"]), DictDefault(preprocess_shards=2)]
    expanded = list(datasets_with_name_generator(entries))
    assert [entry.name for entry in expanded] == ["x", "y", None, None]
    assert [(entry.shards, entry.shards_idx) for entry in expanded[2:]] == [(2, 0), (2, 1)]


@host_fact(
    "rows longer than sequence_len (or shorter than 2) are dropped; the other rows keep extra columns",
    breaks="hosts/axolotl/datasets.py: single rows lean on it, and carry their key through; rows that hold a group of "
    "sequences have to bypass it",
    look="axolotl/utils/data/utils.py handle_long_seq_in_dataset",
)
def test_long_rows_are_dropped_with_their_columns() -> None:
    rows = [{"input_ids": list(range(size)), "row_key": f"key-{size}"} for size in (1, 2, 4, 5)]
    kept = handle_long_seq_in_dataset(Dataset.from_list(rows), 4, valid_config())
    assert kept["row_key"] == ["key-2", "key-4"]


@host_fact(
    "rows without a trained token are dropped when packing only",
    breaks=f"{STRATEGY} checks for responses itself, for packed and unpacked runs alike",
    look="axolotl/utils/data/sft.py _load_raw_datasets; utils/trainer.py process_datasets_for_packing",
)
def test_rows_without_trained_tokens_stay_when_not_packing(tmp_path: Path, prepare: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", chat("a"), chat("c", "d"))
    assert len(prepare(file)) == 2
    assert prepare(file, sample_packing=True) == ["user c </s> assistant d </s>"]
