"""The command line with a preference method: two processes, `axolotl poft`, and what needs no reward model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import graded
import hosting
import oracles
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from axolotl.cli.main import cli
from click.testing import CliRunner, Result

ROWS, HELD_OUT = 16, 4
TOP = 50
KEPT = ROWS - oracles.ceil_percent(12.5, ROWS - HELD_OUT)
"""Rows of level A or B, and the evaluation rows."""
LEVEL_A = oracles.ceil_percent(TOP, ROWS - HELD_OUT)
COLUMNS = {"row_key", "model", "reward", "num_tokens", "sample_key", "response", "level", "source"}
KERNELS = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, **KERNELS}


def pairs() -> list[dict[str, Any]]:
    """Pairs without scores: a reward model makes them."""
    return [{k: v for k, v in row.items() if k != "scores"} for row in tiny.pair_rows(ROWS, seed=6)]


def config(folder: Path, models: SimpleNamespace, **settings: Any) -> Path:
    """`rl: deft_dpo` with the reward model `./grader` beside the config."""
    if not (folder / "data.jsonl").exists():
        tiny.write_jsonl(folder / "data.jsonl", pairs())
    deft = {"reward_model": {"model": "./grader"}, "top_percent": TOP, "omega": 0.5, **settings.pop("deft", {})}
    defaults: dict[str, Any] = {
        "base_model": str(models.policy),
        "datasets": [{"path": "./data.jsonl", "ds_type": "json", "type": "chat_template.default"}],
        "plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"],
        "rl": "deft_dpo",
        "deft": {k: v for k, v in deft.items() if v is not None},
        "val_set_size": HELD_OUT,
        "eval_strategy": "epoch",
        "output_dir": "./out",
        "dataset_prepared_path": "./prepared",
        "dataset_num_proc": 0,
    }
    return tiny.write_config(folder / "config.yml", **{**defaults, **settings})


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host prepares data in the process that asks; and what the commands write into the environment is undone."""
    monkeypatch.setenv("AXOLOTL_DATASET_NUM_PROC", "0")
    monkeypatch.setenv("AXOLOTL_IS_PREPROCESS", "1")
    monkeypatch.delenv("POFT_SCORE_CACHE", raising=False)


def poft(*arguments: str) -> Result:
    """`axolotl poft ...` in this process."""
    hosting.forget_plugins()
    return CliRunner().invoke(cli, ["poft", *arguments])


def ran(*arguments: str) -> str:
    """The same, and it went well."""
    result = poft(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def prepare(path: Path) -> Any:
    """The data sets that `axolotl train` would get."""
    return graded.host_datasets(path)[1]


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    for scorer in ("reward_model.RewardModelScorer", "causal_lm.CausalLMScorer", "start_policy.StartPolicyScorer"):
        monkeypatch.setattr(f"poft_plugin.scorers.{scorer}.load", lambda *_: pytest.fail("a model was loaded"))


def scored_rows(folder: Path) -> dict[str, list[int]]:
    """By contract: the rows in each file of scores."""
    found = {}
    for identity in folder.glob("poft_scores/*/identity.json"):
        files = sorted(identity.parent.glob("scores-*.parquet"))
        found[json.loads(identity.read_text())["contract"].split(",")[0]] = [
            pq.read_metadata(file).num_rows for file in files
        ]
    return found


def test_two_processes_score_and_train(models: SimpleNamespace, tmp_path: Path) -> None:
    """`axolotl train` with torchrun: each rank scores a share of both models, then both train, packed."""
    tiny.reward_model(tmp_path / "grader")
    config(tmp_path, models, sample_packing=True, sequence_len=256, num_epochs=2, save_strategy="epoch",
           deft={"train_on": "A+B"}, plugins=["poft_plugin.PoftPlugin"])  # fmt: skip
    script = Path(sys.executable).parent / "axolotl"
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "AXOLOTL_IS_PREPROCESS"}
    done = subprocess.run(
        [str(script), "train", "config.yml", "--launcher", "torchrun", "--", "--nproc_per_node=2"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280,
        env={**environment, "PATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    # rank 0 prints what is missing when it looks: the other rank may have written some rows by then
    for line, rows in (("reward model grader", ROWS - HELD_OUT), ("start policy policy", KEPT)):
        cached, left = map(int, re.search(rf"{line}: (\d+) rows cached, (\d+) to score", output).groups())
        assert cached + left == 2 * rows
    assert output.count("Grades: A = top 50 %") == 1
    for name, files in scored_rows(tmp_path).items():
        assert len(files) == 2, (name, files)
    assert sorted(map(sum, scored_rows(tmp_path).values())) == sorted([2 * (ROWS - HELD_OUT), 2 * KEPT])
    assert re.search(r"'loss': '[\d.]+'.*'deft/distribution_reward'", output)
    state = json.loads(max(tmp_path.glob("out/checkpoint-*/trainer_state.json")).read_text())
    assert state["epoch"] == pytest.approx(2.0)
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert {"eval_rewards/accuracies", "eval_dpo/loss", "eval_deft/distribution_reward"} <= evaluations[-1].keys()
    assert (tmp_path / "out" / "grading.json").exists() and (tmp_path / "out" / "discrepancy.safetensors").exists()
    assert "rl: deft_dpo" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def trained(models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A LoRA run of two steps whose rows `axolotl preprocess` had scored; then the reward model goes."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.reward_model(folder / "grader")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AXOLOTL_DATASET_NUM_PROC", "0")
        patch.chdir(folder)
        path = config(folder, models, max_steps=2, deft={"missing_scores": "error"}, **LORA)
        hosting.preprocess(path, patch)
        refuse_to_load(patch)
        run = hosting.train(path)
    (folder / "grader").rename(folder / "gone")
    return SimpleNamespace(folder=folder, path=path, run=run)


def test_after_preprocess_nothing_is_left_to_score(trained: SimpleNamespace) -> None:
    assert trained.run.trainer.state.global_step == 2
    assert len(trained.run.trainer.train_dataset) == LEVEL_A
    assert all("lora_" in name for name in trained.run.gradients[0])
    assert set(trained.run.logs[0]) >= {"dpo/loss", "deft/distribution_reward", "rewards/margins"}
    # the adapter begins at zero: policy and reference are one
    assert trained.run.logs[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)


def test_evaluation_needs_the_policy_alone(trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference numbers come from the cache, the discrepancy from the run's folder, scores are not asked for."""
    from axolotl.cli import evaluate

    monkeypatch.chdir(trained.folder)
    refuse_to_load(monkeypatch)
    hosting.forget_plugins()
    evaluate.do_cli(str(trained.path), lora_model_dir="./out")
    lines = (trained.folder / "out" / "eval_summary.csv").read_text()
    summary = {name: values for name, *values in (line.split(",") for line in lines.splitlines())}
    last = trained.run.evaluations[-1]
    for name in ("loss", "dpo/loss", "deft/distribution_reward", "rewards/margins"):
        assert float(summary[name][1]) == pytest.approx(last[f"eval_{name}"], rel=1e-4, abs=1e-5), name
    kept = trained.folder / "out" / "discrepancy.safetensors"
    kept.rename(kept.with_suffix(".kept"))
    hosting.forget_plugins()
    with pytest.raises(ValueError, match=r"discrepancy\.safetensors: no such file.*Set `output_dir:`.*`omega: 0`"):
        evaluate.do_cli(str(trained.path), lora_model_dir="./out")
    kept.with_suffix(".kept").rename(kept)


def test_merge_and_inference_need_the_policy_alone(trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.cli import merge_lora
    from axolotl.cli.utils import load_model_and_tokenizer

    monkeypatch.chdir(trained.folder)
    hosting.forget_plugins()
    merge_lora.do_cli(config=str(trained.path), lora_model_dir="./out")
    assert list((trained.folder / "out" / "merged").glob("*.safetensors"))
    cfg = hosting.load_config(trained.path, base_model=str(trained.folder / "out" / "merged"), adapter=None)
    model, tokenizer, _ = load_model_and_tokenizer(cfg=cfg, inference=True)
    ids = tokenizer("one two", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_plan_score_export_import(models: SimpleNamespace, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.reward_model(in_folder / "grader")
    path = str(config(in_folder, models))
    plan = ran("plan", path, "--probe", "1")
    assert re.search(r"grader.*24.*0 .*24 ", plan) and re.search(r"policy.*32.*0 .*at most 32 ", plan)
    assert plan.count("rows/s") == 2
    assert not list(in_folder.glob("poft_scores/*/scores-*"))
    shown = ran("score", path, "--show", "2")
    heads = r"grader: data.jsonl row (\d+) \(key [0-9a-f]{32}\): (chosen|rejected): \d+ of \d+ tokens counted"
    (first, a), (_, b), (second, c), (_, d) = re.findall(heads, shown)
    assert (first != second, [a, b, c, d]) == (True, ["chosen", "rejected"] * 2)
    ran("score", path)
    refuse_to_load(monkeypatch)
    assert "Grades: A = top" in ran("plan", path)  # all is scored
    again = ran("score", path)
    assert "reward model grader: 24 rows cached, 0 to score" in again
    assert f"start policy policy: {2 * (LEVEL_A + HELD_OUT)} rows cached, 0 to score" in again
    assert f"{2 * (ROWS - HELD_OUT)} lines" in ran("export", path, "--out", "all.parquet")
    table = pq.read_table("all.parquet")
    assert set(table.column_names) == COLUMNS
    lines = table.to_pylist()
    assert {line["model"] for line in lines} == {"./grader"}
    letters = [line["level"] for line in lines if line["response"] == 0]
    assert (letters.count("A"), letters.count(None)) == (LEVEL_A, 0)  # evaluation rows have neither level nor score
    assert [line["response"] for line in lines] == [0, 1] * (ROWS - HELD_OUT)
    levels_of_rows = {(line["sample_key"], line["level"]) for line in lines}
    assert len(levels_of_rows) == ROWS - HELD_OUT
    assert f"{2 * LEVEL_A} lines" in ran("export", path, "--out", "a.parquet", "--levels", "A", "--rows")
    with_texts = pq.read_table("a.parquet")
    assert set(with_texts.column_names) == {*COLUMNS, "conversation"}
    assert set(with_texts["level"].to_pylist()) == {"A"}
    rows_are_read_again(models, in_folder, path, lines, monkeypatch)


def rows_are_read_again(
    models: SimpleNamespace, folder: Path, path: str, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Level A as JSON lines is a data set with scores: trained on as it is, it asks for no reward model."""
    assert f"{LEVEL_A} lines" in ran("export", path, "--out", "a.jsonl", "--levels", "A", "--format", "jsonl")
    written = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    assert {row["level"] for row in written} == {"A"}
    raw = {(row["messages"][0]["content"], row["chosen"]["content"], row["rejected"]) for row in pairs()}
    assert {(r["messages"][0]["content"], r["chosen"]["content"], r["rejected"]["content"]) for r in written} <= raw
    again = tiny.write_config(
        folder / "again.yml",
        base_model=str(models.policy),
        datasets=[{"path": "./a.jsonl", "ds_type": "json", "type": "chat_template.default"}],
        plugins=["poft_plugin.PoftPlugin"], rl="deft_pro", deft={"top_percent": 100, "bottom_percent": 0},
        output_dir="./again", dataset_prepared_path="./prepared", dataset_num_proc=0,
    )  # fmt: skip
    rows = prepare(again).train_dataset
    rewards = {(line["sample_key"], line["response"]): line["reward"] for line in lines}
    assert len(rows) == LEVEL_A
    for key, scores in zip(rows["row_key"], rows["scores"], strict=True):
        assert list(scores) == [rewards[key, 0], rewards[key, 1]]


@pytest.fixture(scope="module")
def exported(models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scores of the reward model, as a file; they were made in three shards, by hand."""
    folder = tmp_path_factory.mktemp("exported")
    tiny.reward_model(folder / "grader")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AXOLOTL_DATASET_NUM_PROC", "0")
        patch.setenv("AXOLOTL_IS_PREPROCESS", "1")
        patch.chdir(folder)
        path = str(config(folder, models))
        again = [*range(3)] * 2  # the start policy scores what is graded: when all shares are in
        outputs = [ran("score", path, "--num-shards", "3", "--shard", str(shard)) for shard in again]
        assert "start policy policy: after all shares, with every share again" in outputs[0]
        counts = [re.findall(r"(\w+): shard \d of 3: (\d+) rows scored", output) for output in outputs]
        for name, rows in (("grader", ROWS - HELD_OUT), ("policy", LEVEL_A + HELD_OUT)):
            assert sum(int(count) for shard in counts for model, count in shard if model == name) == 2 * rows
        refuse_to_load(patch)
        ran("export", path, "--out", "all.parquet")
    return folder / "all.parquet"


def changed(path: Path, shift: float, **columns: list[Any]) -> str:
    """A file as somebody else would write it: other numbers, above 0 too, and no word on who made them."""
    table = pq.read_table(path)
    rewards = [reward + shift for reward in table["reward"].to_pylist()]
    assert max(rewards) > 0
    pq.write_table(pa.table({"row_key": table["row_key"], "reward": rewards, **columns}), "theirs.parquet")
    return "theirs.parquet"


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_imported_scores_replace_a_model_that_is_gone(
    models: SimpleNamespace, in_folder: Path, exported: Path, shift: float
) -> None:
    path = config(in_folder, models, rl="deft_pro")
    gone = poft("score", str(path))
    assert gone.exit_code == 1
    assert "Error: reward model ./grader: no such folder" in gone.output and "Traceback" not in gone.output
    file = changed(exported, shift) if shift else str(exported)
    assert f"./grader: {2 * (ROWS - HELD_OUT)} scores imported" in ran("import", str(path), file)
    assert "reward model grader: 24 rows cached, 0 to score" in ran("score", str(path))
    rows = prepare(path).train_dataset
    lines = pq.read_table(exported).to_pylist()
    rewards = {(line["sample_key"], line["response"]): line["reward"] + shift for line in lines}
    assert len(rows) == LEVEL_A
    for key, scores in zip(rows["row_key"], rows["scores"], strict=True):
        assert list(scores) == pytest.approx([rewards[key, 0], rewards[key, 1]], abs=1e-9)


def test_what_the_commands_refuse(models: SimpleNamespace, in_folder: Path, exported: Path) -> None:
    path = str(config(in_folder, models, rl="deft_pro"))
    for levels in ("D", "A,B", "A+"):
        assert (
            f"--levels {levels}: letters A, B, C, joined by +"
            in poft("export", path, "--out", "x", "--levels", levels).output
        )
    half = pq.read_table(exported).slice(0, ROWS)
    pq.write_table(half, "half.parquet")
    ran("import", path, "half.parquet")
    lacking = poft("score", path)
    assert lacking.exit_code == 1
    assert f"its imported scores lack {ROWS - 2 * HELD_OUT} of {2 * (ROWS - HELD_OUT)} rows" in lacking.output
    pq.write_table(pa.table({"row_key": ["0" * 32], "reward": [1.0]}), "foreign.parquet")
    assert (
        "1 row keys of './grader' are no rows of this config's data" in poft("import", path, "foreign.parquet").output
    )
    scored = tiny.write_jsonl(in_folder / "scored.jsonl", tiny.pair_rows(9))
    entry = {"path": str(scored), "ds_type": "json", "type": "chat_template.default"}
    without = str(config(in_folder, models, rl="deft_pro", datasets=[entry], deft={"reward_model": None}))
    planned = ran("plan", without)  # the data's own scores: the plan is done, and grades can be shown
    assert "nothing to score" in planned
    assert "Grades: A = top" in planned and "scored.jsonl" in planned
    assert "no model is asked for with these settings" in poft("import", without, str(exported)).output
    assert f"{2 * (9 - HELD_OUT)} lines" in ran("export", without, "--out", "data.parquet")
    assert set(pq.read_table("data.parquet")["model"].to_pylist()) == {"data"}
    ungraded = {"reward_model": None, "omega": 0, "train_on": "all"}
    nothing = str(config(in_folder, models, rl="deft_pro", datasets=[entry], deft=ungraded))
    assert "with these settings grades nothing" in poft("export", nothing, "--out", "x").output
    assert "Grades" not in ran("plan", nothing)


def test_rows_are_listed_without_the_reward_model(models: SimpleNamespace, in_folder: Path) -> None:
    """For scoring elsewhere: every response's key and text, though the model is not here and nothing is graded."""
    path = str(config(in_folder, models, deft={"reward_model": {"model": "./elsewhere"}, "score_cache": "./scores"}))
    listed = ran("export", path, "--rows", "--out", "rows.parquet")
    count = 2 * (ROWS - HELD_OUT)  # evaluation rows need no score
    assert f"{count} lines; rows without a score: ./elsewhere: {count}" in listed
    lines = pq.read_table("rows.parquet").to_pylist()
    assert {line["reward"] for line in lines} == {None}
    assert all(line["conversation"] for line in lines)
    assert not (in_folder / "out" / "grading.json").exists()
