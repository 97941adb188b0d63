"""`share_prompt: true` on the host: the packed run without it, from fewer tokens."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
import torch

from poft_plugin.attention.packed import packed_attention

ROWS, HELD_OUT, STEPS = 8, 2, 3
DEFT = {"top_percent": 50, "bottom_percent": 25, "train_on": "all", "omega": 0.5}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "lora_dropout": 0.0}
LORA |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
PAIRS, LISTS = "chat_template.default", "poft_plugin.ranked"
METHODS: dict[str, dict[str, Any]] = {
    "deft_dpo": {"rl": "deft_dpo", "type": PAIRS, "rl_beta": 0.3},
    "deft_pro": {"rl": "deft_pro", "type": LISTS, "reward_over": "all"},
    "deft_dpo lora": {"rl": "deft_dpo", "type": PAIRS, **LORA, "learning_rate": 1.0},
    "pro checkpointed": {"rl": "pro", "type": LISTS, "gradient_checkpointing": True},
}
every_method = pytest.mark.parametrize("name", METHODS)


def long_prompts(kind: str) -> list[dict[str, Any]]:
    """Rows of which most tokens are prompt."""
    rows = tiny.pair_rows(ROWS + HELD_OUT) if kind == PAIRS else tiny.ranked_rows(ROWS + HELD_OUT)
    for number, row in enumerate(rows):
        words = " ".join(tiny.WORDS[: 5 + number])
        if kind == PAIRS:
            row["messages"][0]["content"] += words
        else:
            row["prompt"] += words
    return rows


def settings(folder: Path, models: SimpleNamespace, *, share: bool, **changes: Any) -> Path:
    """A config in which one pack holds all rows, so that a step is an epoch."""
    kind = changes.pop("type")
    block = {} if changes["rl"] in ("pro", "rrhf") else dict(DEFT)
    block |= {key: changes.pop(key) for key in ("reward_over",) if key in changes}
    data = tiny.write_jsonl(folder / "rows.jsonl", long_prompts(kind))
    defaults: dict[str, Any] = {
        "base_model": str(models.policy),
        "plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"],
        "datasets": [{"path": str(data), "ds_type": "json", "type": kind}],
        "deft": {**block, "share_prompt": share},
        "sample_packing": True,
        "sequence_len": 2048,
        "num_epochs": STEPS,
        "optimizer": "sgd",
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "val_set_size": HELD_OUT,
        "eval_strategy": "epoch",
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
    }
    return tiny.write_config(folder / "config.yml", **{**defaults, **changes})


@pytest.fixture(scope="module")
def runs(
    models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[bool, SimpleNamespace]]:
    """Each method, packed as ever (False) and with shared prompts (True)."""
    found: dict[str, dict[bool, SimpleNamespace]] = {}

    def trained(name: str) -> dict[bool, SimpleNamespace]:
        if name not in found:
            folder = tmp_path_factory.mktemp("shared")
            found[name] = {}
            for share in (False, True):
                path = settings(folder, models, share=share, **METHODS[name])
                found[name][share] = hosting.train(path)
        return found[name]

    return trained


@every_method
def test_losses_and_weights_are_those_of_the_packed_run(runs: Any, name: str) -> None:
    packed, shared = runs(name)[False], runs(name)[True]
    assert len(packed.logs) == len(shared.logs) == STEPS
    for logs in ("logs", "evaluations"):
        for expected, found in zip(getattr(packed, logs), getattr(shared, logs), strict=True):
            parts = [key for key in expected if key == "loss" or key.endswith("_loss") or "/" in key]
            parts = [key for key in parts if "accuracies" not in key and "token" not in key and "mem" not in key]
            assert parts
            for part in parts:
                assert found[part] == pytest.approx(expected[part], rel=1e-4, abs=1e-5), part
    for expected, found in zip(packed.gradients, shared.gradients, strict=True):
        scale = max(float(gradient.abs().max()) for gradient in expected.values())
        assert expected.keys() == found.keys()
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-3, atol=1e-5 * scale)
    assert shared.trainer.model.is_gradient_checkpointing == ("checkpointed" in name)
    ours = dict(shared.trainer.model.named_parameters())
    moved = {key: (p.detach() - packed.initial[key]).abs().max() for key, p in packed.trainer.model.named_parameters()}
    far = float(max(moved.values()))
    assert far > 0
    for parameter, weight in packed.trainer.model.named_parameters():
        torch.testing.assert_close(ours[parameter], weight, rtol=1e-6, atol=1e-4 * far, msg=parameter)


def sequences(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each response with its prompt, whose length the response's first position is."""
    found, begin = [], 0
    for length in row["sequence_lengths"]:
        prompt = row["position_ids"][begin]
        found.append(tuple(row[name][:prompt] + row[name][begin : begin + length] for name in ("input_ids", "labels")))
        begin += length
    return found


@every_method
def test_the_same_sequences_from_fewer_tokens(runs: Any, name: str) -> None:
    """Row by row what the packed run reads, with a prompt that is not repeated; evaluation rows stay whole."""
    packed, shared = (runs(name)[share].trainer for share in (False, True))
    fewer = 0
    for whole, row in zip(packed.train_dataset, shared.train_dataset, strict=True):
        assert sequences(row) == sequences(whole)
        lengths, left = whole["sequence_lengths"], row["sequence_lengths"]
        prompt = min(place for _, labels in sequences(whole) for place, label in enumerate(labels) if label != -100)
        assert left == [lengths[0], *(length - prompt for length in lengths[1:])], "all of the prompt"
        assert row["length"] == len(row["input_ids"]) == sum(left)
        fewer += prompt * (len(lengths) - 1)
    read = [
        sum(int((batch["sequence_ids"] >= 0).sum()) for batch in t.get_train_dataloader()) for t in (packed, shared)
    ]
    assert read[1] == read[0] - fewer
    assert read[1] < 0.75 * read[0]
    assert packed.eval_dataset[:] == shared.eval_dataset[:]


def test_fewer_packs_hold_the_same_rows(models: SimpleNamespace, in_folder: Path) -> None:
    """The host fills its packs by the tokens that lie there; whatever it does, each of them is padded to one length."""
    packs, rows = {}, {}
    for share in (False, True):
        changes = {"sequence_len": 320, "val_set_size": 0, "eval_strategy": "no", "max_steps": 1}
        trainer = hosting.train(settings(in_folder, models, share=share, rl="pro", type=LISTS, **changes)).trainer
        batches = list(trainer.get_train_dataloader())
        packs[share] = len(batches)
        rows[share] = sorted(index for batch in batches for index in batch["row_index"].tolist())
        assert all(batch["input_ids"].shape == (1, 320) for batch in batches)
        assert all(batch.get("attention_mask") is None for batch in batches)
    assert rows[True] == rows[False]
    assert packs[True] < packs[False]


def test_a_model_that_cannot_is_refused_before_its_first_step(
    models: SimpleNamespace, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one whose attention takes each run of a pack for a whole sequence."""
    monkeypatch.setattr("poft_plugin.attention.shared.shared_attention", packed_attention)
    path = settings(in_folder, models, share=True, rl="rrhf", type=LISTS, val_set_size=0, eval_strategy="no")
    with pytest.raises(ValueError, match=r"share_prompt: true: LlamaForCausalLM gives .* set `share_prompt: false`"):
        hosting.train(path)
