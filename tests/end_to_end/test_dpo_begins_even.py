"""`deft_dpo` begins at ln 2 exactly, whatever dropout its policy has; pairs of equal rank stay there, counted."""

import re
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PhiConfig, PreTrainedConfig

from poft_plugin.hosts.axolotl import ranked_datasets

SIZES: dict[str, Any] = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
CONFIGS: dict[str, PreTrainedConfig] = {
    "functions": OPTConfig(**SIZES, **LAYERS, ffn_dim=64, word_embed_proj_dim=32, dropout=0.1, init_std=0.3),
    "attention": LlamaConfig(**SIZES, **LAYERS, intermediate_size=64, attention_dropout=0.3, initializer_range=0.3),
    "modules": PhiConfig(
        **SIZES, **LAYERS, intermediate_size=64, resid_pdrop=0.1, embd_pdrop=0.1, initializer_range=0.3
    ),
}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "lora_dropout": 0.5}
LORA |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
LISTS, PAIRS = {"type": "poft_plugin.ranked"}, {"type": "chat_template.default"}
STEPS = 3


def config(folder: Path, policy: Path, rows: list[dict[str, Any]], entry: dict[str, Any], **changes: Any) -> Path:
    """DPO and nothing else, on all rows in every step."""
    path = tiny.write_jsonl(folder / "rows.jsonl", rows)
    settings: dict[str, Any] = {
        "base_model": str(policy), "plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"],
        "rl": "deft_dpo", "datasets": [{"path": str(path), "ds_type": "json", **entry}],
        "micro_batch_size": len(rows), "num_epochs": STEPS, "learning_rate": 1e-2,
        "output_dir": str(folder / "out"), "dataset_prepared_path": str(folder / "prepared"), **changes,
    }  # fmt: skip
    inside = {"train_on": "all", "omega": 0} if settings["rl"].startswith("deft") else {}
    deft = {"sft_weight": 0, "score_cache": str(folder / "scores")}
    settings["deft"] = {**deft, **inside, **changes.get("deft", {})}
    return tiny.write_config(folder / "config.yml", **settings)


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without scores."""
    return [{name: value for name, value in row.items() if name != "scores"} for row in rows]


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_first_loss_is_ln_2(tmp_path: Path, kind: str, adapter: dict[str, Any]) -> None:
    """The reference is scored without dropout, so is the policy trained: it is its own reference until it moves."""
    policy = tiny.policy(tmp_path / "policy")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(policy)
    first, *later = hosting.train(config(tmp_path, policy, plain(tiny.pair_rows(4)), PAIRS, **adapter)).logs
    assert first["dpo/loss"] == pytest.approx(log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0, abs=1e-5), name
    assert all(entry["dpo/loss"] < log(2) - 1e-3 for entry in later)


def tied(count: int, *, of: int) -> list[dict[str, Any]]:
    """Pairs, the last ones of equal scores."""
    rows = tiny.pair_rows(of)
    return [row if number < of - count else {**row, "scores": [1.0, 1.0]} for number, row in enumerate(rows)]


def as_lists(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same pairs as ranked lists."""
    return [
        {"messages": row["messages"], "responses": [row["chosen"]["content"], row["rejected"]], "scores": row["scores"]}
        for row in rows
    ]


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of rows."""
    lines: list[str] = []
    monkeypatch.setattr(ranked_datasets.LOG, "warning", lines.append)
    return lines


@pytest.mark.parametrize("layout", ["lists", "by reward", "by reward, packed"])
def test_pairs_of_equal_rank_teach_nothing(
    models: SimpleNamespace, tmp_path: Path, warned: list[str], layout: str
) -> None:
    rows = tied(4, of=4)
    changes = {"sample_packing": True, "micro_batch_size": 1} if "packed" in layout else {}
    path = (
        config(tmp_path, models.policy, as_lists(rows), LISTS)
        if layout == "lists"
        else config(tmp_path, models.policy, rows, PAIRS, deft={"rank_by": "reward"}, **changes)
    )
    run = hosting.train(path)
    assert [entry["dpo/loss"] for entry in run.logs] == pytest.approx([log(2)] * STEPS, abs=1e-6)
    assert all(torch.equal(weight, run.initial[name]) for name, weight in run.trainer.model.named_parameters())
    assert len(warned) == 1
    assert warned[0].startswith("4 of 4 rows to train on have responses of equal rank alone")


def test_tied_rows_are_counted_and_the_first_is_named(
    models: SimpleNamespace, tmp_path: Path, warned: list[str]
) -> None:
    """The others are trained on."""
    run = hosting.train(config(tmp_path, models.policy, as_lists(tied(2, of=5)), LISTS))
    assert run.logs[-1]["dpo/loss"] < log(2) - 1e-3
    assert len(warned) == 1
    assert warned[0].startswith("2 of 5 rows to train on")
    assert re.search(r"\(the first: rows\.jsonl row [34] \(key [0-9a-f]{32}\)\)", warned[0])


def test_nothing_is_said_where_no_row_is_tied(models: SimpleNamespace, tmp_path: Path, warned: list[str]) -> None:
    three = [{"prompt": f"{n}?", "responses": ["a", "b", "c"], "scores": [1, 1, 0]} for n in range(4)]
    hosting.train(config(tmp_path, models.policy, three, LISTS, rl="pro"))
    assert warned == []
