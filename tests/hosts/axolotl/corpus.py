"""A generated corpus of what people write wrongly: configs, rows, files. Every entry ends in one of a few ways.

python tests/hosts/axolotl/corpus.py      # the table of outcomes
"""

import copy
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from corpus_rows import Trial, conversations, rows

WORKS = "works"
NAMED = "one message that names the place"
UNNAMED = "one message that does not"
RAW = "a raw error"


def outcome(trial: Trial) -> tuple[str, str]:
    """How an entry ends, and the message."""
    from poft_plugin.data.rows import RowError
    from poft_plugin.hosts.axolotl.errors import UserError, one_message

    try:
        with one_message():
            trial.act()
    except (UserError, RowError) as error:
        text = str(error)
        shown = trial.place in text and "POFT_TRACEBACK" not in text
        return (NAMED if shown else UNNAMED), text
    except Exception as error:  # noqa: BLE001 - what this corpus is there to find
        return RAW, f"{type(error).__name__}: {error}"
    return WORKS, ""


WRONG: dict[str, Any] = {
    "text": "[/x] nowhere",
    "number": 3,
    "negative": -1,
    "fraction": 0.5,
    "true": True,
    "null": None,
    "empty list": [],
    "empty block": {},
    "list of null": [None],
    "list of text": ["a"],
    "list of numbers": [3],
    "block": {"a": 1},
    "block with a number for a key": {1: 2},
    "nested lists": [[]],
    "long text": "a" * 300,
    "not a number": float("nan"),
}

POFT = (
    "poft", "poft.references", "poft.references.0", "poft.references.0.model", "poft.references.0.chat_template",
    "poft.references.0.dtype", "poft.references.0.devices", "poft.beta", "poft.keep_top_percent", "poft.score_cache",
    "poft.batch_tokens", "row_filters", "row_filters.0", "row_filters.0.name", "row_filters.0.percent", "datasets",
    "datasets.0", "datasets.0.path", "datasets.0.type", "datasets.0.data_files", "test_datasets", "poft_plugin_keys",
    "poft_plugin_kept", "rl", "reward_model",
)  # fmt: skip
DEFT = (
    "deft", "deft.reward_model", "deft.reward_model.model", "deft.reward_model.max_length", "deft.top_percent",
    "deft.train_on", "deft.rank_by", "rl_beta", "dpo_loss_type", "datasets.0.field_chosen",
    "datasets.0.on_unusable_row",
)  # fmt: skip
"""Places in a config, with dots between."""


def changed(config: Any, place: str, value: Any) -> dict[str, Any]:
    """A copy of a config with another value at a place."""
    changed = copy.deepcopy(config)
    *path, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    inside = changed
    for part in path:
        inside = inside[part]
    inside[last] = copy.deepcopy(value)
    return dict(changed)


def configs(models: SimpleNamespace, folder: Path) -> Iterator[Trial]:
    """One wrong value at one place of a config, for every place and value."""
    import tiny

    rows, pairs = folder / "data.jsonl", folder / "pairs.jsonl"
    tiny.write_jsonl(rows, tiny.chat_rows(4))
    tiny.write_jsonl(pairs, tiny.pair_rows(4))
    common = {
        "base_model": str(models.policy),
        "plugins": ["poft_plugin.PoftPlugin"],
        "output_dir": str(folder / "out"),
    }
    poft = {
        **common, "rl": "poft", "row_filters": [{"name": "keep_top_percent", "percent": 50}],
        "poft": {"references": [{"model": str(models.ref_a)}], "score_cache": str(folder / "scores")},
        "datasets": [{"path": str(rows), "ds_type": "json", "type": "chat_template"}],
    }  # fmt: skip
    deft = {
        **common, "rl": "deft_dpo",
        "deft": {"reward_model": {"model": str(models.ref_a)}, "score_cache": str(folder / "scores")},
        "datasets": [{"path": str(pairs), "ds_type": "json", "type": "chat_template"}],
    }  # fmt: skip
    for config, places in ((poft, POFT), (deft, DEFT)):
        for place in places:
            for name, value in WRONG.items():
                other = changed(config, place, value)
                leaf = [part for part in place.split(".") if not part.isdigit()][-1].removesuffix("s")
                yield Trial("config", f"{place}: {name}", leaf, lambda other=other: _register(other))


def _register(config: dict[str, Any]) -> None:
    """What the host does with a config first, and what we look up before any data is read."""
    from axolotl.utils.dict import DictDefault

    from poft_plugin.hosts.axolotl.plugin import PoftPlugin

    plugin = PoftPlugin()
    plugin.register(DictDefault(config))
    if plugin.method_run is not None and plugin.method_run.method.name == "poft":
        plugin.method_run.check()


NOTES = {
    "cut off": '{"a": ', "a list": "[1]", "a number": "3", "null": "null", "no text": "\xff\xfe", "empty": "",
    "wrong entries": '{"./a": 3}', "null entries": '{"./a": null}',
}  # fmt: skip
METADATA = {
    "no JSON": b"{", "a list": b"[]", "a number": b"3", "no scorers": b"{}", "scorers of null": b'{"scorers": null}',
    "a scorer that is text": b'{"scorers": {"./a": "x"}}', "no text": b"\xff",
}  # fmt: skip
COLUMNS: dict[str, dict[str, list[Any]]] = {
    "reward of text": {"row_key": ["k"], "reward": ["x"]},
    "reward of lists": {"row_key": ["k"], "reward": [[1.0]]},
    "keys of lists": {"row_key": [["k"]], "reward": [-1.0]},
    "num_tokens of text": {"row_key": ["k"], "reward": [-1.0], "num_tokens": ["x"]},
    "num_tokens of lists": {"row_key": ["k"], "reward": [-1.0], "num_tokens": [[1]]},
    "model of lists": {"row_key": ["k"], "reward": [-1.0], "model": [["x"]]},
    "model of null": {"row_key": ["k"], "reward": [-1.0], "model": [None]},
    "no columns": {},
}
SCORES = {"row_key": ["k"], "reward": [-1.0]}


def files(models: SimpleNamespace, folder: Path) -> Iterator[Trial]:
    """Damaged files, and folders where files are expected."""
    import tiny

    for note in ("revisions", "fingerprints", "imports"):
        for name, text in NOTES.items():
            place = folder / "notes" / f"{note}-{name}"
            place.mkdir(parents=True)
            (place / f"{note}.json").write_bytes(text.encode("latin-1"))
            yield Trial("file", f"{note}.json: {name}", f"{note}.json", _note_reader(place, note))
    for name, metadata in METADATA.items():
        table = pa.table(SCORES).replace_schema_metadata({b"poft_plugin": metadata})
        yield _score_file(f"metadata: {name}", folder, table)
    for name, columns in COLUMNS.items():
        yield _score_file(f"scores: {name}", folder, pa.table(columns))
    data = tiny.write_jsonl(folder / "files.jsonl", tiny.chat_rows(2))
    (folder / "a_folder").mkdir()
    (folder / "a_file").write_bytes(b"\xff\xfe\x00")
    config = {
        "base_model": str(models.policy), "plugins": ["poft_plugin.PoftPlugin"], "rl": "poft",
        "poft": {"references": [{"model": str(models.ref_a)}], "score_cache": str(folder / "scores")},
        "datasets": [{"path": str(data), "ds_type": "json", "type": "chat_template"}],
    }  # fmt: skip
    for there in ("a_folder", "a_file"):
        at, reference = str(folder / there), "poft.references.0"
        for place, value in (
            (f"{reference}.chat_template", at), ("poft.references", [{"scores": at, "name": "s"}]),
            (f"{reference}.model", at), ("poft.score_cache", at),
        ):  # fmt: skip
            other = changed(config, place, value)
            yield Trial("file", f"{place}: {there}", there, lambda other=other: _register(other))


def _note_reader(folder: Path, note: str) -> Callable[[], Any]:
    from poft_plugin.scoring.cache import ScoreCache

    return lambda: ScoreCache(folder).read_note(note)


def _score_file(label: str, folder: Path, table: pa.Table) -> Trial:
    from poft_plugin.scoring.exchange import read_score_file

    path = folder / f"{label.replace(' ', '_').replace(':', '')}.parquet"
    pq.write_table(table, path)
    return Trial("file", label, path.name, lambda: read_score_file(path, "./a", highest=0.0))


def trials(models: SimpleNamespace, folder: Path) -> list[Trial]:
    """The corpus."""
    return [*configs(models, folder), *rows(), *conversations(models), *files(models, folder)]


def table(found: dict[Trial, tuple[str, str]]) -> str:
    """How many entries of each kind end how."""
    counts = Counter((trial.kind, ending) for trial, (ending, _) in found.items())
    kinds, endings = sorted({kind for kind, _ in counts}), (WORKS, NAMED, UNNAMED, RAW)
    lines = [f"{'':8}" + "".join(f"{ending:>36}" for ending in endings)]
    lines += [f"{kind:8}" + "".join(f"{counts[kind, ending]:>36}" for ending in endings) for kind in kinds]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import tiny

    work = Path(tempfile.mkdtemp())
    made = SimpleNamespace(policy=tiny.policy(work / "policy"), ref_a=tiny.reference(work / "ref_a"))
    endings = {trial: outcome(trial) for trial in trials(made, work)}
    for trial, (ending, text) in endings.items():
        if ending in (UNNAMED, RAW) or "-v" in sys.argv:
            print(json.dumps([trial.label, ending, text[:200]], ensure_ascii=False))
    print(table(endings))
    shutil.rmtree(work)
