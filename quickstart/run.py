"""The quickstart: everything is built from nothing; SFT against PoFT, then DPO against DEFT-DPO, on held-out rows.

    python -m quickstart.run

from the project root, in an environment with Axolotl and this plugin. It needs no network and no GPU.
"""

import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from quickstart import STARTED, deft, evaluate, models, report, task
from quickstart.stage import ROOT, SEED, SIZES, WORK, Clock, axolotl, check_axolotl

POFT_CONFIG = ROOT / "example_configs" / "poft-quickstart.yml"
SFT_CONFIG = WORK / "sft.yml"

SPOILED_SHARE = 0.3
SHAPE = models.Shape(hidden=128, layers=3, heads=4)
# The references see more rows than the policy, all of them clean: they have to know a right answer when they see one.
REFERENCE_RECIPE = models.Recipe(steps=600, batch_size=64, learning_rate=3e-3)
REFERENCES = {"reference_a": models.REFERENCE_A, "reference_b": models.REFERENCE_B}


def main() -> None:
    """Runs all steps in order."""
    clock = Clock()
    disable_progress_bar()
    check_axolotl()
    _clear()
    with clock.step("build", "1/12 data, tokenizers and base model, from nothing"):
        rows = _build()
    with clock.step("references", "2/12 two references, trained on clean rows, each on one core"):
        trained_on_clean = _train_references(rows)
    with clock.step("score", "3/12 axolotl poft score: both references, every row"):
        axolotl("score", "poft", "score", str(POFT_CONFIG))
    with clock.step("export", "4/12 axolotl poft export: the scores, for the report"):
        axolotl("export", "poft", "export", str(POFT_CONFIG), "--rows", "--out", str(WORK / "scores.parquet"))
    with clock.step("sft", "5/12 axolotl train: SFT"):
        axolotl("sft", "train", str(SFT_CONFIG), "--launcher", "python")
    with clock.step("poft", "6/12 axolotl train: PoFT, same rows, same epochs"):
        axolotl("poft", "train", str(POFT_CONFIG), "--launcher", "python")
    with clock.step("evaluate", "7/12 held-out answers, and tau of every training row"):
        results = _measure(rows)
    results["exact_match"] |= trained_on_clean
    results["preferences"] = deft.compare(rows, clock, first=8, of=12)
    results["seconds"] = clock.seconds | {"total": round(time.perf_counter() - STARTED, 1)}
    report.publish(results, rows["train"], ROOT / "quickstart")


def _clear() -> None:
    """Starts from nothing, so that no result of an earlier run can pass for one of this run."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    for name in (report.RESULTS, report.PICTURE):
        (ROOT / "quickstart" / name).unlink(missing_ok=True)


def _build() -> dict[str, list[task.Row]]:
    """Row sets, the base model with its tokenizer, and the SFT config."""
    rows = task.splits(SIZES, SEED)
    rows["train"] = task.spoil(rows["train"], SPOILED_SHARE, SEED)
    task.write_jsonl(rows["train"], WORK / "train.jsonl")
    task.write_jsonl(rows["heldout"], WORK / "heldout.jsonl")
    task.write_labels(rows["train"], WORK / "spoiled.json")
    tokenizer = models.make_tokenizer(models.POLICY, rows["reference"])
    models.save(models.make_model(tokenizer, SHAPE, SEED), tokenizer, WORK / "base")
    SFT_CONFIG.write_text(yaml.safe_dump(_sft_settings(), sort_keys=False), encoding="utf-8")
    return rows


def _sft_settings() -> dict[str, Any]:
    """The PoFT config without PoFT: what is left is the host's plain supervised fine-tuning."""
    settings: dict[str, Any] = yaml.safe_load(POFT_CONFIG.read_text(encoding="utf-8"))
    for key in ("plugins", "rl", "poft"):
        del settings[key]
    return settings | {"output_dir": "./quickstart/work/sft"}


def _train_references(rows: dict[str, list[task.Row]]) -> dict[str, float]:
    """Trains both at the same time in processes of their own; returns their held-out exact match."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(REFERENCES), context, torch.set_num_threads, (1,)) as pool:
        running = {name: pool.submit(_train_reference, name, rows) for name in REFERENCES}
        return {name: future.result() for name, future in running.items()}


def _train_reference(name: str, rows: dict[str, list[task.Row]]) -> float:
    """Trains and saves one reference with its own tokenizer and template; returns its held-out exact match."""
    disable_progress_bar()
    tokenizer = models.make_tokenizer(REFERENCES[name], rows["reference"])
    model = models.make_model(tokenizer, SHAPE, SEED)
    models.fit(model, tokenizer, rows["reference"], REFERENCE_RECIPE, SEED)
    models.save(model, tokenizer, WORK / name)
    return evaluate.exact_match(model, tokenizer, rows["heldout"])


def _measure(rows: dict[str, list[task.Row]]) -> dict[str, Any]:
    """Exact match of both policies, and the preference score and tau of every training row."""
    exact_match = {}
    for name in ("sft", "poft"):
        tokenizer = AutoTokenizer.from_pretrained(WORK / name)
        model = AutoModelForCausalLM.from_pretrained(WORK / name).eval()
        exact_match[name] = evaluate.exact_match(model, tokenizer, rows["heldout"])
    scores = report.preference_scores(WORK / "scores.parquet", rows["train"])
    logps = evaluate.mean_logps(model, tokenizer, rows["train"])
    return {"exact_match": exact_match, "preference_score": scores, "tau": evaluate.taus(scores, logps)}


if __name__ == "__main__":
    main()
