"""Policies whose rotary frequencies follow the longest sequence of a batch: trained as each row alone, or refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from poft_plugin.hosts.axolotl.collators import host_collator
from poft_plugin.methods import PRO

BOUND = 64
SIZES: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "initializer_range": 0.3, "tie_word_embeddings": False, "pad_token_id": 2,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0], "rope_theta": 10000.0,
    "original_max_position_embeddings": BOUND,
}  # fmt: skip
SHORT, BOTH = (2, 5, 3, 6, 1, 4, 7, 2), (2, 5, 3, 90, 1, 4, 7, 2)
MODES: dict[str, dict[str, Any]] = {
    "1 x 8": {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
    "8 x 1": {"micro_batch_size": 8},
    "padded to sequence_len": {"micro_batch_size": 8, "pad_to_sequence_len": True},
    "packed": {"sample_packing": True},
    "padded batch of packs": {"sample_packing": True, "micro_batch_size": 2, "pad_to_sequence_len": True},
}


def longrope(folder: Path) -> Path:
    """A policy with LongRoPE, as Phi-3.5 and Phi-4-mini are."""
    tiny.policy(folder)
    torch.manual_seed(0)
    Phi3ForCausalLM(
        Phi3Config(**SIZES, max_position_embeddings=1024, original_max_position_embeddings=BOUND, rope_scaling=LONGROPE)
    ).save_pretrained(folder)
    return folder


def dynamic(folder: Path) -> Path:
    """A policy with dynamic NTK."""
    tiny.policy(folder)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=BOUND, rope_parameters=rope)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind. Read only."""
    folder = tmp_path_factory.mktemp("policies")
    return {"longrope": longrope(folder / "longrope"), "dynamic": dynamic(folder / "dynamic")}


def rows(words: tuple[int, ...]) -> list[dict[str, Any]]:
    """Chats whose answers have so many words."""
    return [
        {"messages": [{"role": "user", "content": f"{number}?"},
                      {"role": "assistant", "content": " ".join(tiny.WORDS[n % 19] for n in range(count))}]}
        for number, count in enumerate(words)
    ]  # fmt: skip


def config(folder: Path, models: SimpleNamespace, policy: Path, data: Any, **settings: Any) -> Path:
    tiny.write_jsonl(folder / "data.jsonl", data)
    defaults: dict[str, Any] = {
        "base_model": str(policy),
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"],
        "rl": "poft",
        "poft": {"references": [{"model": str(models.ref_a)}], "score_cache": str(folder / "scores")},
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "max_grad_norm": 0.0,
    }
    return tiny.write_config(folder / "config.yml", **{**defaults, **settings})


def rewards_alone(policy: Path, dataset: Any) -> list[float]:
    """Each row by itself, without padding, in a model that has read no other."""
    found = []
    for row in dataset:
        model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1)
        at = (labels[1:] != -100).nonzero().squeeze(-1)
        found.append(float(logps[at, labels[1:][at]].mean()))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_short_rows_are_trained_as_each_alone(
    models: SimpleNamespace, policies: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    """Packs of 512 tokens, and batches padded to as many: eight times the bound, and no row is longer."""
    run = hosting.train(config(tmp_path, models, policies["longrope"], rows(SHORT), **MODES[mode]))
    alone = rewards_alone(policies["longrope"], run.trainer.train_dataset)
    assert run.logs[0]["poft/policy_reward"] == pytest.approx(sum(alone) / len(alone), rel=1e-4)


def test_long_factors_would_be_seen(policies: dict[str, Path]) -> None:
    """The same row with a position beyond the bound beside it has another score: the test above can fail."""
    model = AutoModelForCausalLM.from_pretrained(policies["longrope"], dtype=torch.float32).eval()
    ids = torch.arange(3, 33)[None]
    positions = torch.cat([torch.arange(29), torch.tensor([BOUND])])[None]
    with torch.no_grad():
        short, long = (model(ids, position_ids=p).logits[0, :20] for p in (torch.arange(30)[None], positions))
    assert float((short - long).abs().max()) > 0.1


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "1 x 8"])
def test_rows_on_both_sides_do_not_share_batches(
    models: SimpleNamespace, policies: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    path = config(tmp_path, models, policies["longrope"], rows(BOTH), **MODES[mode])
    with pytest.raises(
        ValueError, match=rf"beyond {BOUND} tokens.* 1 of 8 rows of .*`sequence_len: {BOUND}`.*or let no"
    ):
        hosting.train(path)


def test_rows_on_both_sides_alone(models: SimpleNamespace, policies: dict[str, Path], tmp_path: Path) -> None:
    """The remedies: no batch is shared, or the longer rows are left out."""
    settings = config(tmp_path, models, policies["longrope"], rows(BOTH), **MODES["1 x 8"])
    run = hosting.train(settings)
    alone = rewards_alone(policies["longrope"], run.trainer.train_dataset)
    assert run.logs[0]["poft/policy_reward"] == pytest.approx(sum(alone) / len(alone), rel=1e-4)
    shorter = config(tmp_path, models, policies["longrope"], rows(BOTH), sequence_len=BOUND, sample_packing=True)
    assert len(hosting.train(shorter).trainer.train_dataset) == len(BOTH) - 1


def test_evaluation_rows_are_looked_at_too(models: SimpleNamespace, policies: dict[str, Path], tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "eval.jsonl", rows(BOTH))
    entry = {"path": str(tmp_path / "eval.jsonl"), "ds_type": "json", "type": "chat_template", "split": "train"}
    settings = {"test_datasets": [entry], "val_set_size": None, "eval_batch_size": 2}
    with pytest.raises(ValueError, match=r"1 of 8 rows of test_datasets.*`eval_batch_size: 1`"):
        hosting.train(config(tmp_path, models, policies["longrope"], rows(SHORT), **settings))


@pytest.mark.parametrize("mode", ["1 x 8", "packed"])
def test_dynamic_frequencies_stay_in_the_model(
    models: SimpleNamespace, policies: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    """They grow with the longest row so far: no row is alone, whatever the batches."""
    path = config(tmp_path, models, policies["dynamic"], rows(BOTH), **MODES[mode])
    message = rf"beyond {BOUND} tokens.*Set `sequence_len: {BOUND}`, which leaves the longer ones out$"
    with pytest.raises(ValueError, match=message):
        hosting.train(path)


def test_dynamic_frequencies_of_short_rows(models: SimpleNamespace, policies: dict[str, Path], tmp_path: Path) -> None:
    run = hosting.train(config(tmp_path, models, policies["dynamic"], rows(SHORT), **MODES["padded batch of packs"]))
    alone = rewards_alone(policies["dynamic"], run.trainer.train_dataset)
    assert run.logs[0]["poft/policy_reward"] == pytest.approx(sum(alone) / len(alone), rel=1e-4)


def test_a_group_always_shares_a_batch(models: SimpleNamespace, policies: dict[str, Path], tmp_path: Path) -> None:
    """Responses of one prompt on both sides: `micro_batch_size: 1` is no remedy."""
    long = " ".join(["alpha"] * 90)
    data = [{"prompt": f"{n}?", "responses": ["beta", long], "scores": [2.0, 1.0]} for n in range(4)]
    settings = {
        "rl": "pro", "poft": None, "deft": {},
        "datasets": [{"path": str(tmp_path / "data.jsonl"), "ds_type": "json", "type": "poft_plugin.ranked"}],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"4 of 4 rows of .*which leaves the longer ones out$"):
        hosting.train(config(tmp_path, models, policies["longrope"], data, **settings))


def test_other_policies_get_no_position_ids(models: SimpleNamespace, tmp_path: Path, policies: dict[str, Path]) -> None:
    """Unpacked batches are the host's own, where frequencies do not vary: some models take no position ids."""
    for policy, counts in ((models.policy, False), (policies["longrope"], True)):
        cfg = hosting.load_config(config(tmp_path, models, policy, rows(SHORT)))
        tokenizer = SimpleNamespace(padding_side="right")
        assert host_collator(cfg, PRO, is_eval=False)(tokenizer).count_positions == counts
