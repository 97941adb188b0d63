"""The command line, as users type it: real processes for one run of each kind, the click group for the rest."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pyarrow.parquet as pq
import pytest
import tiny
from axolotl.cli.main import cli
from click.testing import CliRunner, Result

THIRD_PARTY = Path(__file__).parent.parent / "third_party"


def axolotl(folder: Path, *arguments: str, **environment: str) -> str:
    """A process of its own; its output, or the test fails with it."""
    script = Path(sys.executable).parent / "axolotl"
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        [str(script), *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=280,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return ran.stdout + ran.stderr


def poft(*arguments: str) -> Result:
    """`axolotl poft ...` in this process."""
    hosting.forget_plugins()
    return CliRunner().invoke(cli, ["poft", *arguments])


def config(folder: Path, models: SimpleNamespace, **settings: Any) -> Path:
    if not (folder / "data.jsonl").exists():
        tiny.write_jsonl(folder / "data.jsonl", tiny.chat_rows(12, seed=4))
    defaults: dict[str, Any] = {
        "base_model": str(models.policy),
        "datasets": [{"path": "./data.jsonl", "ds_type": "json", "type": "chat_template"}],
        "plugins": ["poft_plugin.PoftPlugin"],
        "rl": "poft",
        "poft": {"references": [{"model": str(models.ref_a)}, {"model": str(models.ref_b)}],
                 "score_cache": str(folder / "scores")},
        "output_dir": "./out",
        "dataset_prepared_path": "./prepared",
    }  # fmt: skip
    return tiny.write_config(folder / "config.yml", **{**defaults, **settings})


@pytest.fixture
def preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what the commands write into the environment."""
    monkeypatch.setenv("AXOLOTL_IS_PREPROCESS", "1")


def test_two_processes_score_and_train(models: SimpleNamespace, tmp_path: Path) -> None:
    """`axolotl train` with torchrun: each of two ranks scores its share, then both train, packed, with evaluation."""
    config(tmp_path, models, sample_packing=True, sequence_len=128, num_epochs=2, val_set_size=3, eval_steps=2,
           save_strategy="steps", save_steps=2, dataset_num_proc=1)  # fmt: skip
    output = axolotl(tmp_path, "train", "config.yml", "--launcher", "torchrun", "--", "--nproc_per_node=2")
    assert "12 to score" in output
    assert re.search(r"'loss': '[\d.]+'.*'poft/coefficient'", output)
    assert "ppl" not in output
    state = json.loads(max(tmp_path.glob("out/checkpoint-*/trainer_state.json")).read_text())
    assert any("eval_poft/coefficient" in entry for entry in state["log_history"])
    # what is left behind names the method: the model card holds the config as it was written
    assert "rl: poft" in (tmp_path / "out" / "README.md").read_text()
    files = list(tmp_path.glob("scores/*/scores-*.parquet"))
    assert sum(pq.read_metadata(file).num_rows for file in files) == 2 * 12


def test_preprocess_then_nothing_is_left_to_score(models: SimpleNamespace, tmp_path: Path) -> None:
    config(tmp_path, models, dataset_num_proc=1)
    assert "12 to score" in axolotl(tmp_path, "preprocess", "config.yml")
    again = axolotl(tmp_path, "preprocess", "config.yml")
    assert again.count("12 rows cached, 0 to score") == 2


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package of somebody else is installed."""
    folder = tmp_path_factory.mktemp("third_party")
    site, source = folder / "site", shutil.copytree(THIRD_PARTY, folder / "toy")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site),
         str(source)], check=True,
    )  # fmt: skip
    return site


def logged(output: str, name: str) -> list[float]:
    """A number in each line that the host logged."""
    return [float(value) for value in re.findall(rf"'{name}': '?([-+.\de]+)", output)]


def test_third_party_method(models: SimpleNamespace, tmp_path: Path, third_party: Path) -> None:
    """A package that is installed brings `rl: toy_rows`, its loss, its preprocessor and its filter."""
    config(tmp_path, models, rl="toy_rows", poft=None, toy={"strength": 3.0}, dataset_num_proc=0,
           row_filters=[{"name": "short_rows", "max_words": 8}])  # fmt: skip
    output = axolotl(
        tmp_path,
        "train",
        "config.yml",
        "--launcher",
        "python",
        PYTHONPATH=str(third_party),
        AXOLOTL_LOG_LEVEL="INFO",
        AXOLOTL_DATASET_NUM_PROC="0",
    )
    words = [len(row["messages"][1]["content"].split()) for row in tiny.chat_rows(12, seed=4)]
    kept = [count for count in words if count <= 8]
    assert 0 < len(kept) < 12
    assert sorted(logged(output, "toy/bonus")) == pytest.approx(sorted(1 / count for count in kept), rel=1e-3)
    assert f"{12 - len(kept)} of 12 rows left out by the filter short_rows" in output


def test_third_party_preferences_inside_deft(models: SimpleNamespace, tmp_path: Path, third_party: Path) -> None:
    """Its preference method `toy` has a form inside DEFT, which reads both blocks: levels, and its own strength."""
    rows = tiny.pair_rows(12, seed=4)
    tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    entry = {"path": "./data.jsonl", "ds_type": "json", "type": "chat_template.default"}
    config(tmp_path, models, rl="deft_toy", poft=None, toy={"strength": 3.0}, datasets=[entry], dataset_num_proc=0,
           deft={"top_percent": 50, "omega": 0.5, "score_cache": "./scores"})  # fmt: skip
    output = axolotl(
        tmp_path,
        "train",
        "config.yml",
        "--launcher",
        "python",
        PYTHONPATH=str(third_party),
        AXOLOTL_DATASET_NUM_PROC="0",
    )
    best = sorted(rows, key=lambda row: -row["scores"][0])[:6]
    expected = [3.0 / len(row["chosen"]["content"].split()) for row in best]
    assert sorted(logged(output, "toy/bonus")) == pytest.approx(sorted(expected), rel=1e-3)
    assert len(logged(output, "deft/distribution_reward")) == 6
    assert (tmp_path / "out" / "discrepancy.safetensors").exists()


@pytest.mark.usefixtures("preprocessing")
def test_plan_score_export_import(models: SimpleNamespace, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(config(in_folder, models))
    plan = poft("plan", path, "--probe", "2")
    assert plan.exit_code == 0, plan.output
    assert re.search(r"ref_a .*12.*0 .*12 ", plan.output)
    assert "rows/s" in plan.output
    assert not list(in_folder.glob("scores/*/scores-*"))
    score = poft("score", path)
    assert score.exit_code == 0, score.output
    assert "rank correlation of ref_a and ref_b" in score.output
    exported = poft("export", path, "--out", "all.parquet")
    assert "24 lines" in exported.output
    table = pq.read_table("all.parquet")
    assert table.column_names == ["row_key", "model", "reward", "num_tokens"]
    assert set(table["model"].to_pylist()) == {str(models.ref_a), str(models.ref_b)}

    elsewhere = in_folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    other = str(config(elsewhere, models))
    imported = poft("import", other, str(in_folder / "all.parquet"))
    assert imported.exit_code == 0, imported.output
    again = poft("score", other)
    assert again.output.count("12 rows cached, 0 to score") == 2
    rows = poft("export", other, "--rows", "--out", "rows.parquet")
    assert rows.exit_code == 0
    assert pq.read_table("rows.parquet").column_names == [*table.column_names, "conversation"]


@pytest.mark.usefixtures("preprocessing")
def test_shards_by_hand(models: SimpleNamespace, in_folder: Path) -> None:
    path = str(config(in_folder, models))
    for shard in range(3):
        assert poft("score", path, "--num-shards", "3", "--shard", str(shard)).exit_code == 0
    assert poft("score", path).output.count("12 rows cached, 0 to score") == 2
    assert poft("score", path, "--num-shards", "3").exit_code == 2


@pytest.mark.usefixtures("preprocessing")
def test_show(models: SimpleNamespace, in_folder: Path) -> None:
    shown = poft("score", str(config(in_folder, models)), "--show", "3")
    assert shown.exit_code == 0, shown.output
    assert len(re.findall(r"data.jsonl row \d+ \(key [0-9a-f]{32}\): \d+ of \d+ tokens counted", shown.output)) == 6
    assert "[INST]" in shown.output
    assert "each token that counts is between « and »" in shown.output
    first = shown.output.split("tokens counted")[1]
    assert first.count("«") == first.count("»") > 0
    # ours comes first: neither the host's report nor its config
    said = [line for line in shown.output.splitlines() if line.strip() and not re.search(r"@|WARNING", line)]
    assert said[0].startswith(str(in_folder / "config.yml")[:20])
    assert "INFO" not in shown.output and "base_model" not in shown.output


def test_the_first_screen_is_ours(models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user runs it, in a process of its own: a logo, warnings of libraries, then the plan; nothing else."""
    monkeypatch.delenv("AXOLOTL_LOG_LEVEL")
    config(tmp_path, models)
    lines = [line for line in axolotl(tmp_path, "poft", "plan", "config.yml").splitlines() if line.strip()]
    assert len(lines) < 60
    assert not [line for line in lines if "INFO" in line or "DEBUG" in line]
    first = next(number for number, line in enumerate(lines) if line.startswith("config.yml: rl: poft"))
    assert not [line for line in lines[:first] if "[axolotl" in line]  # the host says nothing before
    assert sum("ref_" in line for line in lines[first:]) >= 2


@pytest.mark.usefixtures("preprocessing")
def test_names_are_no_markup(models: SimpleNamespace, in_folder: Path) -> None:
    references = [{"model": str(models.ref_a), "name": "[/x] :smile: [red]a"}]
    poft_block = {"references": references, "score_cache": str(in_folder / "scores")}
    path = str(config(in_folder, models, poft=poft_block))
    for arguments in (("plan", path), ("score", path, "--show", "1"), ("score", path)):
        ran = poft(*arguments)
        assert ran.exit_code == 0, ran.output
        assert "[/x] :smile: [red]a" in " ".join(ran.output.split())


@pytest.mark.usefixtures("preprocessing")
def test_errors_are_messages(models: SimpleNamespace, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = poft("plan", str(config(in_folder, models, poft={"references": [{"model": "./gone"}]})))
    assert gone.exit_code == 1
    assert "Error: reference ./gone: no such folder" in gone.output
    assert "Traceback" not in gone.output
    sft = poft("score", str(config(in_folder, models, rl=None, poft=None)))
    assert "`rl: null` asks for nothing of poft_plugin" in sft.output
    monkeypatch.setattr("poft_plugin.hosts.axolotl.raw_config.entry_points", lambda group: [])  # as before 0.21
    lost = poft("plan", str(config(in_folder, models, plugins=None)))
    assert "poft_plugin is not loaded, and nothing of it runs. Add the lines\nplugins:" in lost.output


def test_evaluate_merge_lora_and_inference_need_no_reference(
    models: SimpleNamespace, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file serves the host's other commands; evaluation reads the cache, the others not even that."""
    from axolotl.cli import evaluate, merge_lora
    from axolotl.cli.utils import load_model_and_tokenizer

    from poft_plugin.scoring.causal_lm import CausalLMScorer

    kernels = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, **kernels}
    path = config(in_folder, models, max_steps=2, val_set_size=3, **lora)
    hosting.train(path)
    monkeypatch.setattr(CausalLMScorer, "load", lambda *_: pytest.fail("a reference was loaded"))
    hosting.forget_plugins()
    evaluate.do_cli(str(path), lora_model_dir="./out")
    summary = (in_folder / "out" / "eval_summary.csv").read_text()
    assert re.search(r"^loss,[\d.]+,[\d.]+$", summary, re.M)
    assert re.search(r"^poft/coefficient,[\d.]+,[\d.]+$", summary, re.M)

    tiny.write_jsonl(in_folder / "gone" / "placeholder.jsonl", [])
    without = config(in_folder, models, poft={"references": [{"model": "./gone_reference"}]}, **lora)
    hosting.forget_plugins()
    merge_lora.do_cli(config=str(without), lora_model_dir="./out")
    assert list((in_folder / "out" / "merged").glob("*.safetensors"))
    cfg = hosting.load_config(without, base_model=str(in_folder / "out" / "merged"), adapter=None)
    model, tokenizer, _ = load_model_and_tokenizer(cfg=cfg, inference=True)
    ids = tokenizer("one two", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
