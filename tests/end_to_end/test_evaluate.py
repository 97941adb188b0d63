"""`axolotl evaluate`: the trained model, on the rows and against the reference that it was trained with."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
LORA |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
PAIRS = {"path": "pairs.jsonl", "ds_type": "json", "type": "chat_template.default"}
CHATS = {"path": "chats.jsonl", "ds_type": "json", "type": "chat_template"}
DEFT = {"top_percent": 50, "bottom_percent": 25, "omega": 0.01, "score_cache": "scores"}
RUNS: dict[str, dict[str, Any]] = {
    "poft": {"rl": "poft", "datasets": [CHATS], "sample_packing": True},
    "deft_dpo": {"rl": "deft_dpo", "datasets": [PAIRS], "deft": DEFT},
    "deft_dpo lora": {"rl": "deft_dpo", "datasets": [PAIRS], "deft": DEFT, **LORA},
}


def write(models: SimpleNamespace, run: dict[str, Any]) -> Path:
    """Data and config in the working folder; no seed."""
    tiny.write_jsonl(Path("pairs.jsonl"), tiny.pair_rows(10))
    tiny.write_jsonl(Path("chats.jsonl"), tiny.chat_rows(10))
    settings = {
        "base_model": str(models.policy), "plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"], "seed": None,
        "val_set_size": 3, "eval_strategy": "epoch", "eval_batch_size": 2, "micro_batch_size": 2, "output_dir": "./out",
        "dataset_prepared_path": "./prepared", "learning_rate": 3e-3, **run,
    }  # fmt: skip
    if run["rl"] == "poft":
        settings["poft"] = {"references": [{"model": str(models.ref_a)}], "score_cache": "scores"}
    return tiny.write_config(Path("config.yml"), **settings)


def evaluate(path: Path, **options: str) -> dict[str, tuple[str, str]]:
    """The command on a config; the table that it writes: training, validation."""
    from axolotl.cli import evaluate as command

    hosting.forget_plugins()
    command.do_cli(str(path), **options)
    with Path("out/eval_summary.csv").open() as file:
        return {row["metric"]: (row["training"], row["validation"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize("name", RUNS)
def test_the_trained_model_on_its_rows_against_its_reference(
    models: SimpleNamespace, in_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The numbers of the last evaluation of the training run, though the data lie in another order, prepared anew."""
    monkeypatch.setattr("sys.argv", ["axolotl"])
    path = write(models, RUNS[name])
    run = hosting.train(path)
    assert run.trainer.state.global_step >= 1
    record = json.loads(Path("out/poft/run.json").read_text())
    assert (record["rl"], record["start"]["base_model"]) == (RUNS[name]["rl"], str(models.policy))
    assert record["finished"]
    with pytest.raises(ValueError, match="not what was trained into out"):
        evaluate(path)
    for file in ("pairs.jsonl", "chats.jsonl"):
        Path(file).write_text("".join(reversed(Path(file).read_text().splitlines(keepends=True))))
    option = {"lora_model_dir": "out"} if "lora" in name else {"base_model": "./out/"}
    found = evaluate(path, **option)
    expected = run.evaluations[-1]
    compared = [key for key in expected if "loss" in key or "/" in key]
    assert len(compared) > 3
    for key in compared:
        if "per_second" not in key and "accuracies" not in key:
            assert float(found[key.removeprefix("eval_")][1]) == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
