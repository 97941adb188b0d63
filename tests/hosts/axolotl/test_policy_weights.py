"""A policy's checkpoint that does not fill it is refused by the host's commands; complete ones of any form are not."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from poft_plugin.hosts.axolotl import policy

WEIGHTS = "model.safetensors"


def config(folder: Path, models: SimpleNamespace, base_model: Path, **settings: Any) -> Path:
    """A config of `rl: poft` with this policy."""
    return tiny.poft_config(models, folder, base_model=str(base_model), **settings)


def lacking(source: Path, folder: Path, prefix: str = "", part: str = "") -> Path:
    """A copy of a checkpoint with a prefix before all names, or without those with a part."""
    shutil.copytree(source, folder)
    weights = {prefix + name: w for name, w in load_file(folder / WEIGHTS).items() if not part or part not in name}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part": ".layers.1."}, r"lacks 9 weights, model\.layers\.1\.input_layernorm\.weight"),
        ({"prefix": "module."}, r"lacks 21 weights, lm_head\.weight.*without the prefix 'module\.'"),
    ],
)
@pytest.mark.parametrize("command", ["preprocess", "train"])
def test_an_incomplete_policy_is_refused_before_anything_is_scored(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str,
    command: str,
) -> None:  # fmt: skip
    path = config(tmp_path, models, lacking(models.policy, tmp_path / "x", **change))
    with pytest.raises(ValueError, match=rf"base_model .*x: its checkpoint {message}"):
        hosting.train(path) if command == "train" else hosting.preprocess(path, monkeypatch)
    assert not (tmp_path / "scores").exists()


def checked(folder: Path, models: SimpleNamespace, base_model: Path, **settings: Any) -> None:
    policy.check_policy_weights(hosting.load_config(config(folder, models, base_model, **settings)), train=True)


def test_a_damaged_shard_of_the_policy_is_named(models: SimpleNamespace, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.policy, tmp_path / "x"))
    (folder / WEIGHTS).unlink()
    AutoModelForCausalLM.from_pretrained(models.policy).save_pretrained(folder, max_shard_size="60KB")
    checked(tmp_path, models, folder)
    second = sorted(folder.glob("model-*.safetensors"))[1]
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"^base_model .*x: its weights cannot be loaded.*{second.name} is cut off"):
        checked(tmp_path, models, folder)
    second.unlink()
    with pytest.raises(ValueError, match=rf"^base_model .*x: .*{second.name} is not there \(\d+ weights, \S+weight"):
        checked(tmp_path, models, folder)


def test_policies_that_are_complete(models: SimpleNamespace, tmp_path: Path) -> None:
    """Tied embeddings, PyTorch's own file, and the prefix that transformers itself takes off."""
    tied = lacking(models.policy, tmp_path / "tied", part="lm_head")
    stored = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**stored, "tie_word_embeddings": True}))
    binary = Path(shutil.copytree(models.policy, tmp_path / "binary"))
    torch.save(load_file(binary / WEIGHTS), binary / "pytorch_model.bin")
    (binary / WEIGHTS).unlink()
    for folder in (models.policy, tied, binary, lacking(models.policy, tmp_path / "prefixed", prefix="model.")):
        checked(tmp_path, models, folder)


def test_a_random_policy_that_was_asked_for_is_left_alone(models: SimpleNamespace, tmp_path: Path) -> None:
    folder = lacking(models.policy, tmp_path / "x", part=".layers.1.")
    checked(tmp_path, models, folder, reinit_weights=True)
    with pytest.raises(ValueError, match="lacks 9 weights"):
        checked(tmp_path, models, folder)


@pytest.mark.parametrize(("attention", "warns"), [("sdpa", True), ("eager", False)])
def test_a_policy_whose_attention_drops_its_soft_cap_is_said(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str, warns: bool
) -> None:
    folder = tiny.policy(tmp_path / "x")
    sizes: dict[str, Any] = {
        "vocab_size": 400, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 2, "final_logit_softcapping": None,
    }  # fmt: skip
    Gemma2ForCausalLM(Gemma2Config(**sizes)).save_pretrained(folder)
    warnings: list[str] = []
    monkeypatch.setattr(policy.LOG, "warning", warnings.append)
    checked(tmp_path, models, folder, attn_implementation=attention)
    assert [("sdpa leaves out the soft-cap" in w and "`attn_implementation: eager`" in w) for w in warnings] == (
        [True] if warns else []
    )
