"""`axolotl evaluate`: the trained model, on the rows and against the reference that it was trained with."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import pytest
import tiny

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
LORA |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
PAIRS = {"path": "pairs.jsonl", "ds_type": "json", "type": "chat_template.default"}
CHATS = {"path": "chats.jsonl", "ds_type": "json", "type": "chat_template"}
CONFIG = Path("config.yml")
DEFT = {"top_percent": 50, "bottom_percent": 25, "omega": 0.01, "score_cache": "scores"}
RUNS: dict[str, dict[str, Any]] = {
    "poft": {"rl": "poft", "datasets": [CHATS], "sample_packing": True},
    "deft_dpo": {"rl": "deft_dpo", "datasets": [PAIRS], "deft": DEFT},
    "deft_rrhf packed": {"rl": "deft_rrhf", "datasets": [PAIRS], "deft": DEFT, "sample_packing": True},
    "pro": {"rl": "pro", "datasets": [PAIRS]},
    "deft_dpo lora": {"rl": "deft_dpo", "datasets": [PAIRS], "deft": DEFT, **LORA},
}


def write(models: SimpleNamespace, run: dict[str, Any]) -> Path:
    """Data and config in the working folder; no seed."""
    tiny.write_jsonl(Path("pairs.jsonl"), tiny.pair_rows(10))
    tiny.write_jsonl(Path("chats.jsonl"), tiny.chat_rows(10))
    settings = {
        "base_model": str(models.policy), "plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"], "seed": None,
        "val_set_size": 3, "eval_strategy": "epoch", "eval_batch_size": 2, "micro_batch_size": 2, "output_dir": "./out",
        "dataset_prepared_path": "./prepared", "learning_rate": 3e-3, "save_strategy": "steps", "save_steps": 1, **run,
    }  # fmt: skip
    if run["rl"] == "poft":
        settings["poft"] = {"references": [{"model": str(models.ref_a)}], "score_cache": "scores"}
    return tiny.write_config(CONFIG, **settings)


def evaluate(path: Path, **options: str) -> dict[str, tuple[str, str]]:
    """The command on a config; the table that it writes: training, validation."""
    from axolotl.cli import evaluate as command

    hosting.forget_plugins()
    command.do_cli(str(path), **options)
    with Path("out/eval_summary.csv").open() as file:
        return {row["metric"]: (row["training"], row["validation"]) for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def trained(models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SimpleNamespace]:
    """Each run, trained when it is first asked for; the policy as a copy of its own lies beside it."""
    found: dict[str, SimpleNamespace] = {}

    def train(name: str) -> SimpleNamespace:
        if name not in found:
            folder = tmp_path_factory.mktemp("evaluated")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                shutil.copytree(models.policy, "other")
                found[name] = SimpleNamespace(folder=folder, run=hosting.train(write(models, RUNS[name])))
        return found[name]

    return train


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, trained: Callable[[str], SimpleNamespace]) -> Callable[[str], Any]:
    """Goes to a run's folder; what it did."""
    monkeypatch.setattr("sys.argv", ["axolotl"])

    def go(name: str) -> Any:
        monkeypatch.chdir(trained(name).folder)
        return trained(name).run

    return go


@contextmanager
def reversed_files() -> Iterator[None]:
    """The same rows in another order."""
    for turn in range(2):
        for file in ("pairs.jsonl", "chats.jsonl"):
            Path(file).write_text("".join(reversed(Path(file).read_text().splitlines(keepends=True))))
        if turn == 0:
            yield


@contextmanager
def changed(path: Path, content: bytes | None) -> Iterator[None]:
    """A file with another content, or without."""
    before = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    yield
    path.write_bytes(before)


@pytest.mark.parametrize("name", RUNS)
def test_the_trained_model_on_its_rows_against_its_reference(
    models: SimpleNamespace, inside: Callable[[str], Any], name: str
) -> None:
    """The numbers of the last evaluation of the training run, though the data lie in another order, prepared anew."""
    run = inside(name)
    assert run.trainer.state.global_step >= 1
    record = json.loads(Path("out/poft/run.json").read_text())
    assert (record["rl"], record["start"]["base_model"]) == (RUNS[name]["rl"], str(models.policy))
    assert record["finished"]
    with reversed_files():
        found = evaluate(CONFIG, **trained_model(name))
    expected = run.evaluations[-1]
    compared = [key for key in expected if "loss" in key or "/" in key]
    assert len(compared) > 3
    for key in compared:
        if "per_second" not in key and "accuracies" not in key:
            assert float(found[key.removeprefix("eval_")][1]) == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key


def trained_model(name: str, place: str = "./out") -> dict[str, str]:
    """The option of the documented way."""
    return {"lora_model_dir" if "lora" in name else "base_model": place}


@pytest.mark.parametrize("name", RUNS)
def test_another_model_is_refused_with_the_line_to_write(inside: Callable[[str], Any], name: str) -> None:
    """The start model, a copy of it, an adapter's run as if it were a whole model, an adapter on another base."""
    inside(name)
    option = "--lora-model-dir" if "lora" in name else "--base-model"
    line = rf"Write: `axolotl evaluate config\.yml {option} \./out`$"
    wrong: list[dict[str, str]] = [{}, {"base_model": "./other"}]
    if "lora" in name:
        wrong += [{"base_model": "./out"}, {"base_model": "./other", "lora_model_dir": "./out"}]
    for options in wrong:
        what = "the adapter in out was trained on .*not on base_model" if len(options) == 2 else "not what was trained"
        with pytest.raises(ValueError, match=f"^axolotl evaluate: .*{what}.*{line}"):
            evaluate(CONFIG, **options)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", None, r"out/poft/run\.json: no such file: nothing was trained into output_dir.*`axolotl train"),
        ("run.json", b"{", r"out/poft/run\.json: not the record of a training run.*train again, or restore it"),
        ("run.json", b"[]", r"run\.json: not the record of a training run"),
        ("run.json", b"{}", r"run\.json: not the record of a training run"),
        ("run.json", b"\xff", r"run\.json: not the record of a training run"),
        ("rows.parquet", None, r"out/poft/rows\.parquet: not readable .*train again, or restore it"),
        ("rows.parquet", b"PAR1", r"out/poft/rows\.parquet: not readable .*train again, or restore it"),
    ],
)
def test_a_record_that_is_not_there_or_damaged(
    inside: Callable[[str], Any], file: str, content: bytes | None, message: str
) -> None:
    inside("poft")
    with changed(Path("out/poft") / file, content), pytest.raises(ValueError, match=message):
        evaluate(CONFIG, base_model="./out")


@pytest.mark.parametrize("changes", [*({key: 3.5} for key in ("rl", "settings", "start", "finished")), {"start": {}}])
def test_a_record_with_a_value_of_another_kind(inside: Callable[[str], Any], changes: dict[str, Any]) -> None:
    inside("poft")
    record = json.loads(Path("out/poft/run.json").read_text())
    damaged = json.dumps({**record, **changes}).encode()
    with changed(Path("out/poft/run.json"), damaged), pytest.raises(ValueError, match="not the record of a training"):
        evaluate(CONFIG, base_model="./out")


def test_a_run_that_did_not_end_has_checkpoints(inside: Callable[[str], Any]) -> None:
    """They are evaluated by name, and the start model is not."""
    run = inside("poft")
    record = json.loads(Path("out/poft/run.json").read_text())
    with changed(Path("out/poft/run.json"), json.dumps({**record, "finished": False}).encode()):
        with pytest.raises(ValueError, match=r"did not come to its end.*--base-model \./out/checkpoint-STEP`$"):
            evaluate(CONFIG, base_model="./out")
        found = evaluate(CONFIG, base_model=f"./out/checkpoint-{run.trainer.state.global_step}")
    assert float(found["loss"][1]) == pytest.approx(run.evaluations[-1]["eval_loss"], rel=1e-4)


def test_other_settings_or_another_method_are_refused(models: SimpleNamespace, inside: Callable[[str], Any]) -> None:
    inside("deft_dpo")
    for change, message in (
        ({"deft": {**DEFT, "omega": 0.02}}, r"other settings \(deft\.omega\)"),
        ({"rl_beta": 0.7}, r"other settings \(keys\.rl_beta\)"),
        ({"rl": "deft_rrhf"}, r"rl: deft_dpo than this config says"),
    ):
        write(models, {**RUNS["deft_dpo"], **change})
        with pytest.raises(ValueError, match=f"was trained with {message}.*--base-model ./out`$"):
            evaluate(CONFIG, base_model="./out")
    write(models, RUNS["deft_dpo"])


@pytest.mark.parametrize("name", ["poft", "deft_dpo"])
def test_rows_that_are_gone_are_counted(inside: Callable[[str], Any], name: str) -> None:
    """A row less in the data: the evaluation would be another one."""
    inside(name)
    file = Path("chats.jsonl" if name == "poft" else "pairs.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    with (
        changed(file, b"".join(lines[1:])),
        pytest.raises(ValueError, match=r"\d+ of \d+ rows that were (eval|tr)") as e,
    ):
        evaluate(CONFIG, base_model="./out")
    assert re.search(r"are not there any more, the first of key [0-9a-f]{32}\. Restore `datasets:`", str(e.value))
