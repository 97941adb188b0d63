"""What a training run leaves in `output_dir/poft`, so that its model can be evaluated as it was trained.

run.json        method and settings, the model that training began with, and whether it ended
rows.parquet    row_key, evaluation: which rows were trained on, and which were set aside
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from pydantic import TypeAdapter
from transformers import TrainerCallback

from poft_plugin.data.columns import ROW_KEY
from poft_plugin.hosts.axolotl.run import MethodRun
from poft_plugin.scoring.cache import atomic_file

FOLDER, RUN_FILE, ROWS_FILE = "poft", "run.json", "rows.parquet"
START_KEYS = ("base_model", "base_model_config", "tokenizer_config", "revision_of_model")
"""The host's keys that name what training begins with."""

NOT_COMPARED = ("batch_tokens", "missing_scores", "score_cache")
"""Settings that change no number."""


@dataclass(frozen=True)
class RunRecord:
    """A training run.

    Args:
        rl: the method.
        settings: its block, as JSON.
        start: the host's keys of the model that training began with.
        adapter: the host's key, or None for full fine-tuning.
        split: the host's keys that say what is evaluated on, and the seed.
        finished: whether training came to its end.
    """

    rl: str
    settings: Mapping[str, Any]
    start: Mapping[str, str | None]
    adapter: str | None
    split: Mapping[str, Any]
    finished: bool = False

    @classmethod
    def of(cls, cfg: DictDefault, run: MethodRun) -> "RunRecord":
        """Of a run that is about to train."""
        start = {key: cfg[key] and str(cfg[key]) for key in START_KEYS}
        split = {"val_set_size": cfg.val_set_size, "seed": cfg.seed, "by": "row key"}
        return cls(run.method.name, compared_settings(run), start, cfg.adapter and str(cfg.adapter), split)

    def write(self, output_dir: Path) -> None:
        """Writes `run.json`, atomically."""
        folder = output_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False))


def compared_settings(run: MethodRun) -> dict[str, Any]:
    """The settings that a run's numbers depend on, as JSON."""
    blocks = {run.method.block: run.settings, "keys": run.keys, "inner": run.base_settings}
    return {
        name: {key: value for key, value in block.model_dump(mode="json").items() if key not in NOT_COMPARED}
        for name, block in blocks.items()
        if block is not None
    }


def read_record(output_dir: Path) -> RunRecord | None:
    """The record of the run that trained into a folder, or None.

    Raises:
        ValueError: if there is one that cannot be read, naming the file.
    """
    path = output_dir / FOLDER / RUN_FILE
    if not path.is_file():
        return None
    try:
        record = TypeAdapter(RunRecord).validate_json(path.read_bytes())
        if not record.start.get("base_model"):
            raise ValueError("it does not say what training began with")
        return record
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not the record of a training run ({reason}); train again, or restore it") from error


def read_rows(output_dir: Path) -> pa.Table:
    """The rows of that run.

    Raises:
        ValueError: if the file is not there or not readable, naming it.
    """
    path = output_dir / FOLDER / ROWS_FILE
    try:
        return pq.read_table(path, columns=[ROW_KEY, "evaluation"])
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not readable ({error}); train again, or restore it") from error


def write_rows(output_dir: Path, train: Dataset, evaluation: Dataset | None) -> None:
    """Writes `rows.parquet`, atomically: each key once for each set."""
    parts = [(train, False)] if evaluation is None else [(train, False), (evaluation, True)]
    tables = []
    for dataset, aside in parts:
        keys = pa.array(sorted(set(dataset[ROW_KEY])), pa.string())
        tables.append(pa.table({ROW_KEY: keys, "evaluation": pa.array([aside] * len(keys), pa.bool_())}))
    folder = output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / ROWS_FILE) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)


class RecordRun(TrainerCallback):
    """Writes the record when training begins, and once more when it has come to its end.

    Args:
        cfg: the host's config.
        run: the method.
        trainer: with its data sets.
    """

    def __init__(self, cfg: DictDefault, run: MethodRun, trainer: Any) -> None:
        self._output_dir, self._record = Path(cfg.output_dir), RunRecord.of(cfg, run)
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Writes both files, on the main process."""
        if state.is_world_process_zero:
            write_rows(self._output_dir, self._trainer.train_dataset, self._trainer.eval_dataset)
            self._record.write(self._output_dir)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Says that it ended."""
        if state.is_world_process_zero:
            replace(self._record, finished=True).write(self._output_dir)
