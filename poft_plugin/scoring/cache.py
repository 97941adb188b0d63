"""The score cache: a folder per scorer identity, parquet files inside, written atomically and only ever added.

    CACHE/<digest>/identity.json         everything the scores depend on, readable
    CACHE/<digest>/scores-*.parquet      row_key string, reward float64, num_tokens int32

Several processes may write at once: each writes files of its own.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, TypeAdapter

from poft_plugin.scoring.identity import Identity, Score

SCHEMA = pa.schema([("row_key", pa.string()), ("reward", pa.float64()), ("num_tokens", pa.int32())])
REFUSED = -(2**31)
"""In the place of a row's length: the scorer cannot read the row, and its data set leaves such rows out."""

ENVIRONMENT = "POFT_SCORE_CACHE"
DEFAULT_FOLDER = "poft_scores"


class ImportNote(BaseModel):
    """Where the imported scores of a model are, and whether their file said what made them."""

    identity: dict[str, Any]
    anonymous: bool


NOTES: dict[str, TypeAdapter[Any]] = {
    "revisions": TypeAdapter(dict[str, str]),
    "fingerprints": TypeAdapter(dict[str, list[int | str]]),
    "imports": TypeAdapter(dict[str, ImportNote]),
}
"""What each of the small files beside the scores holds."""

LOST_NOTES = {
    "revisions": "it is written again when scores are made",
    "fingerprints": "weight files are hashed again",
    "imports": "import the files of scores again",
}


@dataclass(frozen=True)
class Lookup:
    """What the cache knows of some rows, aligned with the keys that were asked.

    Args:
        values: `(n,)` float64, NaN where there is none.
        num_tokens: `(n,)` int32, 0 where unknown, minus its length where the row is longer than the scorer's context,
            `REFUSED` where the scorer cannot read it.
    """

    values: np.ndarray
    num_tokens: np.ndarray

    @property
    def missing(self) -> np.ndarray:
        """`(n,)` booleans: rows that were never looked at."""
        return np.asarray(np.isnan(self.values) & (self.num_tokens == 0))

    @property
    def missing_or_long(self) -> np.ndarray:
        """`(n,)` booleans: rows without a score."""
        return np.asarray(np.isnan(self.values))

    @property
    def too_long(self) -> np.ndarray:
        """`(n,)` booleans: rows that do not fit into the scorer's context."""
        return np.asarray(np.isnan(self.values) & (self.num_tokens < 0) & ~self.refused)

    @property
    def refused(self) -> np.ndarray:
        """`(n,)` booleans: rows that the scorer cannot read."""
        return np.asarray(np.isnan(self.values) & (self.num_tokens == REFUSED))


def cache_folder(setting: str | None) -> Path:
    """The cache's folder: the setting, else $POFT_SCORE_CACHE, else ./poft_scores."""
    return Path(setting or os.environ.get(ENVIRONMENT) or DEFAULT_FOLDER)


@dataclass(frozen=True)
class ScoreCache:
    """The cache under one folder."""

    folder: Path

    def lookup(self, identity: Identity, keys: pa.Array | pa.ChunkedArray) -> Lookup:
        """Scores of the given rows.

        Args:
            identity: whose scores.
            keys: row keys.

        Raises:
            ValueError: if a cache file cannot be read, naming it.
        """
        table = self.table(identity)
        index = pc.index_in(keys, value_set=table["row_key"])
        if isinstance(index, pa.ChunkedArray):
            index = index.combine_chunks()
        rewards = table["reward"].take(index)
        tokens = pc.fill_null(table["num_tokens"].take(index), 0)
        return Lookup(np.array(rewards.to_numpy(), dtype=np.float64), np.array(tokens.to_numpy(), dtype=np.int32))

    def table(self, identity: Identity) -> pa.Table:
        """All scores of one scorer that can be ones; damaged ones are named, and are as good as missing."""
        files = sorted((self.folder / identity.digest).glob("scores-*.parquet"))
        tables = [_read(file) for file in files]
        sound = [_sound(table, identity) for table in tables]
        good = pa.concat_tables([table.filter(kept) for table, kept in zip(tables, sound, strict=True)] or [_NOTHING])
        for file, table, kept in zip(files, tables, sound, strict=True):
            damaged = table.filter(pc.invert(kept))
            _name_damage(file, damaged.filter(pc.invert(pc.is_in(damaged["row_key"], value_set=good["row_key"]))))
        return good

    def write(self, identity: Identity, scores: Sequence[Score]) -> None:
        """Adds scores in one new file."""
        columns = [[s.key for s in scores], [s.value for s in scores], [s.num_tokens for s in scores]]
        self.write_table(identity, pa.table(columns, schema=SCHEMA))

    def write_table(self, identity: Identity, table: pa.Table) -> None:
        """Adds a table of scores in one new file."""
        folder = self.folder / identity.digest
        folder.mkdir(parents=True, exist_ok=True)
        description = folder / "identity.json"
        if not description.exists():
            with atomic_file(description) as temporary:
                temporary.write_text(json.dumps(identity.fields, indent=2, sort_keys=True, ensure_ascii=False))
        with atomic_file(folder / f"scores-{uuid.uuid4().hex}.parquet") as temporary:
            pq.write_table(table.cast(SCHEMA), temporary)

    def read_note(self, name: str) -> dict[str, Any]:
        """A small JSON file beside the scores (`revisions`, `imports`, `fingerprints`); empty where there is none.

        Raises:
            ValueError: for a damaged file, naming it and what its loss costs.
        """
        path = self.folder / f"{name}.json"
        try:
            adapter = NOTES[name]
            return dict(adapter.dump_python(adapter.validate_json(path.read_bytes())))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ValueError(f"score_cache {self.folder}: {error.strerror}; name another folder") from error
        except ValueError as error:
            raise ValueError(f"{path}: damaged; delete it: {LOST_NOTES[name]}") from error

    def update_note(self, name: str, entries: Mapping[str, Any]) -> None:
        """Adds entries to such a file."""
        merged = self.read_note(name) | dict(entries)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(merged, indent=2, sort_keys=True, ensure_ascii=False))


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_NOTHING = SCHEMA.empty_table()


def _sound(table: pa.Table, identity: Identity) -> pa.ChunkedArray:
    """Which lines are scores: finite, not above the scorer's bound, over a token or more; or notes of a long row."""
    rewards, tokens = table["reward"], pc.fill_null(table["num_tokens"], 0)
    scored = pc.and_(pc.is_finite(rewards), pc.and_(pc.less_equal(rewards, identity.bound), pc.greater(tokens, 0)))
    long = pc.and_(pc.is_nan(rewards), pc.less(tokens, 0))
    return pc.and_(pc.fill_null(pc.or_(scored, long), False), pc.is_valid(table["row_key"]))


_NAMED: set[tuple[str, int]] = set()
"""What was said already: a process that waits for others looks every second."""


def _name_damage(file: Path, damaged: pa.Table) -> None:
    if not damaged.num_rows or (str(file), damaged.num_rows) in _NAMED:
        return
    _NAMED.add((str(file), damaged.num_rows))
    first = damaged.slice(0, 1).to_pylist()[0]
    print(
        f"{file}: {damaged.num_rows} lines cannot be scores, the first of row key {first['row_key']}: reward "
        f"{first['reward']}, num_tokens {first['num_tokens']}. The file is damaged; these rows count as not scored",
        flush=True,
    )


def _read(file: Path) -> pa.Table:
    try:
        return pq.read_table(file, columns=SCHEMA.names).cast(SCHEMA)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ValueError(
            f"{file}: not a readable score file ({error}); delete it, its rows are scored again"
        ) from error
