"""Which rows each stage scores, and that filters see no column of a later one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import numpy as np
import oracles
import pytest
import tiny
from axolotl.integrations.base import PluginManager

from poft_plugin import plugins
from poft_plugin.data.preparation import RunContext
from poft_plugin.hosts.axolotl.datasets import run_context
from poft_plugin.hosts.axolotl.stages import RunStages

PAIRS, HELD_OUT, TOP = 20, 4, 25.0
KEPT = oracles.ceil_percent(TOP, PAIRS - HELD_OUT)


def config(models: SimpleNamespace, folder: Path, **changes: Any) -> Path:
    rows = tiny.write_jsonl(folder / "data.jsonl", tiny.pair_rows(PAIRS, seed=3))
    settings: dict[str, Any] = {
        "base_model": str(models.policy),
        "datasets": [{"path": str(rows), "ds_type": "json", "type": "chat_template.default"}],
        "plugins": ["poft_plugin.PoftPlugin"],
        "rl": "deft_dpo",
        "deft": {"top_percent": TOP, "omega": 0, "score_cache": str(folder / "scores")},
        "val_set_size": HELD_OUT,
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": None,
    }
    return tiny.write_config(folder / "config.yml", **{**settings, **changes})


def stages(path: Path, purpose: Any = "train") -> tuple[RunStages, RunContext]:
    cfg = hosting.load_config(path)
    run = PluginManager.get_instance().plugins["poft_plugin.PoftPlugin"].method_run
    context = run_context(cfg, purpose)
    return RunStages(cfg, run, context), context


def test_the_start_policy_scores_what_is_kept(models: SimpleNamespace, tmp_path: Path) -> None:
    """Level A and the evaluation rows: not the pairs that nothing is trained on."""
    walked, _ = stages(config(models, tmp_path))
    assert [len(walked.first.jobs), len(walked.second.jobs)] == [0, 0]
    (asked,) = walked.third.jobs
    assert len(asked.job.rows) == 2 * (KEPT + HELD_OUT) < 2 * PAIRS
    (train, evaluation), _ = walked.kept
    assert (len(train.rows), len(evaluation.rows)) == (KEPT, HELD_OUT)
    sums = [list(part.rows.attached["reference_sum_logps"]) for part in (train, evaluation)]
    assert all(np.isfinite(row).all() and len(row) == 2 for part in sums for row in part)
    assert not asked.open().lookup(asked.cache).missing.any()
    (again,) = stages(config(models, tmp_path))[0].third.jobs
    assert again.job.rows.keys.to_pylist() == asked.job.rows.keys.to_pylist()


def test_before_grading_a_plan_counts_at_most(models: SimpleNamespace, tmp_path: Path) -> None:
    """Where the first stage lacks scores, the last one is known as far as every row goes."""
    grader = {"model": str(tiny.reward_model(tmp_path / "grader")), "dtype": "float32"}
    block = {"top_percent": TOP, "omega": 0, "reward_model": grader, "score_cache": str(tmp_path / "scores")}
    walked, _ = stages(config(models, tmp_path, deft=block))
    first, last = list(walked.planned())
    assert [len(asked.job.rows) for asked in first.stage.jobs] == [2 * (PAIRS - HELD_OUT)]
    assert (last.at_most, [len(asked.job.rows) for asked in last.stage.jobs]) == (True, [2 * PAIRS])
    _ = walked.graded  # scores the first stage
    done, _ = stages(config(models, tmp_path, deft=block))
    assert [len(planned.stage.jobs) for planned in done.planned()] == [1, 0, 1]
    last = list(done.planned())[-1]
    assert (last.at_most, len(last.stage.jobs[0].job.rows)) == (False, 2 * (KEPT + HELD_OUT))


def test_a_filter_of_a_later_column_is_refused_before_data_are_read(models: SimpleNamespace, tmp_path: Path) -> None:
    filters = [{"name": "keep_top_percent", "percent": 50, "column": "reference_sum_logps"}]
    message = (
        r"^row_filters: `keep_top_percent` reads the column 'reference_sum_logps', which `reference_sum_logps` makes"
    )
    with pytest.raises(ValueError, match=message):
        hosting.load_config(config(models, tmp_path, row_filters=filters))


def test_a_filter_that_looks_for_one_is_told_when_it_does(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lowest(rows: Any) -> np.ndarray:
        return np.array([row[0] < -3 for row in rows.attached["reference_sum_logps"]])

    monkeypatch.setitem(plugins.registry().row_filters, "lowest", lowest)
    walked, _ = stages(config(models, tmp_path, row_filters=[{"name": "lowest"}]))
    with pytest.raises(ValueError, match="`lowest` reads the column 'reference_sum_logps'.* it is not there yet"):
        _ = walked.kept
