"""The host's own training on a real Ray cluster: two workers of four rows train what one process of eight does.

Slow (a cluster, a driver, its scoring and two workers start): `pytest -m slow tests/distributed/test_ray.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
import torch

pytest.importorskip("ray", reason="the extra `ray` is not installed")
from distributed.test_distributed import BUDGET, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
HERE = Path(__file__).parent
STEPS = 3


def config(folder: Path, models: SimpleNamespace, method: dict[str, Any], **changes: Any) -> Path:
    """Relative names, as users write them: they mean the folder that the driver stands in."""
    tiny.write_jsonl(folder / "chats.jsonl", tiny.chat_rows(8, seed=5))
    tiny.write_jsonl(folder / "pairs.jsonl", tiny.pair_rows(8))
    settings: dict[str, Any] = {
        "base_model": str(models.policy),
        "plugins": ["poft_plugin.PoftPlugin", "noting.LogsPlugin"],
        "num_epochs": STEPS,
        "learning_rate": 3e-3,
        "dataset_prepared_path": "./prepared",
        **method,
        **changes,
    }
    return tiny.write_config(folder / "config.yml", **settings)


def on_ray(path: Path, workers: int, *without: str) -> subprocess.CompletedProcess[str]:
    """`axolotl train --use-ray` in a process of its own."""
    parts = [str(HERE.parents[1]), str(HERE), str(HERE.parent)]
    environment = {name: value for name, value in os.environ.items() if name not in without}
    return subprocess.run(
        [sys.executable, str(HERE / "on_ray.py"), str(path), str(workers)], cwd=path.parent, capture_output=True,
        text=True, check=False, timeout=900,
        env={**environment, "PYTHONPATH": os.pathsep.join(parts), "OMP_NUM_THREADS": "1", "AXOLOTL_LOG_LEVEL": "INFO"},
    )  # fmt: skip


def methods(models: SimpleNamespace) -> dict[str, dict[str, Any]]:
    deft = {"top_percent": 50, "bottom_percent": 25, "train_on": "all", "omega": 0.01}
    chats = {"path": "./chats.jsonl", "ds_type": "json", "type": "chat_template"}
    pairs = {"path": "./pairs.jsonl", "ds_type": "json", "type": "chat_template.default"}
    return {
        "poft": {"rl": "poft", "poft": {"references": [{"model": str(models.ref_a)}]}, "datasets": [chats]},
        "deft_dpo": {"rl": "deft_dpo", "deft": deft, "rl_beta": 0.3, "datasets": [pairs]},
    }


@pytest.mark.parametrize("name", ["poft", "deft_dpo"])
def test_two_workers_train_what_one_process_does(
    models: SimpleNamespace, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = methods(models)[name]
    path = config(tmp_path, models, method, micro_batch_size=4, output_dir="./ray")
    ran = on_ray(path, 2)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said[-8000:]
    assert said.index("scoring what is missing before Ray's workers start") < said.index("RayTrainWorker")
    scores = sorted((tmp_path / "poft_scores").rglob("*.parquet"))
    assert scores
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    hosting.train(config(tmp_path, models, method, micro_batch_size=8, output_dir="./alone"))
    assert sorted((tmp_path / "poft_scores").rglob("*.parquet")) == scores  # nothing was scored once more
    alone = json.loads((tmp_path / "alone/logs-0.json").read_text())
    for rank in (0, 1):
        found = json.loads((tmp_path / f"ray/logs-{rank}.json").read_text())
        assert found["world_size"] == 2
    found = json.loads((tmp_path / "ray/logs-0.json").read_text())
    theirs, ours = ([log for log in result["logs"] if "loss" in log] for result in (alone, found))
    assert len(theirs) == len(ours) == STEPS
    for one, other in zip(theirs, ours, strict=True):
        for metric in ("loss", "grad_norm"):
            print(name, metric, one[metric], other[metric])
            assert other[metric] == pytest.approx(one[metric], **BUDGET), metric
    saved = weights(tmp_path / "ray")
    for parameter, weight in weights(tmp_path / "alone").items():
        torch.testing.assert_close(saved[parameter], weight, rtol=1e-3, atol=2e-4)


def test_workers_that_do_not_know_of_each_other_are_refused(models: SimpleNamespace, tmp_path: Path) -> None:
    path = config(tmp_path, models, methods(models)["poft"], micro_batch_size=4, output_dir="./ray")
    ran = on_ray(path, 2, "ACCELERATE_USE_CPU")
    assert ran.returncode != 0
    assert "each would train a model of its own" in ran.stdout + ran.stderr
    assert not list((tmp_path / "ray").rglob("*.safetensors"))
