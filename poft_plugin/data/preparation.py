"""What dataset preprocessors and row filters get to see: rows by content, never a host's dataset."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from poft_plugin.data.columns import CONVERSATION, DROPPABLE, GROUP, PART, ROW_KEY, ROW_NUMBER, SOURCE
from poft_plugin.data.ranked import RankedSample
from poft_plugin.data.rows import Conversation, load_conversation

Columns = Mapping[str, np.ndarray]
Purpose = Literal["preprocess", "train", "evaluate", "score"]


@dataclass(frozen=True)
class Rows:
    """Rows with their content.

    Args:
        table: `row_key`, `conversation`, `source`, `row_number` and maybe `group`, one line per row, in dataset order
            (a row may occur twice). Rows of a preference method hold a ranked sample under `conversation`, and their
            tokens under `ranked_input_ids`, `ranked_labels` and `sequence_lengths`.
        attached: per-row columns that preprocessors made, aligned with `table`.
        in_training: `(n,)` booleans, the training rows; the others are evaluation rows alone. None: all are.
    """

    table: pa.Table
    attached: Columns
    in_training: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @classmethod
    def none(cls) -> "Rows":
        """No rows: to look at a model alone."""
        return cls(pa.table({name: pa.array([], pa.string()) for name in (ROW_KEY, CONVERSATION, SOURCE)}), {})

    @property
    def keys(self) -> pa.ChunkedArray:
        """Row keys, strings."""
        return self.table[ROW_KEY]

    @property
    def training(self) -> np.ndarray:
        """`(n,)` booleans: the training rows."""
        return np.ones(len(self), dtype=bool) if self.in_training is None else self.in_training

    @property
    def droppable(self) -> np.ndarray:
        """`(n,)` booleans: rows that are left out where they cannot be used, as their data set says."""
        if DROPPABLE not in self.table.column_names:
            return np.zeros(len(self), dtype=bool)
        return np.asarray(self.table[DROPPABLE].to_numpy(), dtype=bool)

    @property
    def sources(self) -> np.ndarray:
        """The `datasets:` entry of each row, as text."""
        return np.asarray(self.table[SOURCE].to_pylist(), dtype=object)

    def groups(self, within: str) -> np.ndarray:
        """The group of each row: one for all (`none`), its `datasets:` entry (`dataset`), or the asked column."""
        if within == "none":
            return np.zeros(len(self), dtype=int)
        if within == "dataset":
            return self.sources
        return np.asarray(self.table[GROUP].to_pylist(), dtype=object)

    def conversation(self, index: int) -> Conversation:
        """The turns of one row."""
        return load_conversation(self.table[CONVERSATION][index].as_py())

    def sample(self, index: int) -> RankedSample:
        """The prompt and the responses of one ranked row."""
        return RankedSample.loads(self.table[CONVERSATION][index].as_py())

    def where(self, index: int) -> str:
        """Names one row in messages: its data set, its position there, its key."""
        source, number, key = (self.table[name][index].as_py() for name in (SOURCE, ROW_NUMBER, ROW_KEY))
        return f"{source} row {number} (key {key})"

    def title(self, index: int) -> str:
        """Names one row, and which of a row's responses it is."""
        part = self.table[PART][index].as_py() if PART in self.table.column_names else None
        return self.where(index) + ("" if part is None else f": {part}")

    def where_key(self, key: str) -> str:
        """Names the first row of a key in messages."""
        return self.where(int(pc.index(self.keys, key).as_py()))

    def unique(self) -> "Rows":
        """The first row of each key, in order; nothing attached.

        Raises:
            ValueError: if two rows of one key differ: the same responses with other scores.
        """
        keys = self.keys.combine_chunks()
        first = pc.index_in(pc.unique(keys), value_set=keys)
        unique = Rows(self.table.take(first), {})
        if len(unique) < len(self):
            texts = self.table[CONVERSATION]
            again = unique.table[CONVERSATION].take(pc.index_in(keys, value_set=unique.keys.combine_chunks()))
            differing = np.flatnonzero(pc.not_equal(texts, again).to_numpy())
            if len(differing):
                here = int(differing[0])
                raise ValueError(
                    f"{self.where(here)} has the same texts as {self.where_key(keys[here].as_py())} with other scores; "
                    "remove one of them"
                )
        return unique


@dataclass(frozen=True)
class Policy:
    """The policy before training, for preprocessors that read its tokens or score with its start weights.

    Args:
        model: hub id or local folder.
        tokenizer: its tokenizer, as the host has set it up.
        revision: hub revision, or None.
        sequence_len: tokens of the longest sequence that is trained on.
        dtype: the dtype that it is loaded in, such as `bfloat16`.
        quantization: keywords of transformers' `BitsAndBytesConfig`, or None.
        attn_implementation: as the host's.
        trust_remote_code: as the host's.
    """

    model: str
    tokenizer: Any
    sequence_len: int
    revision: str | None = None
    dtype: str = "float32"
    quantization: Mapping[str, Any] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    @cached_property
    def vocab_size(self) -> int:
        """Token ids that the tokenizer can give: 0 up to this."""
        return max(len(self.tokenizer), *(int(number) + 1 for number in self.tokenizer.get_vocab().values()))

    def text_of(self, token: int) -> str:
        """The text of one token."""
        return str(self.tokenizer.decode([token]))

    @cached_property
    def special_token_ids(self) -> tuple[int, ...]:
        """Ids of special tokens, added ones too."""
        added = self.tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special}
        return tuple(sorted(special | set(self.tokenizer.all_special_ids)))


@dataclass(frozen=True)
class RunContext:
    """Where a preprocessor runs.

    Args:
        purpose: `preprocess`, `train`, `evaluate` or `score`.
        rank: this process among `world_size`.
        world_size: processes that prepare the same data at the same time.
        local_rank: this process on its machine: picks its accelerator.
        local_world_size: processes on this machine.
        policy: the model that is trained; None where nothing is (a test of a preprocessor).
        output_dir: where the run's own files go, or None.
    """

    purpose: "Purpose"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    policy: Policy | None = None
    output_dir: Path | None = None

    @classmethod
    def from_environment(
        cls, purpose: "Purpose", *, policy: Policy | None = None, output_dir: Path | None = None
    ) -> "RunContext":
        """What a launcher (torchrun, accelerate, deepspeed) put into the environment; one process without one."""
        names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
        found = {key: int(os.environ[name]) for key, name in names.items() if name in os.environ}
        local = int(os.environ.get("LOCAL_WORLD_SIZE", found.get("world_size", 1)))
        return cls(purpose, **found, local_world_size=local, policy=policy, output_dir=output_dir)


@dataclass(frozen=True)
class Prepared:
    """What a preprocessor returns.

    Args:
        columns: per-row values aligned with the rows it was given, by column name; for ranked rows also arrays of
            objects, one list per row with one number per response in the order of the data, or None for a row that the
            column is not for: a set with such a row goes without the column.
        dropped: keys of rows that must not be trained or evaluated on (a reference cannot read them, say).
        statistics: numbers for the host's trackers, logged once.
        tensors: arrays that the trainer needs as a whole (DEFT's `discrepancy`), by name.
        scored_by: for columns that hold one model's scores as they are, the name of its job.
    """

    columns: Columns
    dropped: frozenset[str] = frozenset()
    statistics: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    scored_by: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def merged(cls, results: Sequence["Prepared"]) -> "Prepared":
        """What several preprocessors made, as one."""
        return cls(
            {name: values for result in results for name, values in result.columns.items()},
            frozenset().union(*(result.dropped for result in results)),
            {name: value for result in results for name, value in result.statistics.items()},
            {name: value for result in results for name, value in result.tensors.items()},
            {name: job for result in results for name, job in result.scored_by.items()},
        )


class RowFilter(Protocol):
    """Decides which *training* rows stay. Evaluation rows are never filtered."""

    def __call__(self, rows: Rows, *_: Any, **settings: Any) -> np.ndarray:
        """A boolean `(len(rows),)`: True where the row stays."""
        ...
