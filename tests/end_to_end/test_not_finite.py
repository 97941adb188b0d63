"""A loss or a gradient that is not finite stops training before the optimizer moves, and says of which rows it is."""

import re
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
import torch
from axolotl.integrations.base import BasePlugin
from torch import Tensor
from transformers import TrainerCallback

ROWS, STEP = 6, 2
CHATS = {"path": "chats.jsonl", "ds_type": "json", "type": "chat_template"}
PAIRS = {"path": "pairs.jsonl", "ds_type": "json", "type": "chat_template.default"}
LISTS = {"path": "lists.jsonl", "ds_type": "json", "type": "poft_plugin.ranked"}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
LORA |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
UNPACKED = {"micro_batch_size": ROWS}
PACKED = {"sample_packing": True, "sequence_len": 2048, "micro_batch_size": 1}
ACCUMULATED = {"micro_batch_size": 2, "gradient_accumulation_steps": 3}
POFT = {"rl": "poft", "datasets": [CHATS]}
PRO = {"rl": "pro", "datasets": [LISTS]}
DPO = {"rl": "deft_dpo", "datasets": [PAIRS], "deft": {"train_on": "all", "omega": 0}}
VARIANTS: dict[str, dict[str, Any]] = {
    "poft": {**POFT, **UNPACKED}, "poft packed": {**POFT, **PACKED}, "poft 2 x 3": {**POFT, **ACCUMULATED},
    "pro": {**PRO, **UNPACKED}, "pro packed": {**PRO, **PACKED}, "pro 2 x 3": {**PRO, **ACCUMULATED},
    "deft_dpo 2 x 3 lora": {**DPO, **ACCUMULATED, **LORA},
}  # fmt: skip
"""Every optimizer step is over all rows."""


class PoisonPlugin(BasePlugin):  # type: ignore[misc]
    """Damages what is trained at the beginning of a step, and keeps the weights as they are then."""

    what = "embedding"
    named: str
    before: dict[str, Tensor]

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Damages."""
        return [_Poison(trainer)]


class _Poison(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step != STEP - 1:
            return
        if PoisonPlugin.what == "embedding":
            token, row = token_of_one_row(self._trainer.train_dataset)
            PoisonPlugin.named = f"{row['source']} row {row['row_number']} (key {row['row_key']})"
            model.get_input_embeddings().weight.data[token] = torch.nan
        elif PoisonPlugin.what == "gradient":
            parameter = next(p for p in model.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: gradient * torch.inf)
        PoisonPlugin.before = weights(model)


def token_of_one_row(rows: Any) -> tuple[int, dict[str, Any]]:
    """A token that one row alone holds, and the row: not the first one."""
    held = [set(row["input_ids"]) for row in rows]
    counts = Counter(chain.from_iterable(held))
    index = next(i for i in range(1, len(held)) if any(counts[token] == 1 for token in held[i]))
    return next(token for token in sorted(held[index]) if counts[token] == 1), rows[index]


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of all."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and the scores of the references, made once."""
    folder = tmp_path_factory.mktemp("not_finite")
    files = {"chats": tiny.chat_rows(ROWS), "pairs": tiny.pair_rows(ROWS), "lists": tiny.ranked_rows(ROWS)}
    for name, rows in files.items():
        tiny.write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def config(folder: Path, models: SimpleNamespace, out: Path, **changes: Any) -> Path:
    """Three steps, a checkpoint after each."""
    settings: dict[str, Any] = {
        "base_model": str(models.policy),
        "plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin", f"{__name__}.PoisonPlugin"],
        "num_epochs": 3, "save_strategy": "steps", "save_steps": 1, "output_dir": str(out),
        "dataset_prepared_path": str(folder / "prepared"), **changes,
    }  # fmt: skip
    scores = {"score_cache": str(folder / "scores")}
    if settings["rl"] == "poft":
        settings["poft"] = {"references": [{"model": str(models.ref_a)}], **scores}
    elif settings.get("deft"):
        settings["deft"] = {**settings["deft"], **scores}
    settings["datasets"] = [{**entry, "path": str(folder / entry["path"])} for entry in settings["datasets"]]
    return tiny.write_config(folder / "config.yml", **settings)


def stopped(path: Path, out: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The message of a run that stops at `STEP`: the weights are those at its beginning, and none of it is saved."""
    monkeypatch.setattr(PoisonPlugin, "what", what)
    with pytest.raises(ValueError, match=rf"^step {STEP}: a (loss|gradient) is not finite") as error:
        hosting.train(path)
    run = hosting.RecorderPlugin.recording
    assert run.trainer.state.global_step == STEP - 1
    after = weights(run.trainer.model)
    assert after.keys() == PoisonPlugin.before.keys()
    assert all(torch.equal(after[name].nan_to_num(7), w.nan_to_num(7)) for name, w in PoisonPlugin.before.items())
    assert any(not torch.equal(after[name], weight) for name, weight in run.initial.items())  # the first step moved
    saved = {file.parent.relative_to(out).as_posix() for file in out.rglob("*.safetensors")}
    assert saved == {f"checkpoint-{number}" for number in range(1, STEP)}
    return str(error.value)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loss(
    models: SimpleNamespace, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of one row alone, which the message names, wherever it lies in the step."""
    said = stopped(config(folder, models, tmp_path, **VARIANTS[name]), tmp_path, "embedding", monkeypatch)
    assert f"Rows with such a loss: {PoisonPlugin.named}: nan. If they look right" in said


@pytest.mark.parametrize("name", ["poft 2 x 3", "pro packed"])
@pytest.mark.parametrize("clipped", [True, False])
def test_a_gradient(
    models: SimpleNamespace, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, name: str, clipped: bool
) -> None:
    """Losses are finite: any row of the step may be the reason."""
    path = config(folder, models, tmp_path, max_grad_norm=float(clipped), **VARIANTS[name])
    said = stopped(path, tmp_path, "gradient", monkeypatch)
    assert "a gradient is not finite" in said
    rows = re.findall(r"\.jsonl row (\d+) \(key [0-9a-f]{32}\)", said.partition("Rows of the step: ")[2])
    assert sorted(map(int, rows)) == list(range(ROWS))


def test_a_learning_rate_that_breaks_the_weights(
    models: SimpleNamespace, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is tampered with: the first step moves the weights to where nothing can be computed any more."""
    path = config(folder, models, tmp_path, **VARIANTS["poft"], learning_rate=1e30)
    said = stopped(path, tmp_path, "nothing", monkeypatch)
    assert len(re.findall(r"chats\.jsonl row \d+ \(key [0-9a-f]{32}\)", said)) == ROWS
    assert "lower `learning_rate`" in said
