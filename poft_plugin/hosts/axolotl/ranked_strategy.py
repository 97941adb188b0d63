"""The dataset strategy of preference methods: each response tokenized after its prompt, by the host's own strategy.

The host prepares one row per sample (shuffling, splitting, de-duplicating it whole). It sees the sample's longest
sequence, cut to `sequence_len` so that its length filter lets every row pass: grading needs them all. The sample's real
tokens ride beside it, and take their place when rows were graded and filtered.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from axolotl.prompt_strategies.chat_template import load as load_chat_template
from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from axolotl.utils.dict import DictDefault
from datasets import Dataset, Features, Sequence, Value
from jinja2 import TemplateError

from poft_plugin.data.columns import (
    CONVERSATION,
    DROPPABLE,
    GROUP,
    LEFT_OUT,
    RANKED_INPUT_IDS,
    RANKED_LABELS,
    ROW_KEY,
    ROW_NUMBER,
    SEQUENCE_LENGTHS,
    SOURCE,
)
from poft_plugin.data.ranked import RankedSample
from poft_plugin.data.rows import Conversation, RowError, raise_row_errors
from poft_plugin.hosts.axolotl.chat_templates import with_fixed_date
from poft_plugin.hosts.axolotl.entries import Entry, Ranked
from poft_plugin.hosts.axolotl.left_out import LEFT_OUT_TYPE, without
from poft_plugin.hosts.axolotl.ranked_rows import ranked_reader, unread_columns
from poft_plugin.hosts.axolotl.reading import HOST_ERRORS
from poft_plugin.hosts.axolotl.reasoning import as_messages, folded
from poft_plugin.hosts.axolotl.trained_text import TrainedText

LONG = 1 << 30
"""The host's strategy would cut a response at `sequence_len`; rows are judged by their length later, and here."""

ERROR, UNUSABLE, UNREAD, ALIKE = "error", "unusable", "unread", "alike"
"""Why a row cannot be used, or is left out; columns that nothing reads; how many responses are copies of another."""


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

    @property
    def _ranked(self) -> Ranked:
        assert self.entry.ranked is not None
        return self.entry.ranked

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
        self._report_unread(rows)
        return self._without_unusable(rows).remove_columns([ERROR, UNUSABLE, UNREAD, ALIKE])

    @cached_property
    def _trained_text(self) -> TrainedText:
        return TrainedText(self.tokenizer, tuple(self.cfg.eot_tokens or ()))

    def _host_strategy(self) -> Any:
        """The host's strategy for messages of which the last alone is trained on."""
        raw = self.entry.raw
        given = {key: raw[key] for key in ("chat_template", "chat_template_jinja", "train_on_eos") if raw.get(key)}
        settings = {"message_field_training": "training", "roles_to_train": [], "train_on_eos": "turn", **given}
        cfg = with_fixed_date(DictDefault({**self.cfg, "sequence_len": LONG}))
        return load_chat_template(self.tokenizer, cfg, settings)

    def _read(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        where, kind, fields = f"{self.entry.label} row {index}", str(self.entry.raw["type"]), self._ranked.fields
        columns, refusal = self._columns(row, index), UNUSABLE if fields.drops(kind) else ERROR
        try:
            sample = ranked_reader(kind, fields)(row, where)
        except RowError as refused:
            return columns | {refusal: str(refused)}
        try:
            self._check(sample, row, where)
        except RowError as refused:
            return columns | {ERROR: str(refused)}
        columns[UNREAD] = unread_columns(row, sample, fields)
        try:
            return columns | self._tokens(sample, where)
        except RowError as refused:
            return columns | {refusal: str(refused)}

    def _check(self, sample: RankedSample, row: Mapping[str, Any], where: str) -> None:
        if self._ranked.max_responses is not None and len(sample.responses) > self._ranked.max_responses:
            raise RowError(
                f"{where}: {len(sample.responses)} responses; this method takes {self._ranked.max_responses}. Use "
                "`rl: deft_pro` or `deft_rrhf` for lists"
            )
        column = self.entry.group_column
        if column is not None and row.get(column) is None:
            raise RowError(f"{where}: no value in the column {column!r} that rows are to be ranked within")

    def _columns(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        columns: dict[str, Any] = {
            **{name: [] for name in ("input_ids", "labels", "attention_mask", RANKED_INPUT_IDS, RANKED_LABELS)},
            SEQUENCE_LENGTHS: [],
            ROW_KEY: "",
            CONVERSATION: "",
            SOURCE: self.entry.label,
            ROW_NUMBER: index,
            DROPPABLE: self._ranked.fields.drops(str(self.entry.raw["type"])),
            LEFT_OUT: [],
            ERROR: "",
            UNUSABLE: "",
            UNREAD: [],
            ALIKE: 0,
        }
        column = self.entry.group_column
        return columns if column is None else {**columns, GROUP: str(row.get(column))}

    def _tokens(self, sample: RankedSample, where: str) -> dict[str, Any]:
        """A sample's columns; without a key where its responses are all the same to the policy."""
        read = [self._sequence(sample, index, where) for index in range(len(sample.responses))]
        sequences = [(ids, labels) for _, ids, labels in read]
        sample = replace(sample, prompt=read[0][0][:-1], responses=tuple(turns[-1].content for turns, _, _ in read))
        first = {tuple(ids): index for index, (ids, _) in reversed(list(enumerate(sequences)))}
        kept = sorted(first.values())
        alike = len(sequences) - len(kept)
        if len(kept) == 1:
            return {ALIKE: alike}
        sample, sequences = sample.only(kept) if alike else sample, [sequences[index] for index in kept]
        longest = max(sequences, key=lambda sequence: len(sequence[0]))
        shown, labels = (values[-self.cfg.sequence_len :] for values in longest)
        return {
            "input_ids": shown,
            "labels": labels,
            "attention_mask": [1] * len(shown),
            RANKED_INPUT_IDS: [token for ids, _ in sequences for token in ids],
            RANKED_LABELS: [token for _, labels in sequences for token in labels],
            SEQUENCE_LENGTHS: [len(ids) for ids, _ in sequences],
            ROW_KEY: sample.key,
            CONVERSATION: sample.dumps(),
            ALIKE: alike,
        }

    def _sequence(self, sample: RankedSample, index: int, where: str) -> tuple[Conversation, list[int], list[int]]:
        """A response after its prompt, reasoning in the texts; its tokens; and its labels."""
        given, name = sample.conversation(index), f"{where} response {index}"
        turns = folded(self.strategy, given, name)
        try:
            tokens = self.strategy.tokenize_prompt({"messages": as_messages(self.strategy, given)})
        except HOST_ERRORS as error:
            raise _refused([turn.role for turn in turns], error, where) from error
        labels = self._trained_text.completed(turns, tokens["input_ids"], tokens["labels"])
        self._trained_text.check(turns, labels, name)
        return turns, list(tokens["input_ids"]), labels

    def _report_unread(self, rows: Dataset) -> None:
        for name, count in sorted(Counter(name for names in rows[UNREAD] for name in names).items()):
            print(
                f"{self.entry.label}: the column {name!r} is not read, though {count} of {len(rows)} rows have "
                "something there. Name it under `field_prompt:`, `field_system:` or `field_input:` if it belongs to "
                "the prompt",
                flush=True,
            )

    def _without_unusable(self, rows: Dataset) -> Dataset:
        """The rows that can be used; of the others their numbers and the first."""
        label, (reasons, keys) = self.entry.label, (np.array(list(rows[name])) for name in (UNUSABLE, ROW_KEY))
        unusable, alike = reasons != "", (reasons == "") & (keys == "")
        if unusable.any():
            first = reasons[unusable][0]
            if unusable.all():
                raise RowError(f"{label}: not one of its {len(rows)} rows can be used; the first: {first}")
            print(f"{label}: {unusable.sum()} of {len(rows)} rows left out; the first: {first}", flush=True)
        if any(rows[ALIKE]):
            self._report_alike(rows, alike)
        return without(rows, unusable | alike)

    def _report_alike(self, rows: Dataset, alike: np.ndarray) -> None:
        counts, numbers, reasons = (np.array(list(rows[name])) for name in (ALIKE, ROW_NUMBER, UNUSABLE))
        first = f"{self.entry.label} row {numbers[counts > 0][0]}"
        if (alike | (reasons != "")).all():
            raise RowError(
                f"{first}: all its responses are the same to the policy, which prefers nothing; so it is in every row "
                f"that could be used ({alike.sum()} of {len(rows)}). Check the field names of the dataset entry"
            )
        whole = f"{alike.sum()} of {len(rows)} rows left out, whose responses are all the same"
        partly = f"{counts[~alike].sum()} responses left out of other rows, which hold a better one with the same text"
        said = "; ".join(text for text, number in ((whole, alike.sum()), (partly, counts[~alike].sum())) if number)
        print(f"{self.entry.label}: {said}; the first: {first}. They are not graded, counted or trained on", flush=True)


def _refused(roles: list[str], error: BaseException, where: str) -> RowError:
    """What a template, or the host around it, raised, as an error of the row."""
    what = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    system = "remove or merge the system turn, " if "system" in roles else ""
    return RowError(
        f"{where}: the policy's chat template refuses the turns {roles}: {what}. Set another `chat_template:`, {system}"
        "remove the row, or set `on_unusable_row: drop` for the data set"
    )


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
        | {
            ROW_NUMBER: Value("int64"),
            DROPPABLE: Value("bool"),
            LEFT_OUT: LEFT_OUT_TYPE,
            ALIKE: Value("int32"),
            UNREAD: Sequence(Value("string")),
        }
    )
