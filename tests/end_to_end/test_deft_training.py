"""Preference methods trained on the host: the step by hand, in every layout, against TRL, with one model in memory."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import oracles
import pytest
import tiny
import torch
from axolotl.integrations.base import BasePlugin
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

ROWS = 6
HELD_OUT = 2
OMEGA = 0.5
"""Large enough that a forgotten distribution reward is seen in the loss."""

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
LORA |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
PACKED = {"sample_packing": True, "sequence_len": 2048, "micro_batch_size": 1}
PAIRS = {"path": "pairs.jsonl", "ds_type": "json", "type": "chat_template.default"}
LISTS = {"path": "lists.jsonl", "ds_type": "json", "type": "poft_plugin.ranked"}
DEFT = {"top_percent": 50, "bottom_percent": 25, "train_on": "all", "omega": OMEGA, "sft_weight": 0.05}

VARIANTS: dict[str, dict[str, Any]] = {
    "deft_dpo pairs": {"rl": "deft_dpo", "datasets": [PAIRS], "rl_beta": 0.3},
    "deft_dpo pairs packed": {"rl": "deft_dpo", "datasets": [PAIRS], "rl_beta": 0.3, **PACKED},
    "deft_dpo pairs 2 x 3 lora": {"rl": "deft_dpo", "datasets": [PAIRS], "rl_beta": 0.3, "micro_batch_size": 2,
                                  "gradient_accumulation_steps": 3, **LORA},
    "deft_pro lists": {"rl": "deft_pro", "datasets": [LISTS], "deft": {**DEFT, "reward_over": "all"}},
    "deft_pro lists 1 x 6": {"rl": "deft_pro", "datasets": [LISTS], "micro_batch_size": 1,
                             "gradient_accumulation_steps": ROWS, "deft": {**DEFT, "reward_over": "all"}},
    "deft_pro lists packed": {"rl": "deft_pro", "datasets": [LISTS], "deft": {**DEFT, "reward_over": "all"}, **PACKED},
    "deft_pro lists lora": {"rl": "deft_pro", "datasets": [LISTS], "deft": {**DEFT, "reward_over": "all"}, **LORA},
    "deft_pro pairs by reward": {"rl": "deft_pro", "datasets": [PAIRS],
                                 "deft": {**DEFT, "rank_by": "reward", "pro_temperature": "reward"}},
    "deft_rrhf lists": {"rl": "deft_rrhf", "datasets": [LISTS], "deft": {**DEFT, "sft_weight": None}},
    "deft_rrhf pairs packed": {"rl": "deft_rrhf", "datasets": [PAIRS], "deft": {**DEFT, "sft_weight": None}, **PACKED},
    "deft_sft lists": {"rl": "deft_sft", "datasets": [LISTS], "deft": {**DEFT, "sft_weight": None}},
    "pro pairs": {"rl": "pro", "datasets": [PAIRS], "deft": None},
    "pro lists packed": {"rl": "pro", "datasets": [LISTS], "deft": None, **PACKED},
    "rrhf lists": {"rl": "rrhf", "datasets": [LISTS], "deft": {"sft_weight": 0.25}},
    "rrhf pairs": {"rl": "rrhf", "datasets": [PAIRS], "deft": {"sft_weight": 0.25}},
}  # fmt: skip
every_variant = pytest.mark.parametrize("name", VARIANTS)


def settings(folder: Path, models: SimpleNamespace, **changes: Any) -> Path:
    """A config in a folder that holds the two data sets."""
    for name, rows in (("pairs", tiny.pair_rows(ROWS + HELD_OUT)), ("lists", tiny.ranked_rows(ROWS + HELD_OUT))):
        if not (folder / f"{name}.jsonl").exists():
            tiny.write_jsonl(folder / f"{name}.jsonl", rows)
    defaults: dict[str, Any] = {
        "base_model": str(models.policy),
        "plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"],
        "deft": DEFT,
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "val_set_size": HELD_OUT,
        "eval_strategy": "epoch",
        "eval_batch_size": 2,
        "micro_batch_size": ROWS,
        "max_grad_norm": 0.0,
    }
    merged = {**defaults, **changes}
    merged["datasets"] = [{**entry, "path": str(folder / entry["path"])} for entry in merged["datasets"]]
    return tiny.write_config(folder / "config.yml", **merged)


@pytest.fixture(scope="module")
def runs(models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """Every variant, trained for one epoch: one optimizer step over all training rows."""
    folder = tmp_path_factory.mktemp("deft")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    found = {}
    for name, changes in VARIANTS.items():
        recording = hosting.train(settings(folder, models, output_dir=str(folder / name), **changes))
        saved = folder / name / "discrepancy.safetensors"
        discrepancy = load_file(saved)["discrepancy"] if saved.exists() else None
        found[name] = SimpleNamespace(recording=recording, trainer=recording.trainer, discrepancy=discrepancy)
    patch.undo()
    return found


def by_hand(run: SimpleNamespace, row: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """A sample's loss and its parts in float64, from the model's own logits, one unpadded sequence at a time."""
    method, keys = run.trainer.method_run, run.trainer.method_run.keys
    block = method.settings
    ids = torch.tensor(row["input_ids"]).split(row["sequence_lengths"])
    labels = torch.tensor(row["labels"]).split(row["sequence_lengths"])
    sums, means, rewards = [], [], []
    for tokens, counted in zip(ids, labels, strict=True):
        logits = model(tokens[None]).logits[0, :-1]
        kept = (counted[1:] != -100).nonzero().squeeze(-1)
        picked = oracles.model_token_logps(model(tokens[None]).logits[0], tokens)[kept]
        sums.append(picked.sum())
        means.append(float(picked.mean()))
        if run.discrepancy is not None:
            padded = torch.zeros(logits.shape[-1], dtype=torch.float64)
            padded[: len(run.discrepancy)] = run.discrepancy
            rewards.append(oracles.distribution_reward(logits[kept], padded))
    name, weight = method.method.loss, block.sft_weight
    if name == "pro":
        by_reward = row["scores"] if block.pro_temperature == "reward" else None
        weight = weight * (len(means) - 1) ** 2 if by_reward else weight
        base = oracles.pro_loss(means, ranks=row["ranks"], rewards=by_reward)
    elif name == "rrhf":
        base = oracles.rrhf_loss(means, ranks=row["ranks"])
    elif name == "dpo":
        base = oracles.dpo_loss("sigmoid", [float(v) for v in sums], row["reference_sum_logps"], keys.rl_beta)
    else:
        base = 0.0  # the best response's SFT loss alone, added below
    sft = -sums[0]
    loss = base + weight * sft
    parts = {f"{name}/loss": torch.tensor(base) if name != "sft" else sft, "sft/loss": sft}
    if rewards:
        reward = sum(rewards) / len(rewards) if block.reward_over == "all" else rewards[0]
        loss, parts["deft/distribution_reward"] = loss - block.omega * reward, reward
    return {"loss": loss, **parts}


@pytest.fixture(scope="module")
def start(models: SimpleNamespace) -> Any:
    return AutoModelForCausalLM.from_pretrained(models.policy).double().eval().requires_grad_(False)


@every_variant
def test_first_step_by_hand(runs: dict[str, SimpleNamespace], start: Any, name: str) -> None:
    run = runs[name]
    assert len(run.trainer.train_dataset) == ROWS
    assert run.trainer.state.global_step == 1
    assert (run.discrepancy is not None) == name.startswith("deft")
    samples = [by_hand(run, row, start) for row in run.trainer.train_dataset]
    log = run.recording.logs[0]
    for part in samples[0]:
        expected = float(torch.stack([sample[part].double() for sample in samples]).mean())
        assert log[part] == pytest.approx(expected, rel=1e-4, abs=1e-6), part


@pytest.mark.parametrize("name", [name for name in VARIANTS if "lora" not in name])
def test_evaluation_by_hand(runs: dict[str, SimpleNamespace], models: SimpleNamespace, name: str) -> None:
    """After the step, over the held-out rows; not of LoRA, whose adapter is in the trainer's model alone."""
    run = runs[name]
    model = AutoModelForCausalLM.from_pretrained(models.policy).double().eval().requires_grad_(False)
    model.load_state_dict({k: v.double() for k, v in run.trainer.model.state_dict().items()})
    rows = run.trainer.eval_dataset
    assert len(rows) == HELD_OUT
    samples = [by_hand(run, row, model) for row in rows]
    log = run.recording.evaluations[-1]
    for part in samples[0]:
        expected = float(torch.stack([sample[part].double() for sample in samples]).mean())
        assert log[f"eval_{part}"] == pytest.approx(expected, rel=1e-4, abs=1e-6), part
    assert {"eval_rewards/accuracies", "eval_rewards/margins"} <= log.keys()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("deft_dpo pairs", "deft_dpo pairs packed"),
        ("deft_pro lists", "deft_pro lists 1 x 6"),
        ("deft_pro lists", "deft_pro lists packed"),
    ],
)
def test_gradients_do_not_depend_on_the_layout(runs: dict[str, SimpleNamespace], name: str, other: str) -> None:
    expected, found = (runs[key].recording.gradients[0] for key in (name, other))
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert expected.keys() == found.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-3, atol=1e-5 * scale)
    ours = {k: v for k, v in runs[name].recording.logs[0].items() if k.partition("/")[0] in ("deft", "rewards", "sft")}
    if "dpo" in name:
        del ours["rewards/accuracies"]  # the policy is its own reference yet: rounding decides
    for metric, value in ours.items():
        assert runs[other].recording.logs[0][metric] == pytest.approx(value, rel=1e-4, abs=1e-5), metric


def test_a_pack_holds_whole_groups_that_see_themselves_alone(runs: dict[str, SimpleNamespace]) -> None:
    trainer = runs["deft_pro lists packed"].trainer
    (batch,) = list(trainer.get_train_dataloader())
    assert batch["input_ids"].shape[0] == 1
    lengths = {row["row_index"]: row["sequence_lengths"] for row in trainer.train_dataset}
    groups, index = batch["group_ids"], batch["row_index"].long()
    assert sorted(set(index.tolist())) == list(range(ROWS))
    for group in range(ROWS):
        members = (groups == group).nonzero().squeeze(-1)
        expected = lengths[int(index[members[0]])]
        tokens = [int((batch["sequence_ids"] == int(member)).sum()) for member in members]
        assert tokens == expected
        for member in members:
            positions = batch["position_ids"][batch["sequence_ids"] == int(member)]
            assert positions.tolist() == list(range(len(positions)))


def test_lora_trains_its_adapter_alone(runs: dict[str, SimpleNamespace]) -> None:
    for name in ("deft_dpo pairs 2 x 3 lora", "deft_pro lists lora"):
        names = runs[name].recording.gradients[0]
        assert names
        assert all("lora_" in parameter for parameter in names)


class CountingPlugin(BasePlugin):  # type: ignore[misc]
    """Notes which whole models are in memory while the policy trains."""

    seen: list[list[str]] = []  # noqa: RUF012

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [_Count(type(self).seen)]


class _Count(TrainerCallback):
    def __init__(self, seen: list[list[str]]) -> None:
        self._seen = seen

    def on_step_end(self, *_: Any, **__: Any) -> None:
        found = [value for value in gc.get_objects() if isinstance(value, PreTrainedModel)]
        self._seen.append(
            [type(value).__name__ for value in found if hasattr(value, "lm_head") or hasattr(value, "score")]
        )


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
def test_one_model_in_memory(
    models: SimpleNamespace, in_folder: Path, adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reward model and start policy are loaded, score, and are gone when the policy trains; cached, not even loaded."""
    from poft_plugin.scorers.reward_model import RewardModelScorer
    from poft_plugin.scorers.start_policy import StartPolicyScorer

    loaded: list[str] = []
    for scorer in (RewardModelScorer, StartPolicyScorer):
        original = scorer.load
        monkeypatch.setattr(
            scorer, "load", lambda self, device, o=original, n=scorer.__name__: (loaded.append(n), o(self, device))[1]
        )
    tiny.reward_model(in_folder / "grader")
    changes = {
        "rl": "deft_dpo", "datasets": [PAIRS], "deft": {**DEFT, "reward_model": {"model": str(in_folder / "grader")}},
        "plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin", f"{__name__}.CountingPlugin"], **adapter,
    }  # fmt: skip
    CountingPlugin.seen.clear()
    hosting.train(settings(in_folder, models, **changes))
    assert loaded == ["RewardModelScorer", "StartPolicyScorer"]
    assert CountingPlugin.seen == [["LlamaForCausalLM"]]
    hosting.train(settings(in_folder, models, **changes))
    assert loaded == ["RewardModelScorer", "StartPolicyScorer"]


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
def test_deft_dpo_without_deft_is_the_hosts_dpo(
    models: SimpleNamespace, in_folder: Path, adapter: dict[str, Any]
) -> None:
    """Step by step to 1e-5, after the same tokens in the same order."""
    plain = {"sft_weight": 0, "omega": 0, "train_on": "all"}
    changes = {"datasets": [PAIRS], "val_set_size": 0, "eval_strategy": "no", "micro_batch_size": 2, "num_epochs": 2,
               "rl_beta": 0.3, "chat_template": "tokenizer_default", **adapter}  # fmt: skip
    host = hosting.train(settings(in_folder, models, rl="dpo", deft=None, **changes))
    ours = hosting.train(settings(in_folder, models, rl="deft_dpo", deft=plain, **changes))
    assert len(host.trainer.train_dataset) == len(ours.trainer.train_dataset) == ROWS + HELD_OUT
    for theirs, row in zip(host.trainer.train_dataset, ours.trainer.train_dataset, strict=True):
        sequences = torch.tensor(row["input_ids"]).split(row["sequence_lengths"])
        labels = torch.tensor(row["labels"]).split(row["sequence_lengths"])
        for name, tokens, counted in zip(("chosen_ids", "rejected_ids"), sequences, labels, strict=True):
            completion = tokens[counted != -100].tolist()
            assert completion == theirs[name]
            assert tokens[: len(theirs["prompt_ids"]) + len(completion)].tolist() == theirs["prompt_ids"] + completion
    assert host.logs[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert len(host.logs) == len(ours.logs) == ROWS + HELD_OUT
    for theirs, log in zip(host.logs, ours.logs, strict=True):
        assert log["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert log["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert log[metric] == pytest.approx(theirs[metric], abs=1e-4), metric
