"""The dataset strategy that `register` writes into every entry: the host's own tokens, with the row's key beside them.

The host's strategy for the entry's original `type` does the tokenizing; this one adds the columns that scores join by.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from axolotl.prompt_tokenizers import DatasetWrappingStrategy, PromptTokenizingStrategy
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.datasets import SFTDataset, UserDefinedPrompterType
from datasets import Dataset, concatenate_datasets

from poft_plugin.data.columns import CONVERSATION, GROUP, ROW_KEY, ROW_NUMBER, SOURCE
from poft_plugin.data.rows import (
    Conversation,
    RowError,
    dump_conversation,
    raise_row_errors,
    row_key,
)
from poft_plugin.hosts.axolotl.chat_templates import with_fixed_date
from poft_plugin.hosts.axolotl.conversations import Reader, conversation_reader
from poft_plugin.hosts.axolotl.entries import ENTRIES, SALT_FIELD, SUPPORTED_TYPES, Entry
from poft_plugin.hosts.axolotl.ranked_strategy import RankedStrategy
from poft_plugin.hosts.axolotl.trained_text import TrainedText, with_ends


def load(tokenizer: Any, cfg: DictDefault, ds_cfg: Mapping[str, Any]) -> DatasetWrappingStrategy:
    """What the host calls for `type: poft_plugin.hosts.axolotl.strategy`."""
    entry = ENTRIES[ds_cfg[SALT_FIELD]]
    if entry.ranked is not None:
        return RankedStrategy(tokenizer, cfg, entry)
    return MethodStrategy(tokenizer, cfg, _host_entry(entry, ds_cfg), entry)


@dataclass
class MethodStrategy(DatasetWrappingStrategy):
    """Wraps a raw data set.

    Args:
        tokenizer: the policy's.
        cfg: the host's config.
        ds_cfg: the entry as the host would have seen it without us.
        entry: the entry as the user wrote it.
    """

    tokenizer: Any
    cfg: DictDefault
    ds_cfg: DictDefault
    entry: Entry

    def wrap_dataset(
        self, dataset: Any, process_count: int | None = None, keep_in_memory: bool | None = False, **_: Any
    ) -> Dataset:
        """The host's tokenized rows with `row_key`, `conversation`, `source`, `row_number` (and `group`) beside them.

        Raises:
            ValueError: for a data set that is empty, streamed or already tokenized, or a `type` that is not supported.
            RowError: for a row without a response, naming it.
        """
        label = self.entry.label
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{label}: a streamed data set cannot be scored; remove `streaming:`")
        if not len(dataset):
            raise ValueError(f"{label}: no rows in it")
        reader = conversation_reader(self._strategy(dataset), label)
        read = partial(_read_row, reader=reader, label=label, group_column=self.entry.group_column)
        # Conversations first: they refuse a bad row by its number, where the host would fail without one. Never from
        # the cache of `datasets`, which knows our function by its name alone and would serve an older version's rows.
        rows = dataset.map(
            read,
            with_indices=True,
            remove_columns=dataset.column_names,
            num_proc=process_count,
            keep_in_memory=bool(keep_in_memory),
            load_from_cache_file=False,
            desc="Reading conversations",
        )
        raise_row_errors([error for error in rows[ERROR] if error], len(rows))
        rows = rows.remove_columns(ERROR)
        tokens = self._host_rows(dataset)
        if len(tokens) != len(rows):
            raise ValueError(f"{label}: its `type` drops rows while tokenizing; such a type is not supported")
        rows, errors = with_ends(
            tokens, rows, self._trained_text(), label=label, longest=self._longest, process_count=process_count
        )
        raise_row_errors([error for error in errors if error], len(rows))
        if self.cfg.dataset_exact_deduplication:
            run = tuple(entry[SALT_FIELD] for entry in self.cfg.datasets)
            rows = _named_alike(rows, _FIRST_ROWS.setdefault(run, {}))
        return concatenate_datasets([tokens, rows], axis=1)

    def _trained_text(self) -> TrainedText:
        return TrainedText(self.tokenizer, tuple(self.cfg.eot_tokens or ()))

    @property
    def _longest(self) -> int:
        """Tokens of the longest row that the host keeps."""
        return int(max(self.cfg.sequence_len, self.cfg.eval_sequence_len or 0))

    def _strategy(self, dataset: Dataset) -> PromptTokenizingStrategy:
        wrapped = self._host_rows(_Unmapped(dataset.data))
        strategy = getattr(wrapped, "prompt_tokenizer", None)
        if strategy is None:
            raise ValueError(
                f"{self.entry.label}: type {self.entry.raw['type']!r} gives tokens without a text to score. "
                f"What works: {SUPPORTED_TYPES}"
            )
        return strategy

    def _host_rows(self, dataset: Dataset) -> Dataset:
        kind = self.ds_cfg.type
        base, _, style = kind.partition(":") if isinstance(kind, str) else (None, "", None)
        wrapped, _prompter = get_dataset_wrapper(
            dataset_config=self.ds_cfg,
            tokenizer=self.tokenizer,
            cfg=with_fixed_date(self.cfg),
            dataset_base_type=base,
            dataset=dataset,
            dataset_prompt_style=style or None,
        )
        return wrapped


ERROR = "error"
"""Why a row cannot be used: errors are counted before the first one is raised."""


class _Unmapped(Dataset):
    """A data set that does not map or filter: the host builds its strategy around it and tokenizes nothing."""

    def map(self, *_: Any, **__: Any) -> Dataset:
        """Itself."""
        return self

    def filter(self, *_: Any, **__: Any) -> Dataset:
        """Itself."""
        return self


def _host_entry(entry: Entry, ds_cfg: Mapping[str, Any]) -> DictDefault:
    raw = dict(entry.raw)
    if isinstance(raw["type"], Mapping):
        unknown = sorted(set(raw["type"]) - set(UserDefinedPrompterType.model_fields))
        if unknown:
            allowed = ", ".join(UserDefinedPrompterType.model_fields)
            raise ValueError(f"{entry.label}: type: unknown keys {unknown}; allowed: {allowed}")
    seen = SFTDataset(**raw).model_dump(exclude_none=True)
    expanded = {key: ds_cfg[key] for key in ("name", "shards", "shards_idx") if ds_cfg.get(key) is not None}
    return DictDefault({**ds_cfg, SALT_FIELD: None, **seen, **expanded})


def _read_row(
    row: Mapping[str, Any], index: int, *, reader: Reader, label: str, group_column: str | None
) -> dict[str, Any]:
    where, error = f"{label} row {index}", ""
    conversation: Conversation = ()
    try:
        conversation = reader(row, where)
        if group_column is not None and row.get(group_column) is None:
            raise RowError(f"{where}: no value in the column {group_column!r} that rows are to be ranked within")
    except RowError as refused:
        error = str(refused)
    columns = {
        ROW_KEY: row_key(conversation),
        CONVERSATION: dump_conversation(conversation),
        SOURCE: label,
        ROW_NUMBER: index,
        ERROR: error,
    }
    return columns if group_column is None else {**columns, GROUP: str(row.get(group_column))}


_FIRST_ROWS: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
"""Where each row key was met first, for each list of entries that this process has prepared."""


def _named_alike(rows: Dataset, first: dict[str, dict[str, Any]]) -> Dataset:
    """Gives all rows of one key the first one's data set and number.

    The host's exact de-duplication compares whole rows: with names of their own, equal rows would all stay.
    """
    names = [name for name in (SOURCE, ROW_NUMBER, GROUP) if name in rows.column_names]
    named = [
        first.setdefault(row[ROW_KEY], {name: row[name] for name in names})
        for row in rows.select_columns([ROW_KEY, *names])
    ]
    return concatenate_datasets([rows.remove_columns(names), Dataset.from_list(named)], axis=1)
