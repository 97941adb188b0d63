"""Packing, micro-batches and accumulation change speed, not the step: its loss and gradients agree."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
import torch

ROWS = 8
VARIANTS: dict[str, dict[str, Any]] = {
    "8 x 1": {"micro_batch_size": 8, "gradient_accumulation_steps": 1},
    "1 x 8": {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
    "3 x 3": {"micro_batch_size": 3, "gradient_accumulation_steps": 3},
    "one pack": {"sample_packing": True, "sequence_len": 1024},
    "short packs": {"sample_packing": True, "sequence_len": 128, "gradient_accumulation_steps": 8},
    "batch of packs": {"sample_packing": True, "sequence_len": 128, "micro_batch_size": 8},
}


@pytest.fixture(scope="module")
def runs(models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, hosting.Recording]:
    """The same eight rows trained for one epoch, which is one optimizer step in every variant."""
    folder = tmp_path_factory.mktemp("equal")
    tiny.write_jsonl(folder / "data.jsonl", tiny.chat_rows(ROWS, seed=5))
    recordings = {}
    for name, settings in VARIANTS.items():
        config = tiny.write_config(
            folder / "config.yml",
            base_model=str(models.policy),
            datasets=[{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": "chat_template"}],
            plugins=["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"],
            rl="poft",
            poft={"references": [{"model": str(models.ref_a)}, {"model": str(models.ref_b)}],
                  "score_cache": str(folder / "scores")},
            output_dir=str(folder / "out"),
            dataset_prepared_path=str(folder / f"prepared {name}"),
            max_grad_norm=0.0,
            **settings,
        )  # fmt: skip
        recordings[name] = hosting.train(config)
    return recordings


def by_hand(runs: dict[str, hosting.Recording], models: SimpleNamespace, folder: Path) -> float:
    """Mean of per-sample losses from the policy's own logits, one row at a time, in float64."""
    from transformers import AutoModelForCausalLM

    trainer = runs["8 x 1"].trainer
    model = AutoModelForCausalLM.from_pretrained(models.policy).double()
    losses = []
    for row in trainer.train_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logps = model(ids).logits[0, :-1].log_softmax(-1)
        picked = [logps[t - 1, labels[t]] for t in range(1, len(labels)) if labels[t] != -100]
        reward = torch.stack(picked).mean()
        losses.append(-torch.nn.functional.logsigmoid(reward - row["reference_logp"]))
    return float(torch.stack(losses).mean())


def test_the_step_is_the_mean_over_samples(
    runs: dict[str, hosting.Recording], models: SimpleNamespace, tmp_path: Path
) -> None:
    expected = by_hand(runs, models, tmp_path)
    for name, run in runs.items():
        assert run.trainer.state.global_step == 1, name
        assert run.logs[0]["loss"] == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "8 x 1"])
def test_gradients_agree_to_float32_rounding(runs: dict[str, hosting.Recording], name: str) -> None:
    expected, found = runs["8 x 1"].gradients[0], runs[name].gradients[0]
    assert expected.keys() == found.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for parameter, gradient in expected.items():
        torch.testing.assert_close(
            found[parameter], gradient, rtol=1e-3, atol=1e-5 * scale, msg=lambda m: f"{name} {m}"
        )


def test_metrics_do_not_depend_on_the_layout(runs: dict[str, hosting.Recording]) -> None:
    names = [key for key in runs["8 x 1"].logs[0] if key.startswith("poft/")]
    assert {"poft/policy_reward", "poft/coefficient", "poft/coefficient_std", "poft/win_rate", "poft/ce_loss"} <= {
        *names
    }
    for run in runs.values():
        for name in names:
            assert run.logs[0][name] == pytest.approx(runs["8 x 1"].logs[0][name], rel=1e-4, abs=1e-6)


def test_the_hosts_perplexity_is_gone_and_its_own_numbers_are_there(runs: dict[str, hosting.Recording]) -> None:
    log = runs["one pack"].logs[0]
    assert "ppl" not in log
    assert {"learning_rate", "grad_norm", "epoch"} <= log.keys()


def test_packs_are_really_packed(runs: dict[str, hosting.Recording]) -> None:
    loader = runs["one pack"].trainer.get_train_dataloader()
    batch = next(iter(loader))
    assert batch["input_ids"].shape[0] == 1
    assert int(batch["group_ids"].max()) + 1 == ROWS
    restarts = (batch["position_ids"][0] == 0) & (batch["sequence_ids"][0] >= 0)
    assert int(restarts.sum()) == ROWS
