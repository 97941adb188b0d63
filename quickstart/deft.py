"""The quickstart's second half: preference pairs, two reward models, then `rl: dpo` and `rl: deft_dpo` on those pairs.

    python -m quickstart.deft

tries it alone on what an earlier `python -m quickstart.run` left behind: its SFT model, with which both trainings
begin, and its references, whose bodies the reward models begin with.
"""

import json
import math
import multiprocessing
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from poft_plugin.config import DeftConfig
from poft_plugin.data.grading import LEVELS, grade_levels
from poft_plugin.preprocessors.grades import grade_score
from quickstart import evaluate, models, preferences, report, task
from quickstart.preferences import Pair
from quickstart.reward_model import fit_reward_model, make_reward_model, rewards
from quickstart.stage import ROOT, SEED, SIZES, WORK, Clock, axolotl, check_axolotl, console, log_file
from quickstart.task import Row

Rows = dict[str, list[Row]]

DEFT_CONFIG = ROOT / "example_configs" / "deft-quickstart.yml"
DPO_CONFIG = WORK / "dpo.yml"
PAIRS_FILE = WORK / "pairs.jsonl"

PAIRS = 2000
ANSWERS = 4  # sampled for each question
EXCHANGED = 0.2
# DEFT's is in its config. Each is the best of 1e-5, 3e-5, 1e-4 and 3e-4 for its method, by the reward of answers to
# questions that come up nowhere else: a method with a tenth of the steps need not have the same one.
DPO_LEARNING_RATE = 3.0e-5

REWARD_RECIPE = models.Recipe(steps=150, batch_size=64, learning_rate=1e-3)
REWARD_MODELS = {"reward_train": "reference_a", "reward_eval": "reference_b"}  # name -> where its body comes from

END = "'train_runtime'"  # logged by the host's trainer when its loop is done, before the last state of the progress bar
SECONDS = re.compile(END + r": '([\d.]+)'")
STEPS = re.compile(r"\b(\d+)/\1 \[")


def compare(rows: Rows, clock: Clock, *, first: int, of: int) -> dict[str, Any]:
    """All steps in order; what `report.preference_table` shows.

    Args:
        rows: `heldout`, `reference` and `preference` questions, with the right answers.
        clock: takes the seconds of the steps.
        first: number of the first of the five steps.
        of: how many steps there are in all.
    """
    number = iter(f"{step}/{of}" for step in range(first, of + 1))
    with clock.step("reward_models", f"{next(number)} two reward models on the references' bodies, each on one core"):
        accuracy = train_reward_models(rows)
    with clock.step("pairs", f"{next(number)} preference pairs: answers sampled from the SFT model"):
        pairs = build_pairs(rows["preference"])
        DPO_CONFIG.write_text(yaml.safe_dump(dpo_settings(), sort_keys=False), encoding="utf-8")
    with clock.step("dpo", f"{next(number)} axolotl train: the host's DPO, from the SFT model"):
        axolotl("dpo", "train", str(DPO_CONFIG), "--launcher", "python")
    with clock.step("deft_dpo", f"{next(number)} axolotl train: DEFT-DPO, same pairs, same epochs, scoring included"):
        axolotl("deft_dpo", "train", str(DEFT_CONFIG), "--launcher", "python")
    with clock.step("evaluate_deft", f"{next(number)} held-out answers and their rewards"):
        runs = {name: {"seconds": clock.seconds[name], **training(name)} for name in ("dpo", "deft_dpo")}
        runs["dpo"]["rows"] = len(pairs)
        runs["deft_dpo"]["rows"] = level_a_rows(WORK / "deft_dpo")
        quality = {name: measure(WORK / name, rows["heldout"]) for name in ("sft", "dpo", "deft_dpo")}
        levels = kinds_by_level(pairs)
    return {"quality": quality, "training": runs, "pairs": levels, "reward_model_accuracy": accuracy}


def train_reward_models(rows: Rows) -> dict[str, float]:
    """Trains both at the same time, each on its own half of the rows; returns the share of held-out pairs in order."""
    half = len(rows["reference"]) // 2
    parts = dict(zip(REWARD_MODELS, (rows["reference"][:half], rows["reference"][half:]), strict=True))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(parts), context, torch.set_num_threads, (1,)) as pool:
        running = {name: pool.submit(_train_reward_model, name, part, rows["heldout"]) for name, part in parts.items()}
        return {name: future.result() for name, future in running.items()}


def _train_reward_model(name: str, rows: list[Row], heldout: list[Row]) -> float:
    """Trains and saves one reward model on right answers against spoiled ones."""
    disable_progress_bar()
    body, tokenizer = load(WORK / REWARD_MODELS[name])
    model = make_reward_model(body, SEED)
    fit_reward_model(model, tokenizer, _against_spoiled(rows), REWARD_RECIPE, SEED)
    models.save(model, tokenizer, WORK / name)
    right, wrong = (rewards(model, tokenizer, list(side)) for side in zip(*_against_spoiled(heldout), strict=True))
    return round(fmean(better > worse for better, worse in zip(right, wrong, strict=True)), 4)


def _against_spoiled(rows: list[Row]) -> list[tuple[Row, Row]]:
    return list(zip(rows, task.spoil(rows, 1.0, SEED), strict=True))


def build_pairs(questions: list[Row]) -> list[Pair]:
    """Samples answers from the SFT model and writes the pairs that both trainings read."""
    answers = evaluate.samples(*load(WORK / "sft"), questions, count=ANSWERS, seed=SEED)
    pairs = preferences.make_pairs(questions, answers, size=PAIRS, exchanged=EXCHANGED, seed=SEED)
    preferences.write_pairs(pairs, PAIRS_FILE)
    return pairs


def dpo_settings() -> dict[str, Any]:
    """The DEFT config without DEFT, and with DPO's own learning rate: the host's plain DPO."""
    settings: dict[str, Any] = yaml.safe_load(DEFT_CONFIG.read_text(encoding="utf-8"))
    for key in ("plugins", "deft"):
        del settings[key]
    return settings | {"rl": "dpo", "learning_rate": DPO_LEARNING_RATE, "output_dir": "./quickstart/work/dpo"}


def training(name: str) -> dict[str, float]:
    """Optimizer steps, and seconds of the training loop alone, as the log of a training says."""
    log = log_file(name).read_text(encoding="utf-8", errors="replace")
    end = log[log.rindex(END) :]
    return {"steps": int(STEPS.findall(end)[0]), "loop_seconds": float(SECONDS.findall(end)[0])}


def level_a_rows(folder: Path) -> int:
    """How many rows a DEFT run trained on, out of the summary that it left in its output folder."""
    summary = json.loads((folder / "grading.json").read_text(encoding="utf-8"))
    return sum(group["level_a"] - group["level_a_lost"] for group in summary["groups"])


def measure(folder: Path, heldout: list[Row]) -> dict[str, float]:
    """Mean reward of a model's greedy answers by either reward model, and the share that is exactly right."""
    found = evaluate.answers(*load(folder), heldout)
    answered = [replace(row, answer=text) for row, text in zip(heldout, found, strict=True)]
    means = {name: fmean(rewards(*load_reward_model(WORK / name), answered)) for name in REWARD_MODELS}
    exact = fmean(row.answer == task.solve(row.prompt) for row in answered)
    return {name: round(value, 4) for name, value in (means | {"exact_match": exact}).items()}


def kinds_by_level(pairs: list[Pair]) -> dict[str, dict[str, int]]:
    """What is in each level of the DEFT run: how many pairs of each kind. Training itself cannot know."""
    settings = DeftConfig(**yaml.safe_load(DEFT_CONFIG.read_text(encoding="utf-8"))["deft"])
    sides = zip(*(pair.rows() for pair in pairs), strict=True)
    scores = [rewards(*load_reward_model(WORK / "reward_train"), list(side)) for side in sides]
    best = [grade_score(both) for both in zip(*scores, strict=True)]
    levels = grade_levels(best, top_percent=settings.top_percent, bottom_percent=settings.bottom_percent)
    assert levels.count("A") == math.ceil(settings.top_percent * len(pairs) / 100)
    found = {level: [pair for pair, its in zip(pairs, levels, strict=True) if its == level] for level in LEVELS}
    return {level: preferences.count_kinds(inside) for level, inside in found.items()}


def load(folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """A language model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def load_reward_model(folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """A reward model and its tokenizer."""
    return AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def main() -> None:
    """The second half alone."""
    clock = Clock()
    disable_progress_bar()
    check_axolotl()
    if missing := [name for name in ("sft", *REWARD_MODELS.values()) if not (WORK / name).is_dir()]:
        raise SystemExit(f"{WORK} has no {', '.join(missing)}: run `python -m quickstart.run` first")
    for name in ("deft_scores", "dpo", "deft_dpo", "prepared_pairs"):
        shutil.rmtree(WORK / name, ignore_errors=True)
    console.print(report.preference_table(compare(task.splits(SIZES, SEED), clock, first=1, of=5)))


if __name__ == "__main__":
    main()
