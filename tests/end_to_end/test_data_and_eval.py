"""Prepared folders, filters, evaluation and metrics, on the host, one process."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROWS = tiny.chat_rows(11, seed=8)


def config(models: SimpleNamespace, folder: Path, **settings: Any) -> Path:
    poft = {"references": [{"model": str(models.ref_a)}, {"model": str(models.ref_b)}],
            "score_cache": str(folder / "scores")}  # fmt: skip
    if not (folder / "data.jsonl").exists():
        tiny.write_jsonl(folder / "data.jsonl", ROWS)
    defaults: dict[str, Any] = {
        "base_model": str(models.policy),
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"],
        "rl": "poft",
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
    }
    poft |= settings.pop("poft", {})
    merged = {**defaults, **settings}
    if merged["rl"] == "poft":
        merged["poft"] = poft
    return tiny.write_config(folder / "config.yml", **merged)


def trained_texts(run: hosting.Recording) -> set[str]:
    tokenizer = run.trainer.processing_class
    return {tokenizer.decode(row["input_ids"]) for row in run.trainer.train_dataset}


def test_one_prepared_folder_serves_sft_poft_and_an_edited_row(models: SimpleNamespace, tmp_path: Path) -> None:
    sft = hosting.train(config(models, tmp_path, rl=None))
    assert "poft/coefficient" not in sft.logs[0]
    assert "reference_logp" not in sft.trainer.train_dataset.column_names
    poft = hosting.train(config(models, tmp_path))
    assert "poft/coefficient" in poft.logs[0]
    assert trained_texts(poft) == trained_texts(sft)
    edited = json.loads(json.dumps(ROWS))
    edited[4]["messages"][1]["content"] = "edited answer"
    tiny.write_jsonl(tmp_path / "data.jsonl", edited)
    again = hosting.train(config(models, tmp_path))
    assert len(trained_texts(again) - trained_texts(poft)) == 1
    assert any("edited answer" in text for text in trained_texts(again))


@pytest.mark.parametrize("packing", [False, True])
def test_epochs_are_right_after_a_filter(models: SimpleNamespace, tmp_path: Path, packing: bool) -> None:
    """ceil(40 % of 11) = 5 rows, 3 epochs, 2 rows a step: 3 steps an epoch unpacked, one pack a step packed."""
    settings = {"sample_packing": True} if packing else {"micro_batch_size": 2}
    run = hosting.train(config(models, tmp_path, num_epochs=3, poft={"keep_top_percent": 40}, **settings))
    kept = run.trainer.train_dataset
    assert len(kept) == 5
    assert run.trainer.state.global_step == (3 if packing else 9)
    assert run.trainer.state.epoch == pytest.approx(3.0)
    everything = hosting.train(config(models, tmp_path, max_steps=1, **settings))
    scores = sorted(everything.trainer.train_dataset["reference_logp"], reverse=True)
    assert sorted(kept["reference_logp"], reverse=True) == pytest.approx(scores[:5])


def evaluate_by_hand(run: hosting.Recording, policy: Path) -> dict[str, float]:
    """eval_loss and policy reward from the start checkpoint's own logits, row by row, float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy).double().eval()
    losses, rewards = [], []
    for row in run.trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1)
        picked = [logps[t - 1, labels[t]] for t in range(1, len(labels)) if labels[t] != -100]
        rewards.append(torch.stack(picked).mean())
        losses.append(-torch.nn.functional.logsigmoid(rewards[-1] - row["reference_logp"]))
    return {
        "eval_loss": float(sum(losses)) / len(losses),
        "eval_poft/policy_reward": float(sum(rewards)) / len(rewards),
    }


@pytest.mark.parametrize("settings", [{"eval_batch_size": 1}, {"eval_batch_size": 4, "sample_packing": True}])
def test_eval_loss_is_a_mean_over_every_row(models: SimpleNamespace, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Seven evaluation rows in batches of four: the last three are not lost."""
    tiny.write_jsonl(tmp_path / "test.jsonl", tiny.chat_rows(7, seed=77))
    test = [{"path": str(tmp_path / "test.jsonl"), "ds_type": "json", "type": "chat_template", "split": "train"}]
    path = config(models, tmp_path, test_datasets=test, eval_steps=1, max_steps=1, learning_rate=1e-12, **settings)
    run = hosting.train(path)
    assert len(run.trainer.eval_dataset) == 7
    found, expected = run.evaluations[-1], evaluate_by_hand(run, models.policy)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    assert "eval_ppl" not in found
    assert {"eval_poft/coefficient", "eval_poft/coefficient_std", "eval_poft/win_rate", "eval_poft/ce_loss"} <= {*found}


def test_val_set_size_rows_are_scored_and_never_filtered(models: SimpleNamespace, tmp_path: Path) -> None:
    logging = {"use_tensorboard": True, "include_tkps": True}
    run = hosting.train(
        config(models, tmp_path, val_set_size=3, eval_steps=1, max_steps=1, poft={"keep_top_percent": 25}, **logging)
    )
    assert len(run.trainer.eval_dataset) == 3
    assert len(run.trainer.train_dataset) == 2
    assert "eval_loss" in run.evaluations[-1]
    statistics = run.trainer.state.log_history[0]
    assert "poft/reference/ref_a/data.jsonl/mean" in statistics
    assert "poft/reference_correlation/ref_a/ref_b" in statistics
    assert run.logs[0]["tokens/trainable"] > 0  # the host's own counting goes on
    events = EventAccumulator(str(next((tmp_path / "out").rglob("events.out.tfevents.*")).parent)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/poft/coefficient", "eval/poft/coefficient", "train/learning_rate", "train/loss"} <= tags
    assert any(tag.endswith("poft/reference/ref_a/data.jsonl/mean") for tag in tags)


def test_exact_deduplication_still_finds_equal_rows(models: SimpleNamespace, tmp_path: Path) -> None:
    """Equal rows within an entry and across entries: our own columns must not tell them apart."""
    tiny.write_jsonl(tmp_path / "data.jsonl", [*ROWS[:4], ROWS[0]])
    tiny.write_jsonl(tmp_path / "more.jsonl", [ROWS[1], ROWS[5]])
    entries = [
        {"path": str(tmp_path / n), "ds_type": "json", "type": "chat_template"} for n in ("data.jsonl", "more.jsonl")
    ]
    settings = {"datasets": entries, "max_steps": 1}
    assert len(hosting.train(config(models, tmp_path, **settings)).trainer.train_dataset) == 7
    once = hosting.train(config(models, tmp_path, dataset_exact_deduplication=True, **settings))
    assert len(once.trainer.train_dataset) == 5


def test_preprocess_then_train_loads_no_reference(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from poft_plugin.scorers.causal_lm import CausalLMScorer

    path = config(models, tmp_path, sample_packing=True, max_steps=1, poft={"missing_scores": "error"})
    hosting.preprocess(path, monkeypatch)
    monkeypatch.setattr(CausalLMScorer, "load", lambda *_: pytest.fail("a reference was loaded"))
    assert hosting.train(path).trainer.state.global_step == 1


def test_lora(models: SimpleNamespace, tmp_path: Path) -> None:
    no_gpu_kernels = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
    run = hosting.train(config(models, tmp_path, max_steps=2, **lora, **no_gpu_kernels))
    assert run.logs[-1]["grad_norm"] > 0
    assert all("lora_" in name for name in run.gradients[0])


def test_a_reference_that_is_not_there_is_told_before_data_are_read(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "poft_plugin.hosts.axolotl.host_rows.load_host_datasets", lambda **_: pytest.fail("data were read first")
    )
    with pytest.raises(ValueError, match=r"reference ./gone: no such folder.*Correct `model:`"):
        hosting.train(config(models, tmp_path, poft={"references": [{"model": "./gone"}]}))


def test_packing_without_isolation_is_refused(models: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample_packing: true with attn_implementation: None"):
        hosting.train(config(models, tmp_path, sample_packing=True, attn_implementation=None))
