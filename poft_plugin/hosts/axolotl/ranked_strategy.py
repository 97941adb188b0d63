"""The dataset strategy of preference methods: each response tokenized after its prompt, by the host's own strategy.

The host prepares one row per sample (shuffling, splitting, de-duplicating it whole). It sees the sample's longest
sequence, cut to `sequence_len` so that its length filter lets every row pass: grading needs them all. The sample's real
tokens ride beside it, and take their place when rows were graded and filtered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from axolotl.prompt_strategies.chat_template import load as load_chat_template
from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from axolotl.utils.dict import DictDefault
from datasets import Dataset, Features, Sequence, Value

from poft_plugin.data.columns import (
    CONVERSATION,
    GROUP,
    RANKED_INPUT_IDS,
    RANKED_LABELS,
    ROW_KEY,
    ROW_NUMBER,
    SEQUENCE_LENGTHS,
    SOURCE,
)
from poft_plugin.data.ranked import RankedSample
from poft_plugin.data.rows import RowError, raise_row_errors
from poft_plugin.hosts.axolotl.chat_templates import with_fixed_date
from poft_plugin.hosts.axolotl.entries import Entry
from poft_plugin.hosts.axolotl.ranked_rows import ranked_reader
from poft_plugin.hosts.axolotl.trained_text import TrainedText

LONG = 1 << 30
"""The host's strategy would cut a response at `sequence_len`; rows are judged by their length later, and here."""

ERROR, UNUSABLE = "error", "unusable"


@dataclass
class RankedStrategy(DatasetWrappingStrategy):
    """Wraps a raw preference data set.

    Args:
        tokenizer: the policy's.
        cfg: the host's config.
        entry: the entry as the user wrote it, with its `ranked` part.
    """

    tokenizer: Any
    cfg: DictDefault
    entry: Entry

    def wrap_dataset(
        self, dataset: Any, process_count: int | None = None, keep_in_memory: bool | None = False, **_: Any
    ) -> Dataset:
        """One row per sample: the host's token columns of its longest sequence, and the sample beside them.

        Raises:
            ValueError: for a data set that is empty or streamed.
            RowError: for a row that cannot be used, naming it, unless such rows are to be dropped.
        """
        label = self.entry.label
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{label}: a streamed data set cannot be scored; remove `streaming:`")
        if not len(dataset):
            raise ValueError(f"{label}: no rows in it")
        self.strategy = self._host_strategy()
        rows = dataset.map(
            self._read,
            with_indices=True,
            remove_columns=dataset.column_names,
            num_proc=process_count,
            keep_in_memory=bool(keep_in_memory),
            load_from_cache_file=False,
            features=_features(self.entry.group_column),
            desc="Reading preferences",
        )
        raise_row_errors([error for error in rows[ERROR] if error], len(rows))
        return self._without_unusable(rows).remove_columns([ERROR, UNUSABLE])

    def _host_strategy(self) -> Any:
        """The host's strategy for messages of which the last alone is trained on."""
        raw = self.entry.raw
        given = {key: raw[key] for key in ("chat_template", "chat_template_jinja", "train_on_eos") if raw.get(key)}
        settings = {"message_field_training": "training", "roles_to_train": [], "train_on_eos": "turn", **given}
        cfg = with_fixed_date(DictDefault({**self.cfg, "sequence_len": LONG}))
        return load_chat_template(self.tokenizer, cfg, settings)

    def _read(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        where, kind = f"{self.entry.label} row {index}", str(self.entry.raw["type"])
        try:
            sample = ranked_reader(kind, self.entry.ranked.fields)(row, where)
        except RowError as refused:
            name = UNUSABLE if self.entry.ranked.fields.drops(kind) else ERROR
            return self._columns(row, index, None) | {name: str(refused)}
        try:
            self._check(sample, row, where)
            return self._columns(row, index, sample) | self._tokens(sample, where)
        except RowError as refused:
            return self._columns(row, index, sample) | {ERROR: str(refused)}

    def _check(self, sample: RankedSample, row: Mapping[str, Any], where: str) -> None:
        if self.entry.ranked.max_responses is not None and len(sample.responses) > self.entry.ranked.max_responses:
            raise RowError(
                f"{where}: {len(sample.responses)} responses; this method takes {self.entry.ranked.max_responses}. Use "
                "`rl: deft_pro` or `deft_rrhf` for lists"
            )
        column = self.entry.group_column
        if column is not None and row.get(column) is None:
            raise RowError(f"{where}: no value in the column {column!r} that rows are to be ranked within")

    def _columns(self, row: Mapping[str, Any], index: int, sample: RankedSample | None) -> dict[str, Any]:
        columns: dict[str, Any] = {
            **{name: [] for name in ("input_ids", "labels", "attention_mask", RANKED_INPUT_IDS, RANKED_LABELS)},
            SEQUENCE_LENGTHS: [],
            ROW_KEY: sample.key if sample else "",
            CONVERSATION: sample.dumps() if sample else "",
            SOURCE: self.entry.label,
            ROW_NUMBER: index,
            ERROR: "",
            UNUSABLE: "",
        }
        column = self.entry.group_column
        return columns if column is None else {**columns, GROUP: str(row.get(column))}

    def _tokens(self, sample: RankedSample, where: str) -> dict[str, Any]:
        sequences = [self._sequence(sample, index, where) for index in range(len(sample.responses))]
        longest = max(sequences, key=lambda sequence: len(sequence[0]))
        shown, labels = (values[-self.cfg.sequence_len :] for values in longest)
        return {
            "input_ids": shown,
            "labels": labels,
            "attention_mask": [1] * len(shown),
            RANKED_INPUT_IDS: [token for ids, _ in sequences for token in ids],
            RANKED_LABELS: [token for _, labels in sequences for token in labels],
            SEQUENCE_LENGTHS: [len(ids) for ids, _ in sequences],
        }

    def _sequence(self, sample: RankedSample, index: int, where: str) -> tuple[list[int], list[int]]:
        turns = sample.conversation(index)
        messages = [{"role": t.role, "content": t.content, "training": t.counted} for t in turns]
        tokens = self.strategy.tokenize_prompt({"messages": messages})
        TrainedText(self.tokenizer, tuple(self.cfg.eot_tokens or ())).check(
            turns, tokens["labels"], f"{where} response {index}"
        )
        return list(tokens["input_ids"]), list(tokens["labels"])

    def _without_unusable(self, rows: Dataset) -> Dataset:
        reasons = rows[UNUSABLE]
        unusable = np.flatnonzero([bool(reason) for reason in reasons])
        if not len(unusable):
            return rows
        first = reasons[int(unusable[0])]
        if len(unusable) == len(rows):
            raise RowError(f"{self.entry.label}: not one of its {len(rows)} rows can be used; the first: {first}")
        print(f"{self.entry.label}: {len(unusable)} of {len(rows)} rows left out; the first: {first}", flush=True)
        return rows.select(np.setdiff1d(np.arange(len(rows)), unusable))


def _features(group_column: str | None) -> Features:
    """The columns' types: the first rows may all be ones that cannot be used, and hold no token."""
    tokens = {
        "input_ids": "int32", "labels": "int64", "attention_mask": "int8",
        RANKED_INPUT_IDS: "int32", RANKED_LABELS: "int32", SEQUENCE_LENGTHS: "int32",
    }  # fmt: skip
    texts = (ROW_KEY, CONVERSATION, SOURCE, ERROR, UNUSABLE, *([] if group_column is None else [GROUP]))
    return Features(
        {name: Sequence(Value(kind)) for name, kind in tokens.items()}
        | {name: Value("string") for name in texts}
        | {ROW_NUMBER: Value("int64")}
    )
