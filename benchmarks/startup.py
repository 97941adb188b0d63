"""What the plugin adds before a training begins: to `axolotl --help`, to a cached `preprocess`, to a large join.

Commands are processes of their own, with and without the plugin in turn, their output thrown away. The join is what
every `axolotl train` does once all scores are there: read the rows, look up each reference's scores, average them, and
attach them to the host's data set.

    python -m benchmarks.startup [--write]
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from axolotl.utils.dict import DictDefault
from datasets import Dataset, load_from_disk
from transformers.utils import logging

from benchmarks import synthetic
from benchmarks.common import Contestant, Report, arguments, peak_mib, publish, race, ratio, rounds, settle
from poft_plugin.data.preparation import Rows, RunContext
from poft_plugin.hosts.axolotl.host_rows import HostRows
from poft_plugin.hosts.axolotl.host_rows import join as join_columns
from poft_plugin.preprocessors.reference_rewards import reference_rewards

REFERENCES = 3
JOIN_ROWS = 200_000
PREPROCESS_ROWS = 2_000
TOKENS = 60
"""Tokens of a row of the joined data set: the join does not read them."""

JOIN_SECONDS, JOIN_MIB = 2.0, 300.0

HELP = """
import importlib.metadata as metadata
every = metadata.entry_points
metadata.entry_points = lambda **chosen: [point for point in every(**chosen) if point.name != {hidden!r}]
import sys
sys.argv = ["axolotl", "--help"]
from axolotl.cli.main import main
main()
"""

ENVIRONMENT = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

COMMON: dict[str, Any] = {
    "bf16": False, "fp16": False, "tf32": False, "attn_implementation": "sdpa", "optimizer": "adamw_torch",
    "gradient_checkpointing": False, "dataset_num_proc": 1, "sequence_len": 1024, "micro_batch_size": 1,
    "gradient_accumulation_steps": 1, "num_epochs": 1, "learning_rate": 1e-5, "val_set_size": 0,
    "special_tokens": {"pad_token": "<|pad|>"}, "output_dir": "out",
    "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": "chat_template"}],
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=["commands", "join"], help="One of the two tables.")
    options = settle(parser.parse_args(argv), repeats=3)
    logging.set_verbosity_error()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        models = [synthetic.checkpoint(Path(folder) / f"model_{number}", number) for number in range(REFERENCES + 1)]
        reports = []
        if options.only != "join":
            reports.append(commands(options, Path(folder), models))
        if options.only != "commands":
            reports.append(join(options, Path(folder), models[1:]))
        publish("startup", reports, options)


def commands(options: argparse.Namespace, folder: Path, models: Sequence[Path]) -> Report:
    """Commands with and without the plugin."""
    pairs = {
        "import of the command module": (
            partial(_python, "import click"),
            partial(_python, "import poft_plugin.hosts.axolotl.cli"),
        )
    }
    if not options.small:
        pairs["axolotl --help"] = tuple(partial(_python, HELP.format(hidden=name)) for name in ("poft", "no other"))
        sft, poft = _configs(folder, models)
        _preprocess(poft)  # scores all rows
        for name, prepared in (("tokenizing anew", False), ("all prepared", True)):
            pairs[f"axolotl preprocess, {name}"] = (
                partial(_preprocess, sft, keep=prepared),
                partial(_preprocess, poft, keep=prepared),
            )
    cells = []
    for name, (without, with_it) in pairs.items():
        runs = [Contestant("without", without), Contestant("with", with_it)]
        timings = race(runs, options.repeats, clock=options.clock, take=options.take, warm_up=not options.small)
        before, after = timings["without"], timings["with"]
        cells.append(
            [name, f"{before.figure:.3g}", f"{after.figure:.3g}", f"{after.figure - before.figure:+.2g}",
             ratio(after.figure / before.figure), before.spread, after.spread]
        )  # fmt: skip
    left_out = ["With --small the host's own commands are left out."] if options.small else []
    notes = [
        rounds(options),
        "Import: without is `import click`, which the host has imported by then.",
        f"preprocess: {PREPROCESS_ROWS:,} rows, {REFERENCES} references with all scores cached; without is plain SFT.",
        *left_out,
    ]
    headings = ("command", "without, s", "with, s", "added, s", "ratio", "range without", "range with")
    return Report("What the plugin adds to commands", headings, cells, notes)


def join(options: argparse.Namespace, folder: Path, references: Sequence[Path]) -> Report:
    """The join, in parts and as a whole."""
    count = JOIN_ROWS // 100 if options.small else JOIN_ROWS
    rows = synthetic.rows_of(count)
    settings = synthetic.settings_for(references, folder / "joined")
    synthetic.fill_cache(settings, rows.keys)
    stored = _host_dataset(rows, folder / "dataset")
    del rows
    with contextlib.redirect_stdout(io.StringIO()):
        runs = [Contestant("scores of unique rows", lambda: _scores(stored, settings))]
        if not options.small:
            runs.append(Contestant("whole join, data set attached", lambda: _whole(stored, settings, references[0])))
        timings = race(runs, options.repeats, clock=options.clock, take=options.take)
        peaks = [peak_mib(run.run) for run in runs]
    cells = [
        [run.name, f"{timings[run.name].figure:.3g}", timings[run.name].spread, f"{peak:,.0f}",
         ratio(timings[run.name].figure / JOIN_SECONDS), ratio(peak / JOIN_MIB)]
        for run, peak in zip(runs, peaks, strict=True)
    ]  # fmt: skip
    notes = [
        f"{rounds(options)} Peak memory: above what was held before; mapped pages of the data set count.",
        f"Bounds: {JOIN_SECONDS:.0f} s and {JOIN_MIB:.0f} MiB for {JOIN_ROWS:,} rows.",
    ]
    headings = ("join", "seconds", "range", "peak MiB", "of the time bound", "of the memory bound")
    return Report(f"Join of {count:,} rows with {REFERENCES} references", headings, cells, notes)


def _python(code: str) -> None:
    _run([sys.executable, "-c", code])


def _preprocess(config: Path, *, keep: bool = False) -> None:
    if not keep:
        shutil.rmtree(config.parent / "prepared", ignore_errors=True)
    script = Path(sys.executable).with_name("axolotl")
    _run([str(script), "preprocess", config.name], cwd=config.parent)


def _run(command: Sequence[str], cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _configs(folder: Path, models: Sequence[Path]) -> list[Path]:
    """A plain SFT config and a PoFT config of the same rows, each in a folder of its own."""
    lines = [
        json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]})
        for asked, answered in synthetic.texts(PREPROCESS_ROWS)
    ]
    settings = synthetic.settings_for(models[1:], folder / "scores").model_dump(exclude_unset=True)
    methods: dict[str, dict[str, Any]] = {
        "sft": {},
        "poft": {"plugins": ["poft_plugin.PoftPlugin"], "rl": "poft", "poft": settings},
    }
    paths = []
    for name, extra in methods.items():
        inside = folder / name
        inside.mkdir()
        (inside / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        merged = {**COMMON, "base_model": str(models[0]), "dataset_prepared_path": "prepared", **extra}
        (inside / "config.yml").write_text(yaml.safe_dump(merged), encoding="utf-8")
        paths.append(inside / "config.yml")
    return paths


def _host_dataset(rows: Rows, folder: Path) -> Path:
    """A data set on disk as the host prepares it: tokens, and the columns that rows are known by."""
    tokens = np.zeros((len(rows), TOKENS), dtype=np.int32)
    columns = {name: rows.table[name].to_pylist() for name in rows.table.column_names}
    Dataset.from_dict({"input_ids": tokens, "labels": tokens, **columns}).save_to_disk(folder)
    return folder


def _scores(stored: Path, settings: Any) -> np.ndarray:
    """Reads rows, drops repeated ones, looks up and averages."""
    names = ["row_key", "conversation", "source", "row_number"]
    table = load_from_disk(stored).select_columns(names).with_format("arrow")[:]
    return synthetic.prepared(reference_rewards, Rows(table, {}).unique(), settings, RunContext("train")).columns[
        "reference_logp"
    ]


def _whole(stored: Path, settings: Any, policy: Path) -> Dataset:
    """The host room's own steps, from the host's data set to the one that is trained on."""
    room: Any = importlib.import_module("poft_plugin.hosts.axolotl.datasets")
    part = HostRows.of(load_from_disk(stored), "datasets")
    unique = part.rows.unique()
    found = synthetic.prepared(reference_rewards, unique, settings, RunContext("train"))
    cfg = DictDefault(base_model=str(policy), micro_batch_size=1)
    return room._finished(join_columns(part, unique, found), _Unranked(), cfg)


class _Unranked:
    """What attaching asks of a run of PoFT."""

    class method:  # noqa: N801
        ranked = False


if __name__ == "__main__":
    main()
