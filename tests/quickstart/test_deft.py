"""The quickstart's second half: the host's DPO differs from DEFT-DPO where it has to, and logs are read rightly."""

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from quickstart import deft, report
from quickstart.preferences import KINDS
from quickstart.stage import SIZES

LOG = """
Reading preferences: 100%|██████████| 2000/2000 [00:00<00:00, 2027.63 examples/s]
 99%|█████████▉| 124/125 [01:00<00:00,  2.10it/s]{'loss': '0.69', 'epoch': '1'}
{'train_runtime': '61.5', 'train_loss': '0.68', 'epoch': '1'}
100%|██████████| 125/125 [01:01<00:00,  2.03it/s]
Writing model shards: 100%|██████████| 1/1 [00:00<00:00, 93.85it/s]
"""


def test_dpo_differs_from_deft_by_the_method_and_its_learning_rate_alone() -> None:
    ours, plain = yaml.safe_load(deft.DEFT_CONFIG.read_text()), deft.dpo_settings()
    assert set(ours) - set(plain) == {"plugins", "deft"}
    assert set(plain) <= set(ours)
    assert {key for key in plain if plain[key] != ours[key]} == {"rl", "learning_rate", "output_dir"}
    assert (ours["rl"], plain["rl"]) == ("deft_dpo", "dpo")


def test_the_config_names_what_the_quickstart_makes() -> None:
    settings = yaml.safe_load(deft.DEFT_CONFIG.read_text())
    found = {
        settings["base_model"]: deft.WORK / "sft",
        settings["deft"]["reward_model"]["model"]: deft.WORK / "reward_train",
        settings["datasets"][0]["path"]: deft.PAIRS_FILE,
        settings["output_dir"]: deft.WORK / "deft_dpo",
    }
    for written, made in found.items():
        assert deft.ROOT / written == made
    assert {"reward_train", "reward_eval"} == set(deft.REWARD_MODELS)
    assert SIZES["preference"] > deft.PAIRS


def test_steps_and_seconds_come_from_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dpo.log").write_text(LOG.replace("\n", "\r"))
    monkeypatch.setattr(deft, "log_file", lambda name: tmp_path / f"{name}.log")
    assert deft.training("dpo") == {"steps": 125, "loop_seconds": 61.5}


def test_rows_trained_on_come_from_the_summary_of_the_run(tmp_path: Path) -> None:
    groups = [{"level_a": 20, "level_a_lost": 0}, {"level_a": 7, "level_a_lost": 2}]
    (tmp_path / "grading.json").write_text(json.dumps({"groups": groups}))
    assert deft.level_a_rows(tmp_path) == 20 + 7 - 2


def test_table_shows_every_figure() -> None:
    run = {"rows": 1234, "steps": 56, "seconds": 78.0, "loop_seconds": 9.5}
    quality = {"reward_eval": 0.111, "reward_train": 0.222, "exact_match": 0.333}
    found = {
        "quality": dict.fromkeys(("sft", "dpo", "deft_dpo"), quality),
        "training": dict.fromkeys(("dpo", "deft_dpo"), run),
        "pairs": {level: dict.fromkeys(KINDS, 5) for level in "ABC"},
        "reward_model_accuracy": {"reward_train": 0.987, "reward_eval": 0.976},
    }
    console = Console(width=160, file=io.StringIO())
    console.print(report.preference_table(found))
    text = console.file.getvalue()
    for number, times in {"1,234": 2, "56": 2, "78": 2, "9.5": 2, "0.111": 3, "0.222": 3, "0.333": 3}.items():
        assert text.count(f" {number} ") == times
    assert "15 right, 15 poor, 15 mislabelled; of level A: 5 right, 5 poor, 5 mislabelled" in " ".join(text.split())
