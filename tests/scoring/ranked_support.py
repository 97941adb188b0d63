"""Ranked rows for the scoring tests, and a plain float64 score to compare with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from poft_plugin.data.preparation import Rows
from poft_plugin.data.ranked import RankedSample
from poft_plugin.data.rows import Turn


def ranked(samples: Sequence[RankedSample], sequences: Sequence[Sequence[Sequence[int]]] = ()) -> Rows:
    """Ranked rows of one data set; `sequences` holds token ids for each row's each response, labels as `counted`."""
    columns: dict[str, list[Any]] = {
        "row_key": [sample.key for sample in samples],
        "conversation": [sample.dumps() for sample in samples],
        "source": ["data.jsonl"] * len(samples),
        "row_number": list(range(len(samples))),
    }
    if sequences:
        flat = [[token for ids in row for token in ids] for row in sequences]
        labels = [[label for ids in row for label in counted(ids)] for row in sequences]
        columns |= {"ranked_input_ids": flat, "ranked_labels": labels}
        columns["sequence_lengths"] = [[len(ids) for ids in row] for row in sequences]
    table = pa.table({name: pa.chunked_array([values]) for name, values in columns.items()})
    for name in ("ranked_input_ids", "ranked_labels", "sequence_lengths"):
        if name in columns:
            place = table.column_names.index(name)
            table = table.set_column(place, name, table[name].cast(pa.list_(pa.int32())))
    return Rows(table, {})


def counted(ids: Sequence[int]) -> list[int]:
    """Labels: all but the first third, which is the prompt."""
    prompt = len(ids) // 3
    return [-100] * prompt + list(ids[prompt:])


def plain_score(folder: Path, turns: Sequence[Turn]) -> float:
    """A decoder's one logit for a rendered conversation, from the model's own forward in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids).logits[0, 0])
