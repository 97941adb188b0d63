"""Preference rows with scores, prepared by the host in this process, and graded and counted by hand."""

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosting
import numpy as np
import oracles
import tiny
import torch
from axolotl.integrations.base import PluginManager
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

Row = dict[str, Any]

TOP, BOTTOM = 30, 20
DEFT = {"top_percent": TOP, "bottom_percent": BOTTOM, "train_on": "all", "omega": 0.5}
TYPES = {"lists": "poft_plugin.ranked", "pairs": "chat_template.default"}


def raw_rows() -> dict[str, list[Row]]:
    """Two files; every row has a name in its prompt, a topic, and scores of which no two are equal."""
    files = {"lists": tiny.ranked_rows(23, seed=1), "pairs": tiny.pair_rows(14, seed=2)}
    rng = random.Random(3)
    for name, rows in files.items():
        for number, row in enumerate(rows):
            row["scores"] = [rng.gauss(0.5 * (name == "pairs"), 1) for _ in row["scores"]]
            row["topic"] = "odd" if number % 2 else "even"
            if name == "lists":
                row["prompt"] = f"{name} {row['prompt']}"
            else:
                row["messages"][0]["content"] = f"{name} {row['messages'][0]['content']}"
    return files


def name_of(row: Row) -> str:
    """`lists 3`: the file and the number that a raw row's prompt begins with."""
    return str(row.get("prompt") or row["messages"][0]["content"]).partition(":")[0]


def texts_of(row: Row) -> list[str]:
    """The responses of a raw row, in its order."""
    return row.get("responses") or [row["chosen"]["content"], row["rejected"]]


def ordered(row: Row) -> list[tuple[str, float]]:
    """Responses and scores, the best first: a list goes by its scores, a pair by its labels."""
    responses = list(zip(texts_of(row), row["scores"], strict=True))
    return sorted(responses, key=lambda pair: -pair[1]) if "responses" in row else responses


def config(folder: Path, models: SimpleNamespace, files: dict[str, list[Row]], **settings: Any) -> Path:
    for name, rows in files.items():
        tiny.write_jsonl(folder / f"{name}.jsonl", rows)
    deft = {**DEFT, "score_cache": str(folder / "scores"), **settings.pop("deft", {})}
    entries = [entry(folder, name) for name in files if name in TYPES]
    defaults: dict[str, Any] = {
        "base_model": str(models.policy),
        "datasets": entries,
        "plugins": ["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"],
        "rl": "deft_pro",
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 0,
    }
    return tiny.write_config(folder / "config.yml", **{**defaults, **settings, "deft": deft})


def entry(folder: Path, name: str, kind: str | None = None) -> dict[str, Any]:
    return {"path": str(folder / f"{name}.jsonl"), "ds_type": "json", "type": kind or TYPES[name]}


def host_datasets(path: Path) -> tuple[Any, Any]:
    """`axolotl train` until there is a trainer to build: the config, and the data sets that it would get."""
    cfg = hosting.load_config(path)
    return cfg, PluginManager.get_instance().plugins["poft_plugin.PoftPlugin"].load_datasets(cfg)


def prepare(path: Path) -> SimpleNamespace:
    """These data sets as lists of rows, and what the run left in its folder."""
    cfg, meta = host_datasets(path)
    out = Path(cfg.output_dir)
    return SimpleNamespace(
        train=meta.train_dataset.to_list(),
        evaluation=[] if meta.eval_dataset is None else meta.eval_dataset.to_list(),
        grading=json.loads((out / "grading.json").read_text()) if (out / "grading.json").exists() else None,
        discrepancy=saved_discrepancy(out),
    )


def saved_discrepancy(out: Path) -> np.ndarray | None:
    path = out / "discrepancy.safetensors"
    return load_file(path)["discrepancy"] if path.exists() else None


def names(rows: Sequence[Row], tokenizer: Any) -> list[str]:
    """Which raw rows these prepared rows are, by their prompts' text."""
    return [tokenizer.decode(row["input_ids"]).split("<|im_start|>user\n")[1].partition(":")[0] for row in rows]


def responses_of(row: Row, tokenizer: Any) -> list[str]:
    """The text that each sequence of a prepared row trains on, its end of turn taken off."""
    edges = np.concatenate([[0], np.cumsum(row["sequence_lengths"])]).tolist()
    found = []
    for start, end in pairwise(edges):
        text = tokenizer.decode([label for label in row["labels"][start:end] if label != -100])
        assert text.endswith("<|im_end|>")
        found.append(text.removesuffix("<|im_end|>"))
    return found


def grade_by_hand(row: Row) -> float:
    """The highest score; a pair's is its better response's."""
    scores = [score for _, score in ordered(row)]
    return scores[0] if len(scores) == 2 else max(scores)


def levels_by_hand(rows: Sequence[Row], groups: Sequence[str]) -> dict[str, str]:
    """The level of each training row, by name; no two scores are equal, so that no tie is broken."""
    found = {}
    for group in set(groups):
        inside = [row for row, other in zip(rows, groups, strict=True) if other == group]
        scores = list(map(grade_by_hand, inside))
        levels = oracles.deft_levels(scores, list(map(name_of, inside)), TOP, BOTTOM)
        found |= dict(zip(map(name_of, inside), levels, strict=True))
    return found


def levels_of(run: SimpleNamespace, tokenizer: Any) -> dict[str, str]:
    return dict(zip(names(run.train, tokenizer), [row["level"] for row in run.train], strict=True))


def count_by_hand(rows: Sequence[Row], levels: dict[str, str], tokenizer: Any) -> oracles.DeftCounts:
    """Q+ and Q- from the raw texts."""
    samples = []
    for row in rows:
        texts, scores = zip(*ordered(row), strict=True)
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        samples.append((levels[name_of(row)], tokens, scores))
    return oracles.deft_counts(samples, len(tokenizer), tokenizer.all_special_ids)


def assert_discrepancy(found: np.ndarray | None, counts: oracles.DeftCounts) -> None:
    assert found is not None
    assert (found.dtype, float(found.sum())) == (np.float64, 0.0)
    expected = [float(value) for value in oracles.deft_discrepancy(counts.positive, counts.negative)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2 * 2**-53)


def rewards_by_hand(folder: Path, rows: Sequence[Row]) -> dict[str, list[float]]:
    """The model's own logit of each rendered response, in the order of the data, one at a time, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    found = {}
    for row in rows:
        prompt = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        scores = []
        for text in texts_of(row):
            messages = [*prompt, {"role": "assistant", "content": text}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
            with torch.no_grad():
                scores.append(float(model(input_ids=ids).logits[0, 0]))
        found[name_of(row)] = scores
    return found


def as_list(row: Row) -> Row:
    """A pair as a list, which goes by its scores."""
    return {"prompt": row["messages"][0]["content"], "responses": texts_of(row), "scores": row["scores"]}
