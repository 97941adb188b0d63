"""The dataset strategy that `register` writes into every entry: the host's own tokens, with the row's key beside them.

The host's strategy for the entry's original `type` does the tokenizing; this one adds the columns that scores join by.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
from axolotl.prompt_tokenizers import DatasetWrappingStrategy, PromptTokenizingStrategy
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.datasets import SFTDataset, UserDefinedPrompterType
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets

from poft_plugin.data.columns import CONVERSATION, DROPPABLE, GROUP, LEFT_OUT, ROW_KEY, ROW_NUMBER, SOURCE
from poft_plugin.data.rows import RowError, dump_conversation, raise_row_errors, row_key
from poft_plugin.hosts.axolotl.chat_templates import with_fixed_date
from poft_plugin.hosts.axolotl.conversations import conversation_reader, host_tokens
from poft_plugin.hosts.axolotl.entries import ENTRIES, SALT_FIELD, SUPPORTED_TYPES, Entry
from poft_plugin.hosts.axolotl.left_out import LEFT_OUT_TYPE, NAMED, without
from poft_plugin.hosts.axolotl.prompt_completion import HOST_SETTINGS, PromptCompletionFields
from poft_plugin.hosts.axolotl.ranked_fields import shown
from poft_plugin.hosts.axolotl.ranked_strategy import RankedStrategy
from poft_plugin.hosts.axolotl.reading import printable
from poft_plugin.hosts.axolotl.trained_text import TrainedText


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
            ValueError: for a data set that is empty, streamed or already tokenized, a `type` that is not supported, or
                one of which every row is longer than `sequence_len`.
            RowError: for a row that cannot be used, naming it, unless such rows are to be dropped.
        """
        label = self.entry.label
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{label}: a streamed data set cannot be scored; remove `streaming:`")
        if not len(dataset):
            raise ValueError(f"{label}: no rows in it")
        self.strategy = self._strategy(dataset)
        self.reader = conversation_reader(self.strategy, self.entry)
        # One pass, so that whatever the host raises is an error of its row. Never from the cache of `datasets`, which
        # knows our function by its name alone and would serve an older version's rows.
        self.features = self._features(dataset)
        rows = dataset.map(
            self._read,
            with_indices=True,
            remove_columns=dataset.column_names,
            num_proc=process_count,
            keep_in_memory=bool(keep_in_memory),
            load_from_cache_file=False,
            features=self.features,
            desc="Reading conversations",
        )
        rows = self._usable(rows)
        self._check_lengths(rows)
        if self.cfg.dataset_exact_deduplication:
            run = tuple(entry[SALT_FIELD] for entry in self.cfg.datasets)
            rows = _named_alike(rows, _FIRST_ROWS.setdefault(run, {}))
        return rows

    @cached_property
    def _trained_text(self) -> TrainedText:
        return TrainedText(self.tokenizer, tuple(self.cfg.eot_tokens or ()))

    @property
    def _longest(self) -> int:
        """Tokens of the longest row that the host keeps."""
        return int(max(self.cfg.sequence_len, self.cfg.eval_sequence_len or 0))

    def _strategy(self, dataset: Dataset) -> PromptTokenizingStrategy:
        """The host's own strategy, which it builds around a data set: one without rows, so that none is tokenized."""
        kind = self.ds_cfg.type
        base, _, style = kind.partition(":") if isinstance(kind, str) else (None, "", None)
        wrapped, _prompter = get_dataset_wrapper(
            dataset_config=self.ds_cfg,
            tokenizer=self.tokenizer,
            cfg=with_fixed_date(DictDefault({**self.cfg, "dataset_num_proc": 0})),
            dataset_base_type=base,
            dataset=Dataset.from_dict({name: [] for name in dataset.column_names}),
            dataset_prompt_style=style or None,
        )
        strategy = getattr(wrapped, "prompt_tokenizer", None)
        if strategy is None:
            raise ValueError(
                f"{self.entry.label}: type {self.entry.raw['type']!r} gives tokens without a text to score. "
                f"What works: {SUPPORTED_TYPES}"
            )
        if strategy.filter_rows:
            raise ValueError(
                f"{self.entry.label}: its `type` drops rows while tokenizing; such a type is not supported"
            )
        return strategy

    def _features(self, dataset: Dataset) -> Features:
        """The columns' types: the host's tokens as it types them, whatever the first rows are."""
        tokens = dict(_TOKENS)
        for index, row in enumerate(dataset):
            try:
                where = f"{self.entry.label} row {index}"
                found = host_tokens(self.strategy, self.reader(row, where), where)
            except RowError:
                continue
            inferred = Dataset.from_list([found]).features
            tokens |= {name: kind for name, kind in inferred.items() if name not in tokens}
            break
        texts = (ROW_KEY, CONVERSATION, SOURCE, ERROR, *([] if self.entry.group_column is None else [GROUP]))
        return Features(
            {**tokens, **{name: Value("string") for name in texts}}
            | {ROW_NUMBER: Value("int64"), DROPPABLE: Value("bool"), LEFT_OUT: LEFT_OUT_TYPE}
        )

    def _read(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        where = f"{self.entry.label} row {index}"
        try:
            return self._columns(row, index) | self._used(row, where)
        except RowError as refused:
            return self._columns(row, index) | {ERROR: printable(str(refused))}

    def _columns(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """What a row has that cannot be used."""
        texts: dict[str, Any] = {ROW_KEY: "", CONVERSATION: "", ERROR: "", SOURCE: self.entry.label}
        numbers = {ROW_NUMBER: index, DROPPABLE: self.entry.drop_bad_rows, LEFT_OUT: []}
        tokens: dict[str, Any] = {name: [] for name in self.features if name not in (*texts, *numbers, GROUP)}
        column = self.entry.group_column
        group = {} if column is None else {GROUP: printable(str(row.get(column)))}
        return {**tokens, **texts, **numbers, **group}

    def _used(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        read = self.reader(row, where)
        column = self.entry.group_column
        if column is not None and row.get(column) is None:
            raise RowError(f"{where}: no value in the column {column!r} that rows are to be ranked within")
        tokens = host_tokens(self.strategy, read, where)
        if not tokens.get("input_ids"):
            raise RowError(f"{where}: Axolotl makes no token of the row: {shown(dict(read.row))}. Remove it")
        conversation = read.conversation
        if len(tokens["input_ids"]) <= self._longest:  # the host leaves others out, and has cut some types' texts
            labels = self._trained_text.completed(conversation, tokens["input_ids"], tokens["labels"])
            conversation = self._trained_text.check(conversation, labels, where)
            tokens = {**tokens, "labels": labels}
        text = dump_conversation(conversation)
        if printable(text) != text:
            raise RowError(
                f"{where}: half of a surrogate pair in a text, which is no character: {shown(text)}. Mend it"
            )
        return {**tokens, ROW_KEY: row_key(conversation), CONVERSATION: text}

    def _usable(self, rows: Dataset) -> Dataset:
        """The rows that can be used, with the number of the others in a column.

        Raises:
            RowError: for the others, unless they are to be dropped and some are left.
        """
        errors = np.array(list(rows[ERROR]), dtype=object)
        bad = np.flatnonzero(errors != "")
        rows = rows.remove_columns(ERROR)
        if not len(bad):
            return rows
        if len(bad) == len(rows) or not self.entry.drop_bad_rows:
            raise_row_errors(list(errors[bad]), len(rows))
        first = "\n  ".join(errors[bad[:NAMED]])
        print(
            f"{self.entry.label}: {len(bad)} of {len(rows)} rows left out (poft.on_bad_row: drop); the first:\n  "
            f"{first}",
            flush=True,
        )
        return without(rows, errors != "")

    def _check_lengths(self, rows: Dataset) -> None:
        """The host leaves out rows over `sequence_len`; a data set of such rows alone is a slip.

        Raises:
            ValueError: if no row is left.
        """
        if (self.cfg.excess_length_strategy or "drop").lower() != "drop":
            return
        key = "eval_sequence_len" if self.entry.evaluation and self.cfg.eval_sequence_len else "sequence_len"
        lengths = pc.list_value_length(rows.with_format("arrow")["input_ids"]).to_numpy()
        if lengths.min() > self.cfg[key]:
            longest = int(lengths.argmax())
            raise ValueError(
                f"{self.entry.label}: no rows left: all {len(rows)} are longer than {key} {self.cfg[key]}, the longest "
                f"row {rows[longest][ROW_NUMBER]} with {lengths[longest]} tokens. Set `{key}: {lengths[longest]}` or "
                "more, or shorten the rows"
            )


THINKING = "reasoning_content"
"""The host's default of `field_thinking` and `template_thinking_key`."""

ERROR = "error"
"""Why a row cannot be used: errors are counted before the first one is raised."""

_TOKENS = {
    "input_ids": Sequence(Value("int32")),
    "labels": Sequence(Value("int64")),
    "attention_mask": Sequence(Value("int8")),
}


def _host_entry(entry: Entry, ds_cfg: Mapping[str, Any]) -> DictDefault:
    own = PromptCompletionFields.model_fields if entry.completion else ()
    raw = {key: value for key, value in entry.raw.items() if key not in own}
    if entry.completion:
        raw |= HOST_SETTINGS
    if isinstance(raw["type"], Mapping):
        unknown = sorted(set(raw["type"]) - set(UserDefinedPrompterType.model_fields))
        if unknown:
            allowed = ", ".join(UserDefinedPrompterType.model_fields)
            raise ValueError(f"{entry.label}: type: unknown keys {unknown}; allowed: {allowed}")
    seen = SFTDataset(**raw).model_dump(exclude_none=True)
    if mappings := seen.get("message_property_mappings"):
        # the host's schema fills the mappings, and its own rule for the reasoning field holds only where there are none
        key, field = seen.get("template_thinking_key", THINKING), seen.get("field_thinking", THINKING)
        seen["message_property_mappings"] = {key: field, **mappings}
    expanded = {key: ds_cfg[key] for key in ("name", "shards", "shards_idx") if ds_cfg.get(key) is not None}
    return DictDefault({**ds_cfg, SALT_FIELD: None, **seen, **expanded})


_FIRST_ROWS: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
"""Where each row key was met first, for each list of entries that this process has prepared."""


def _named_alike(rows: Dataset, first: dict[str, dict[str, Any]]) -> Dataset:
    """Gives all rows of one key the first one's data set and number.

    The host's exact de-duplication compares whole rows: with names of their own, equal rows would all stay.
    """
    names = [name for name in (SOURCE, ROW_NUMBER, GROUP, LEFT_OUT) if name in rows.column_names]
    named = [
        first.setdefault(row[ROW_KEY], {name: row[name] for name in names})
        for row in rows.select_columns([ROW_KEY, *names])
    ]
    return concatenate_datasets([rows.remove_columns(names), Dataset.from_list(named)], axis=1)
