"""Several ranks, DeepSpeed's three stages: the same losses and weights as one process, and really sharded.

Every optimizer step holds the whole data set, so that the order of rows, which samplers of several ranks change, is of
no account. One torchrun of two processes per stage trains several methods in turn (`stage.py`).

`make test` runs what is not marked `matrix`; `make test-matrix` runs everything.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.timeout(1800)
HERE = Path(__file__).parent
ROWS, HELD_OUT, STEPS = 8, 5, 3
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
LORA |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
RAGGED = {"test_datasets": None, "accelerator_config": {"even_batches": False}}
PAIRS = {"path": "pairs.jsonl", "ds_type": "json", "type": "chat_template.default"}
LISTS = {"path": "lists.jsonl", "ds_type": "json", "type": "poft_plugin.ranked"}
CHATS = {"path": "chats.jsonl", "ds_type": "json", "type": "chat_template"}
DEFT = {"top_percent": 50, "bottom_percent": 25, "train_on": "all", "omega": 0.01}

PLAIN: dict[str, dict[str, Any]] = {
    "poft": {"rl": "poft", "datasets": [CHATS]},
    "deft_dpo": {"rl": "deft_dpo", "datasets": [PAIRS], "deft": DEFT},
    "deft_pro": {"rl": "deft_pro", "datasets": [LISTS], "deft": DEFT},
    "deft_rrhf": {"rl": "deft_rrhf", "datasets": [LISTS], "deft": DEFT},
    "pro": {"rl": "pro", "datasets": [LISTS]},
    "rrhf": {"rl": "rrhf", "datasets": [PAIRS]},
}
PACK_TOKENS = {"chats.jsonl": 96, "pairs.jsonl": 160, "lists.jsonl": 224}
"""A pack holds two rows of the data of equal lengths, so that the eight rows are four packs in any order."""


def packed(method: dict[str, Any]) -> dict[str, Any]:
    """The method on packs, four of them."""
    (entry,) = method["datasets"]
    pack = {"sample_packing": True, "sequence_len": PACK_TOKENS[entry["path"]], "micro_batch_size": 1}
    return {**method, **pack, "datasets": [{**entry, "path": f"even {entry['path']}"}], "test_datasets": None}


ALONE: dict[str, dict[str, Any]] = {
    **PLAIN,
    **{f"{name} packed": packed(method) for name, method in PLAIN.items()},
    "deft_pro prompts shared": {**packed(PLAIN["deft_pro"]), "deft": {**DEFT, "share_prompt": True},
                                "sequence_len": 128},
    "poft packs of unequal rows": {**PLAIN["poft"], "sample_packing": True, "sequence_len": 192, "micro_batch_size": 1,
                                   "gradient_accumulation_steps": 1, "test_datasets": None},
    "poft ragged": {**PLAIN["poft"], "datasets": [{**CHATS, "path": "seven.jsonl"}], **RAGGED},
    "deft_dpo lora": {**PLAIN["deft_dpo"], **LORA},
}  # fmt: skip
"""What one process trains; it accumulates twice as often as each of two ranks does."""

WIDE = {f"{name}, wide": {**ALONE[name], "micro_batch_size": 2 * ALONE[name].get("micro_batch_size", 2),
                          "gradient_accumulation_steps": 1}
        for name in [*PLAIN, *(f"{name} packed" for name in PLAIN)]}  # fmt: skip
"""The same without accumulation: what a rank accumulated is one micro-batch."""

BROKEN = "poft, broken on one rank"
"""Stops in its second step; it is the last that ranks train."""

STOPS = {**PLAIN["poft"], "plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin", "breaking.BreakingPlugin"],
         "save_strategy": "steps", "save_steps": 1, "test_datasets": None}  # fmt: skip

VARIANTS = {**ALONE, **WIDE}
STAGES = ("ddp", "zero1", "zero2", "zero3")
COVERING = {
    ("ddp", "poft packed, wide"), ("ddp", "poft ragged"), ("ddp", "deft_pro, wide"), ("ddp", "deft_rrhf packed"),
    ("ddp", "deft_pro prompts shared"),
    ("zero1", "poft"), ("zero1", "pro packed"),
    ("zero2", "deft_dpo"), ("zero2", "poft packs of unequal rows"), ("zero2", "rrhf, wide"),
    ("zero3", "poft packed"), ("zero3", "deft_dpo packed, wide"), ("zero3", "deft_pro"), ("zero3", "deft_dpo lora"),
    ("zero3", "deft_pro prompts shared"),
}  # fmt: skip
"""What `make test` runs: every stage, every method, packed and not, wide and not, LoRA under ZeRO-3."""

EVERY = [
    pytest.param(stage, name, marks=[] if (stage, name) in COVERING else pytest.mark.matrix)
    for stage in STAGES
    for name in VARIANTS
]
BUDGET = {"rel": 2e-4, "abs": 2e-5}
"""Losses in float32: sums over other groupings of the same rows, three steps deep."""

METRICS = re.compile(r"(eval_)?(loss|(poft|dpo|pro|rrhf|sft|deft)/(?!reference_std|level|label).*)")
"""What is logged of both; what is known before training is logged once."""


def write_rows(folder: Path) -> None:
    """The data sets, once: rows of differing lengths, one row less, rows of equal lengths, rows to evaluate on."""
    if (folder / "chats.jsonl").exists():
        return
    many = ROWS + HELD_OUT
    files = {"chats": tiny.chat_rows(many, seed=5), "pairs": tiny.pair_rows(many), "lists": tiny.ranked_rows(many)}
    for name, rows in files.items():
        tiny.write_jsonl(folder / f"{name}.jsonl", rows[:ROWS])
        tiny.write_jsonl(folder / f"held out {name}.jsonl", rows[ROWS:])
    tiny.write_jsonl(folder / "seven.jsonl", files["chats"][: ROWS - 1])
    for name, rows in tiny.even_rows(ROWS).items():
        tiny.write_jsonl(folder / f"even {name}.jsonl", rows)


def config(folder: Path, models: SimpleNamespace, name: str, **changes: Any) -> Path:
    """The config of one variant; two ranks of two micro-batches of two rows (or a pack) make one step of eight rows."""
    write_rows(folder)
    variant = STOPS if name == BROKEN else VARIANTS[name]
    held_out = {**variant["datasets"][0], "split": "train"}
    settings: dict[str, Any] = {
        "base_model": str(models.policy),
        "plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"],
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_epochs": STEPS,
        "learning_rate": 3e-3,
        "dataset_prepared_path": str(folder / "prepared" / name),
        "test_datasets": [{**held_out, "path": f"held out {held_out['path']}"}],
        "eval_strategy": "epoch",
        "eval_batch_size": 2,
        **variant,
        **changes,
    }
    if settings["test_datasets"] is None:
        settings["eval_strategy"] = None
    for kind in ("datasets", "test_datasets"):
        settings[kind] = settings[kind] and [{**entry, "path": str(folder / entry["path"])} for entry in settings[kind]]
    scores = {"score_cache": str(Path(changes["output_dir"]).parent / "scores")}  # ranks score their shares themselves
    if variant["rl"] == "poft":
        settings["poft"] = {"references": [{"model": str(models.ref_a)}], **scores}
    elif "deft" in variant:
        grader = {"reward_model": {"model": str(reward_model(models.folder))}} if variant["rl"] == "deft_dpo" else {}
        settings["deft"] = {**variant["deft"], **grader, **scores}
    return tiny.write_config(folder / f"{changes['output_dir'].replace('/', '-')}.yml", **settings)


def reward_model(folder: Path) -> Path:
    """A reward model beside the other models, built once."""
    return folder / "grader" if (folder / "grader").exists() else tiny.reward_model(folder / "grader")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def alone(models: SimpleNamespace, workplace: Path) -> Any:
    """Each method in one process, trained when it is first asked for."""
    found: dict[str, SimpleNamespace] = {}

    def train(name: str) -> SimpleNamespace:
        if name not in found:
            out = workplace / "alone" / name
            steps = 2 * ALONE[name].get("gradient_accumulation_steps", 2)
            path = config(workplace, models, name, output_dir=str(out), gradient_accumulation_steps=steps)
            recording = hosting.train(path)
            found[name] = SimpleNamespace(
                logs=losses(recording.trainer.state.log_history),
                weights=weights(out),
                steps=recording.trainer.state.global_step,
            )
        return found[name]

    return train


@pytest.fixture(scope="module")
def staged(models: SimpleNamespace, workplace: Path, request: pytest.FixtureRequest) -> Any:
    """Each stage's selected methods on two ranks: one torchrun, started when it is first asked for."""
    selected = [
        item.callspec.params
        for item in request.session.items
        if hasattr(item, "callspec") and "stage" in item.callspec.params
    ]
    found: dict[str, dict[str, Any]] = {}

    def run(stage: str) -> dict[str, Any]:
        if stage not in found:
            names = [params["name"] for params in selected if params["stage"] == stage]
            chosen = [name for name in [*VARIANTS, BROKEN] if name in names]
            found[stage] = _torchrun(stage, chosen, models, workplace)
        return found[stage]

    return run


def _torchrun(stage: str, names: list[str], models: SimpleNamespace, folder: Path) -> dict[str, Any]:
    deepspeed = None if stage == "ddp" else str(HERE / f"{stage}.json")
    jobs = [
        {"name": name, "deepspeed": deepspeed, "stops": name == BROKEN,
         "config": str(config(folder, models, name, output_dir=str(folder / stage / name)))}
        for name in names
    ]  # fmt: skip
    return run_jobs(jobs, folder / f"{stage}.json")


def run_jobs(jobs: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """`stage.py` on two ranks; what it wrote down."""
    path.write_text(json.dumps(jobs))
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2", "--standalone"]
    command += [str(HERE / "stage.py"), str(path)]
    environment = for_ranks() | ({} if jobs[0]["deepspeed"] else {"ACCELERATE_USE_CPU": "true"})
    done = subprocess.run(
        command, cwd=path.parent, env=environment, capture_output=True, text=True, check=False, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(path.with_suffix(".results.json").read_text())
    return found


def for_ranks() -> dict[str, str]:
    """The environment of ranks: with ACCELERATE_USE_CPU, DeepSpeed would silently be plain DDP."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment.pop("ACCELERATE_USE_CPU", None)
    return environment


def losses(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged of steps and of evaluations."""
    return [entry for entry in logs if "loss" in entry or "eval_loss" in entry]


def weights(folder: Path) -> dict[str, Tensor]:
    """What a run saved: the model, or its adapter."""
    files = list(folder.glob("*.safetensors"))
    assert files, list(folder.iterdir())
    return {
        name: tensor
        for file in files
        for name, tensor in load_file(file).items()
        if file.name != "discrepancy.safetensors"
    }


@pytest.mark.parametrize(("stage", "name"), EVERY)
def test_ranks_train_what_one_process_trains(stage: str, name: str, alone: Any, staged: Any, workplace: Path) -> None:
    expected, found = alone(name.removesuffix(", wide")), staged(stage)[name]
    assert found["steps"] == expected.steps == STEPS
    evaluated = 0 if VARIANTS[name].get("test_datasets", "") is None else 1 + STEPS  # before the first step, too
    assert len(expected.logs) == STEPS + evaluated
    for ours, theirs in zip(losses(found["logs"]), expected.logs, strict=True):
        for metric in filter(METRICS.fullmatch, theirs):
            assert ours[metric] == pytest.approx(theirs[metric], **BUDGET), metric
    saved = weights(workplace / stage / name)
    assert saved.keys() == expected.weights.keys()
    for parameter, weight in expected.weights.items():
        torch.testing.assert_close(saved[parameter], weight, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("stage", "name"), EVERY)
def test_the_engine_is_real(stage: str, name: str, staged: Any) -> None:
    """DeepSpeed's own engine at the stage that was asked for, its parts on both ranks, and one model in memory."""
    found = staged(stage)[name]
    assert found["models"] == 1
    assert found["elements"] <= found["local"] + found["frozen"]
    assert found["engine"] == ("DistributedDataParallel" if stage == "ddp" else "DeepSpeedEngine")
    if stage == "ddp":
        return
    assert found["zero"] == int(stage[-1])
    assert found["optimizer"] <= 0.51 * found["whole"] + 64
    if stage == "zero3":
        assert found["local"] == 0
        assert found["stored"] <= 0.51 * found["whole"] + 64


@pytest.mark.parametrize(("stage", "name"), [("ddp", BROKEN), ("zero3", BROKEN)])
def test_what_is_not_finite_on_one_rank_stops_every_rank(stage: str, name: str, staged: Any, workplace: Path) -> None:
    """All within the same step, before the optimizer moves; all name the broken rank's rows, and nothing is saved."""
    (said, step), (other, other_step) = staged(stage)[name]
    assert said == other
    assert step == other_step == 1
    assert said.startswith("step 2: a loss is not finite")
    rows = re.findall(r"chats\.jsonl row \d+ \(key [0-9a-f]{32}\): nan", said)
    assert len(set(rows)) == len(rows) == ROWS // 2
    saved = {file.parent.name for file in (workplace / stage / name).rglob("*.safetensors")}
    assert saved == {"checkpoint-1"}


def test_a_resumed_zero3_run_ends_where_the_undisturbed_one_does(models: SimpleNamespace, workplace: Path) -> None:
    """Checkpoint after the first of three steps; the next two repeat the undisturbed run's, weights included."""
    out, again = workplace / "whole", workplace / "resumed"
    saving = {"save_strategy": "steps", "save_steps": 1}
    deepspeed = str(HERE / "zero3.json")
    checkpoint = str(out / "checkpoint-1")
    paths = [str(config(workplace, models, "deft_dpo", output_dir=str(folder), **saving)) for folder in (out, again)]
    jobs = [
        {"name": "whole", "deepspeed": deepspeed, "config": paths[0]},
        {"name": "resumed", "deepspeed": deepspeed, "config": paths[1], "resume_from_checkpoint": checkpoint},
    ]
    found = run_jobs(jobs, workplace / "resume.json")
    whole, resumed = ([entry for entry in found[name]["logs"] if "loss" in entry] for name in ("whole", "resumed"))
    assert [entry["step"] for entry in resumed] == [1, 2, 3]
    assert not (again / "checkpoint-1").exists()  # the first step was not trained again
    for ours, theirs in zip(resumed[1:], whole[1:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    expected = weights(out)
    for parameter, weight in weights(again).items():
        torch.testing.assert_close(weight, expected[parameter], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("stage", "name"),
    [("zero1", "deft_pro packed"), ("zero2", "poft packed"), ("zero3", "deft_dpo packed")],
)
def test_axolotl_train_itself(stage: str, name: str, models: SimpleNamespace, workplace: Path, alone: Any) -> None:
    """The command that users type, with the launcher and DeepSpeed config that they have."""
    out = workplace / f"command {stage}"
    plugins = ["cpu_deepspeed.CpuDeepSpeedPlugin", "poft_plugin.PoftPlugin", "noting.NotingPlugin"]
    path = config(workplace, models, name, output_dir=str(out), plugins=plugins)
    script = Path(sys.executable).parent
    environment = for_ranks() | {"PATH": f"{script}{os.pathsep}{os.environ['PATH']}"}
    command = [str(script / "axolotl"), "train", str(path), "--launcher", "torchrun"]
    command += ["--deepspeed", str(HERE / f"{stage}.json"), "--", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        command, cwd=workplace, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert [(out / f"engine-{rank}.txt").read_text() for rank in (0, 1)] == [f"DeepSpeedEngine {stage[-1]}"] * 2
    expected, saved = alone(name).weights, weights(out)
    for parameter, weight in expected.items():
        torch.testing.assert_close(saved[parameter], weight, rtol=1e-3, atol=2e-4)
