"""Checkpoints that do not fill their model are refused, and complete ones of every kind are not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from poft_plugin.data.preparation import Policy
from poft_plugin.scoring import loading
from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.checkpoints import MissingCheckpointError, resolve_checkpoint
from poft_plugin.scoring.run import Share
from poft_plugin.scoring.start_policy import open_start_policy
from scoring.support import as_rows, grader, score_missing, scorer

ROWS = as_rows(tiny.chat_rows(3, seed=3))
WEIGHTS, BINARY, INDEX = "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
Weights = dict[str, torch.Tensor]


def copied(source: Path, folder: Path, change: Callable[[Weights], Weights] | None = None, **config: Any) -> Path:
    """A checkpoint with other weights, and other keys in its config."""
    shutil.copytree(source, folder)
    if change is not None:
        changed = {name: weight.contiguous() for name, weight in change(load_file(folder / WEIGHTS)).items()}
        save_file(changed, folder / WEIGHTS, {"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **config}))
    return folder


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: w for name, w in weights.items() if not any(part in name for part in parts)}


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def sharded(source: Path, folder: Path) -> Path:
    """The same model in several files."""
    copied(source, folder)
    (folder / WEIGHTS).unlink()
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def in_binary(source: Path, folder: Path) -> Path:
    """The same model as PyTorch's own file."""
    copied(source, folder)
    torch.save(load_file(folder / WEIGHTS), folder / BINARY)
    (folder / WEIGHTS).unlink()
    return folder


def rewards(folder: Path, cache: ScoreCache, **settings: Any) -> list[float]:
    one = scorer(folder, cache, **settings)
    score_missing(one, ROWS, cache, share=Share(0, 1), device="cpu", batch_tokens=512)
    return list(cache.lookup(one.identity, ROWS.keys).rewards.tolist())


LACKING: dict[str, tuple[Callable[[Weights], Weights] | None, dict[str, Any], str]] = {
    "a layer": (without(".layers.1."), {}, r"lacks 9 weights, model\.layers\.1\.input_layernorm\.weight.*random"),
    "a norm": (without("model.norm"), {}, r"lacks 1 weights, model\.norm\.weight among them.*download it again"),
    "the head": (without("lm_head"), {}, r"lacks 1 weights, lm_head\.weight among them"),
    "a layer more": (None, {"num_hidden_layers": 3}, r"lacks 9 weights, model\.layers\.2\.input_layernorm\.weight"),
    "ddp": (prefixed("module."), {}, r"lacks 21 weights.* without the prefix 'module\.'$"),
    "compiled": (prefixed("_orig_mod."), {}, r"lacks 21 weights.* without the prefix '_orig_mod\.'$"),
    "peft": (prefixed("base_model.model."), {}, r"lacks 21 weights.* without the prefix 'base_model\.model\.'$"),
    "shapes": (None, {"intermediate_size": 80}, r"6 of its weights have another shape.*\(32, 64\), and \(32, 80\)"),
}


@pytest.mark.parametrize("kind", LACKING)
def test_an_incomplete_reference_is_refused(models: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    """Before a row is scored, so that nothing is cached."""
    change, config, message = LACKING[kind]
    folder, cache = copied(models.ref_a, tmp_path / "x", change, **config), ScoreCache(tmp_path / "cache")
    with pytest.raises(ValueError, match=rf"^reference 'x': .*{message}"):
        rewards(folder, cache)
    assert cache.lookup(scorer(folder, cache).identity, ROWS.keys).missing.all()


@pytest.mark.parametrize("kind", ["a layer", "ddp"])
def test_an_incomplete_start_policy_or_reward_model_is_refused(
    models: SimpleNamespace, tmp_path: Path, kind: str
) -> None:
    change, _, message = LACKING[kind]
    cache = ScoreCache(tmp_path / "cache")
    start = copied(models.policy, tmp_path / "start", change)
    policy = Policy(str(start), AutoTokenizer.from_pretrained(start), sequence_len=64)
    source = open_start_policy(policy, cache)
    with pytest.raises(ValueError, match=rf"^start policy 'start': .*{message}"):
        source.scorer.load("cpu")  # type: ignore[union-attr]
    judge = copied(tiny.reward_model(tmp_path / "whole"), tmp_path / "judge", change)
    with pytest.raises(ValueError, match=r"^reward model 'judge': its checkpoint lacks \d+ weights, .*layers\.\d"):
        grader(judge, cache).load("cpu")


def damaged(models: SimpleNamespace, folder: Path, kind: str) -> str:
    """Damages a checkpoint; returns the file."""
    if "shard" in kind:
        sharded(models.ref_a, folder)
        name = sorted(folder.glob("model-*.safetensors"))[1].name
    else:
        name = BINARY if "bin" in kind else WEIGHTS
        (in_binary if "bin" in kind else copied)(models.ref_a, folder)
    content = (folder / name).read_bytes()
    if "gone" in kind:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(
            {"cut": content[: len(content) // 2], "empty": b"", "lfs": POINTER}[kind.split()[0]]
        )
    return name


@pytest.mark.parametrize("kind", ["cut", "empty", "lfs", "cut bin", "empty bin", "lfs bin", "cut shard", "gone shard"])
def test_a_damaged_or_missing_file_is_named(models: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    name = damaged(models, tmp_path / "x", kind)
    what = r"is not there \(\d+ weights, (lm_head|model)\.\S+weight" if "gone" in kind else "is cut off or damaged"
    message = rf"^reference 'x': its weights cannot be loaded.*: {re.escape(name)} {what}.*download it again"
    with pytest.raises(ValueError, match=message):
        rewards(tmp_path / "x", ScoreCache(tmp_path / "cache"))


def test_without_any_weights(models: SimpleNamespace, tmp_path: Path) -> None:
    copied(models.ref_a, tmp_path / "x")
    (tmp_path / "x" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"^reference 'x': its weights cannot be loaded .*no file named model\.saf"):
        rewards(tmp_path / "x", ScoreCache(tmp_path / "cache"))


def bare(weights: Weights) -> Weights:
    """As the body alone is saved."""
    return {name.removeprefix("model."): weight for name, weight in weights.items() if "lm_head" not in name}


SAME: dict[str, Callable[[Path, Path], Path]] = {
    "shards": sharded,
    "bin": in_binary,
    "base_model_prefix": lambda source, folder: copied(source, folder, prefixed("model.")),
    "old buffers": lambda source, folder: copied(
        source, folder, lambda w: {**w, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    ),
    "shards, an index that lacks some": lambda source, folder: _shorter_index(sharded(source, folder)),
}


def _shorter_index(folder: Path) -> Path:
    """transformers reads what is in the files."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if ".layers.1.mlp" not in name}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", SAME)
def test_complete_checkpoints_are_scored_alike(
    models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    expected = rewards(models.ref_a, ScoreCache(tmp_path / "plain"))
    assert rewards(SAME[kind](models.ref_a, tmp_path / "x"), ScoreCache(tmp_path / "cache")) == expected
    assert "no place in the model" not in capsys.readouterr().out


def test_tied_embeddings_need_no_head(models: SimpleNamespace, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    headless = copied(models.ref_a, tmp_path / "headless", without("lm_head"), **tied)
    expected = rewards(headless, ScoreCache(tmp_path / "cache"))
    assert rewards(copied(models.ref_a, tmp_path / "bare", bare, **tied), ScoreCache(tmp_path / "again")) == expected
    with pytest.raises(ValueError, match=r"lacks 1 weights, model\.embed_tokens\.weight|lacks .*lm_head\.weight"):
        rewards(copied(models.ref_a, tmp_path / "x", without("lm_head", "embed_tokens"), **tied),
                ScoreCache(tmp_path / "none"))  # fmt: skip


def test_weights_without_a_place_are_said_once(
    models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value head, and layers beyond those that the config names."""
    loading._said.clear()
    extra = copied(models.ref_a, tmp_path / "x", lambda w: {**w, "v_head.summary.weight": torch.zeros(1, 32)})
    expected = rewards(models.ref_a, ScoreCache(tmp_path / "plain"))
    assert rewards(extra, ScoreCache(tmp_path / "cache")) == expected
    assert rewards(extra, ScoreCache(tmp_path / "again")) == expected
    said = "reference 'x': 1 weights of its checkpoint have no place in the model, v_head.summary.weight among them"
    assert capsys.readouterr().out.count(said) == 1
    rewards(copied(models.ref_a, tmp_path / "y", num_hidden_layers=1), ScoreCache(tmp_path / "short"))
    assert "reference 'y': 9 weights of its checkpoint have no place in the model" in capsys.readouterr().out


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_checkpoints(models: SimpleNamespace, tmp_path: Path, quantization: str) -> None:
    """Quantized while it is loaded, and saved so: their tensors have other names and shapes."""
    pytest.importorskip("bitsandbytes")
    folder = copied(models.ref_a, tmp_path / "wide")
    tiny.llama(folder, vocab_size=330, seed=2, hidden=64)
    whole = rewards(folder, ScoreCache(tmp_path / "whole"))
    one = scorer(folder, ScoreCache(tmp_path), quantization=quantization)
    found = rewards(folder, ScoreCache(tmp_path / "found"), quantization=quantization)
    assert found == pytest.approx(whole, abs=0.5)
    assert found != whole
    saved = copied(folder, tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=one.quantization_config, device_map={"": "cpu"}
    ).save_pretrained(saved)
    assert rewards(saved, ScoreCache(tmp_path / "again")) == pytest.approx(found, abs=0.05)
    fields = [scorer(f, ScoreCache(tmp_path / "fields")).identity.fields for f in (folder, saved)]
    assert [f.get("stored_quantization") for f in fields] == [None, "bitsandbytes"]
    lacking = copied(saved, tmp_path / "lacking", without(".layers.1."))
    with pytest.raises(ValueError, match=r"^reference 'lacking': its (checkpoint lacks|weights cannot).* it again$"):
        rewards(lacking, ScoreCache(tmp_path / "none"))


def adapter(base: Path, folder: Path, task: TaskType) -> Path:
    """A LoRA adapter as peft saves it, its base model named and, of a classifier, the head beside it."""
    auto = AutoModelForCausalLM if task == TaskType.CAUSAL_LM else AutoModelForSequenceClassification
    settings = LoraConfig(task_type=task, r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(auto.from_pretrained(base), settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def on_the_hub(source: Path, hub: Path) -> str:
    """A model as the hub's own cache keeps it."""
    repository, commit = hub / "models--someone--adapter", "a" * 40
    shutil.copytree(source, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return "someone/adapter"


@pytest.mark.parametrize("kind", ["reward model", "reference"])
def test_an_adapter_is_refused_wherever_it_is(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """transformers would load its base model, whatever else lies beside it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    judge = kind == "reward model"
    base = tiny.reward_model(tmp_path / "base") if judge else models.ref_a
    plain = adapter(base, tmp_path / "adapter", TaskType.SEQ_CLS if judge else TaskType.CAUSAL_LM)
    if judge:
        assert "score" in json.loads((plain / "adapter_config.json").read_text())["modules_to_save"]
    with_config = Path(shutil.copytree(plain, tmp_path / "with_config"))
    shutil.copy(base / "config.json", with_config)
    with_weights = Path(shutil.copytree(with_config, tmp_path / "with_weights"))
    shutil.copy(base / WEIGHTS, with_weights)
    auto = "AutoPeftModelForSequenceClassification" if judge else "AutoPeftModelForCausalLM"
    for model in (plain, with_config, with_weights, on_the_hub(plain, tmp_path / "hub")):
        message = rf"^{kind} {re.escape(str(model))}: not a model folder: a LoRA adapter: merge it first.*`{auto}\.from"
        with pytest.raises(MissingCheckpointError, match=message):
            resolve_checkpoint(str(model), None, ScoreCache(tmp_path / "cache"), kind)


def test_the_merged_reward_model_of_the_remedy_is_scored(tmp_path: Path) -> None:
    import peft

    base = tiny.reward_model(tmp_path / "base")
    folder, cache = adapter(base, tmp_path / "adapter", TaskType.SEQ_CLS), ScoreCache(tmp_path / "cache")
    auto = peft.AutoPeftModelForSequenceClassification
    auto.from_pretrained(str(folder), num_labels=1).merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "merged")
    score_missing(grader(tmp_path / "merged", cache), ROWS, cache, share=Share(0, 1), device="cpu", batch_tokens=512)
