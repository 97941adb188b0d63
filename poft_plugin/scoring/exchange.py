"""Scores as files: exported with the scorer's full identity, imported after a check of every row key."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel

from poft_plugin.data.columns import CONVERSATION
from poft_plugin.scoring.cache import SCHEMA, Lookup, ScoreCache, atomic_file
from poft_plugin.scoring.identity import ROUNDING, Identity
from poft_plugin.scoring.jobs import Job

METADATA = b"poft_plugin"
EXPORTED = pa.schema(
    [("row_key", pa.string()), ("model", pa.string()), ("reward", pa.float64()), ("num_tokens", pa.int32())]
)


class _Metadata(BaseModel):
    scorers: dict[str, dict[str, Any] | None]


@dataclass(frozen=True)
class ImportedScores:
    """Scores of one model that were made elsewhere.

    Args:
        table: `row_key, reward, num_tokens`, each key once.
        identity: what the exporting scorer was; None where the file does not say.
    """

    table: pa.Table
    identity: Identity | None

    def lookup(self, keys: pa.ChunkedArray) -> Lookup:
        """Scores of the given rows."""
        index = pc.index_in(keys, value_set=self.table["row_key"]).combine_chunks()
        rewards = np.array(self.table["reward"].take(index).to_numpy(), dtype=np.float64)
        tokens = pc.fill_null(self.table["num_tokens"].take(index), 0).to_numpy()
        return Lookup(rewards, np.where(np.isnan(rewards), 0, tokens))


@dataclass(frozen=True)
class Scored:
    """A job with what is known of its rows.

    Args:
        job: what was to be scored.
        lookup: scores, aligned with its rows.
        identity: what they depend on; None where nobody knows.
    """

    job: Job
    lookup: Lookup
    identity: Identity | None


def read_score_file(path: str | Path, name: str, *, highest: float | None) -> ImportedScores:
    """One model's scores out of a parquet file.

    Args:
        path: the file, with `row_key` and `reward`, and maybe `model` and `num_tokens`.
        name: the job whose scores are wanted; those of others in the file are left aside.
        highest: no score can be above it (0 for a log-probability); None where any number is possible.

    Raises:
        ValueError: if the file is not there or not of that form, a score is not finite, or above `highest`, or a key
            comes twice with different scores.
    """
    by_model = _by_model(Path(path), default=name)
    if name not in by_model:
        raise ValueError(f"{path}: no scores of {name!r} in it; its column `model` has {sorted(by_model)}")
    _check_bound(by_model[name].table, str(path), highest)
    return by_model[name]


def import_scores(path: str | Path, jobs: Sequence[Job], cache: ScoreCache) -> dict[str, int]:
    """Takes a score file into the cache.

    Args:
        path: the parquet file. Its column `model` has names of jobs, or models as the config writes them, where one
            job has the model; it may be missing where there is one job.
        jobs: the config's jobs that could be imported for, over every row that scores may be there for.
        cache: where they go.

    Returns:
        Scores taken, by the job's name.

    Raises:
        ValueError: for a model that is none of the config's, a key that is no row of its data, or as
            `read_score_file`. Nothing is imported then.
    """
    by_model = _by_model(Path(path), default=jobs[0].name if len(jobs) == 1 else None)
    taken = [(_job_of(model, jobs, path), scores) for model, scores in by_model.items()]
    for job, scores in taken:
        _check_bound(scores.table, str(path), job.highest)
        keys = scores.table["row_key"]
        foreign = pc.filter(keys, pc.invert(pc.is_in(keys, value_set=job.rows.keys)))
        if len(foreign):
            raise ValueError(
                f"{path}: {len(foreign)} row keys of {job.name!r} are no rows of this config's data, the first "
                f"{foreign[0]}. `axolotl poft export --rows` lists the right ones"
            )
    for job, scores in taken:
        _store(job.name, scores, cache, highest=job.highest)
    return {job.name: scores.table.num_rows for job, scores in taken}


def imported_scores(cache: ScoreCache, name: str) -> ImportedScores | None:
    """What was imported for a job before, or None."""
    note = cache.read_note("imports").get(name)
    if note is None:
        return None
    stored = Identity(note["identity"], note.get("highest"))  # older notes have no bound
    return ImportedScores(_unique(cache.table(stored), str(cache.folder)), None if note["anonymous"] else stored)


def export_scores(path: str | Path, scored: Sequence[Scored], *, list_rows: bool = False) -> int:
    """Writes `row_key, model, reward, num_tokens`, one line per row and job; `model` is the job's name.

    Args:
        path: the parquet file to write, atomically.
        scored: jobs with what is known of their rows.
        list_rows: list every row with its conversation; the reward of those without a score is null.

    Returns:
        The number of lines.
    """
    tables = [_exported(each, list_rows=list_rows) for each in scored]
    described = {each.job.name: None if each.identity is None else each.identity.fields for each in scored}
    table = pa.concat_tables(tables).replace_schema_metadata({METADATA: json.dumps({"scorers": described}).encode()})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(Path(path)) as temporary:
        pq.write_table(table, temporary)
    return int(table.num_rows)


def _exported(scored: Scored, *, list_rows: bool) -> pa.Table:
    rows, lookup = scored.job.rows, scored.lookup
    there = ~np.isnan(lookup.values)
    columns = {
        "row_key": rows.keys,
        "model": pa.array([scored.job.name] * len(rows), pa.string()),
        "reward": pa.array(lookup.values, pa.float64(), from_pandas=True),
        "num_tokens": pa.array(lookup.num_tokens, pa.int32(), mask=~there),
    }
    table = pa.table(columns, schema=EXPORTED)
    if not list_rows:
        return table.filter(pa.array(there))
    return table.append_column("conversation", rows.table[CONVERSATION])


def _job_of(model: str, jobs: Sequence[Job], path: str | Path) -> Job:
    found = [job for job in jobs if job.name == model] or [job for job in jobs if job.settings.source == model]
    if len(found) == 1:
        return found[0]
    names = ", ".join(job.name for job in found or jobs)
    if found:
        raise ValueError(f"{path}: scores of {model!r}, which is the model of {len(found)} jobs: say which ({names})")
    kinds = " or ".join(dict.fromkeys(job.kind for job in jobs))
    raise ValueError(f"{path}: scores of {model!r}, which is no {kinds} of this config ({names})")


def _by_model(path: Path, default: str | None) -> dict[str, ImportedScores]:
    table, identities = _read(path)
    infinite = table.filter(pc.invert(pc.is_finite(table["reward"])))
    if infinite.num_rows:
        raise ValueError(f"{path}: the reward of row key {infinite['row_key'][0]} is not finite")
    if "model" not in table.column_names:
        if default is None:
            raise ValueError(f"{path}: no column `model`; with several models it must say whose scores they are")
        table = table.append_column("model", pa.array([default] * table.num_rows, pa.string()))
    models = pc.unique(table["model"]).to_pylist()
    return {
        model: ImportedScores(
            _unique(table.filter(pc.equal(table["model"], model)).select(SCHEMA.names).cast(SCHEMA), str(path)),
            Identity(identities[model]) if identities.get(model) else None,
        )
        for model in models
    }


def _read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file of scores")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    for column in ("row_key", "reward"):
        if column not in table.column_names:
            raise ValueError(f"{path}: no column {column!r}; it has {table.column_names}")
    if "num_tokens" not in table.column_names:
        table = table.append_column("num_tokens", pa.nulls(table.num_rows, pa.int32()))
    table = _cast(table.filter(pc.is_valid(table["reward"])), path)
    counted = pc.fill_null(table["num_tokens"], 1)  # whoever scored the row elsewhere may not have counted
    table = table.set_column(table.column_names.index("num_tokens"), "num_tokens", counted)
    if table["row_key"].null_count:
        raise ValueError(
            f"{path}: {table['row_key'].null_count} rows without a row key; take the keys of `export --rows`"
        )
    return table, _scorers(table, path)


def _cast(table: pa.Table, path: Path) -> pa.Table:
    for name in (column for column in EXPORTED.names if column in table.column_names):
        wanted = EXPORTED.field(name).type
        try:
            cast = table[name].cast(wanted)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            what = "text" if wanted == pa.string() else "numbers"
            raise ValueError(f"{path}: the column {name!r} must hold {what} ({error})") from error
        table = table.set_column(table.column_names.index(name), name, cast)
    return table


def _scorers(table: pa.Table, path: Path) -> dict[str, Any]:
    """What made the scores of each model, as the file says; nothing where it does not."""
    metadata = (table.schema.metadata or {}).get(METADATA)
    if metadata is None:
        return {}
    try:
        return _Metadata.model_validate_json(metadata).scorers
    except ValueError as error:
        raise ValueError(
            f"{path}: its metadata `{METADATA.decode()}` is damaged. Export the scores again, or write the file "
            "without metadata"
        ) from error


def _check_bound(table: pa.Table, where: str, highest: float | None) -> None:
    if highest is None:
        return
    above = table.filter(pc.greater(table["reward"], highest + ROUNDING))
    if above.num_rows:
        raise ValueError(
            f"{where}: {above.num_rows} rewards are above {highest:g}, the first {above['reward'][0]} of row key "
            f"{above['row_key'][0]}; a reward is a mean log-probability per token, in nats. Check the sign"
        )


def _unique(table: pa.Table, where: str) -> pa.Table:
    """Each key once; a key with two different rewards is an error."""
    first = pc.index_in(pc.unique(table["row_key"]), value_set=table["row_key"])
    unique = table.take(first)
    if unique.num_rows < table.num_rows:
        again = unique["reward"].take(pc.index_in(table["row_key"], value_set=unique["row_key"]))
        differs = np.abs(again.to_numpy() - table["reward"].to_numpy()) > 1e-6
        if differs.any():
            key = table["row_key"][int(np.flatnonzero(differs)[0])]
            raise ValueError(f"{where}: row key {key} comes twice with different rewards")
    return unique


def _store(name: str, scores: ImportedScores, cache: ScoreCache, *, highest: float | None) -> None:
    """Takes scores in. A file that does not say whose they are replaces what such a file said of its rows before."""
    if scores.identity is not None:
        identity, fresh = Identity(scores.identity.fields, highest), scores.table
        known = cache.table(identity)["row_key"]
        fresh = fresh.filter(pc.invert(pc.is_in(fresh["row_key"], value_set=known)))
    else:
        before = imported_scores(cache, name)
        fresh = scores.table
        if before is not None and before.identity is None:
            kept = before.table.filter(pc.invert(pc.is_in(before.table["row_key"], value_set=fresh["row_key"])))
            fresh = pa.concat_tables([fresh, kept])
        content = hashlib.sha256(repr(fresh.sort_by("row_key").to_pydict()).encode()).hexdigest()
        identity = Identity({"imported": name, "content": content}, highest)
        known = cache.table(identity)["row_key"]
        fresh = fresh.filter(pc.invert(pc.is_in(fresh["row_key"], value_set=known)))
    if fresh.num_rows:
        cache.write_table(identity, fresh)
    note = {"identity": dict(identity.fields), "anonymous": scores.identity is None, "highest": highest}
    cache.update_note("imports", {name: note})
