"""What dataset preprocessors and row filters get to see: rows by content, never a host's dataset."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from poft_plugin.data.columns import CONVERSATION, GROUP, ROW_KEY, ROW_NUMBER, SOURCE
from poft_plugin.data.rows import Conversation, load_conversation

Columns = Mapping[str, np.ndarray]
Purpose = Literal["preprocess", "train", "evaluate", "score"]


@dataclass(frozen=True)
class Rows:
    """Rows with their content.

    Args:
        table: `row_key`, `conversation`, `source`, `row_number` and maybe `group`, one line per row, in dataset order
            (a row may occur twice).
        attached: per-row columns that preprocessors made, aligned with `table`.
    """

    table: pa.Table
    attached: Columns

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def keys(self) -> pa.ChunkedArray:
        """Row keys, strings."""
        return self.table[ROW_KEY]

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

    def where(self, index: int) -> str:
        """Names one row in messages: its data set, its position there, its key."""
        source, number, key = (self.table[name][index].as_py() for name in (SOURCE, ROW_NUMBER, ROW_KEY))
        return f"{source} row {number} (key {key})"

    def where_key(self, key: str) -> str:
        """Names the first row of a key in messages."""
        return self.where(int(pc.index(self.keys, key).as_py()))

    def unique(self) -> "Rows":
        """The first row of each key, in order; nothing attached."""
        first = pc.index_in(pc.unique(self.keys), value_set=self.keys)
        return Rows(self.table.take(first), {})


@dataclass(frozen=True)
class RunContext:
    """Where a preprocessor runs.

    Args:
        purpose: `preprocess`, `train`, `evaluate` or `score`.
        rank: this process among `world_size`.
        world_size: processes that prepare the same data at the same time.
        local_rank: this process on its machine: picks its accelerator.
        local_world_size: processes on this machine.
    """

    purpose: "Purpose"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls, purpose: "Purpose") -> "RunContext":
        """What a launcher (torchrun, accelerate, deepspeed) put into the environment; one process without one."""
        names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
        found = {key: int(os.environ[name]) for key, name in names.items() if name in os.environ}
        local = int(os.environ.get("LOCAL_WORLD_SIZE", found.get("world_size", 1)))
        return cls(purpose, **found, local_world_size=local)


@dataclass(frozen=True)
class Prepared:
    """What a preprocessor returns.

    Args:
        columns: per-row numbers aligned with the rows it was given, by column name.
        dropped: keys of rows that must not be trained or evaluated on (a reference cannot read them, say).
        statistics: numbers for the host's trackers, logged once.
    """

    columns: Columns
    dropped: frozenset[str] = frozenset()
    statistics: Mapping[str, float] = field(default_factory=dict)


class Preprocessor(Protocol):
    """Attaches columns to unique rows before training."""

    def __call__(self, rows: Rows, settings: BaseModel, run: RunContext) -> Prepared:
        """Columns for `rows`, which hold every row of training and evaluation sets once."""
        ...


class RowFilter(Protocol):
    """Decides which *training* rows stay. Evaluation rows are never filtered."""

    def __call__(self, rows: Rows, *_: Any, **settings: Any) -> np.ndarray:
        """A boolean `(len(rows),)`: True where the row stays."""
        ...
