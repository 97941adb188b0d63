"""Scoring speed: our scorer against lm-eval, a plain transformers loop, padding to 4,096, and the arithmetic itself.

All score the same token ids with the same weights and must give the same rewards before any of them is timed. The floor
is what the needed products alone would take at the matmul rate measured beside them: two FLOPs per parameter of the
body and token, and two per parameter of the head and *response* token.

    python -m benchmarks.scoring --data FOLDER [--write]
"""

import argparse
import gzip
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from benchmarks.common import (
    Contestant,
    Report,
    Timing,
    arguments,
    matmul_rate,
    peak_mib,
    publish,
    race,
    ratio,
    rounds,
    settle,
)
from benchmarks.synthetic import random_rows
from poft_plugin.config import ReferenceConfig
from poft_plugin.data.rows import Turn
from poft_plugin.scorers.causal_lm import CausalLMScorer
from poft_plugin.scoring.cache import ScoreCache
from poft_plugin.scoring.checkpoints import resolve_checkpoint
from poft_plugin.scoring.run import batches_for
from poft_plugin.scoring.scorer import PreparedRow

Rewards = dict[str, float]

AGREEMENT = 1e-4
"""Nats per token by which two ways of scoring may differ before anything is timed (float32)."""

PADDED_TO = 4096
IGNORED = -100


@dataclass(frozen=True)
class Size:
    """A Llama and how much of it is scored.

    Args:
        hidden: width; the feed-forward layer is 2.75 times as wide.
        layers: of the body.
        heads: of attention.
        vocabulary: rows of the head.
        rows: to score.
        padded_rows: rows that the contestant that pads to 4,096 gets.
        budgets: our `batch_tokens`.
        peers: batch sizes of lm-eval.
    """

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    padded_rows: int
    budgets: tuple[int, ...] = (1024, 8192)
    peers: tuple[int, ...] = (8, 32)


SIZES = {
    "tiny": Size(32, 1, 2, 512, rows=12, padded_rows=1, peers=()),
    "toy": Size(256, 3, 4, 32_768, rows=240, padded_rows=3),
    "1b": Size(2048, 20, 16, 32_768, rows=2000, padded_rows=16, budgets=(8192, 65_536), peers=(32, 128)),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = arguments(
        __doc__, data="Folder with alpaca/alpaca.jsonl.gz and tokenizers/mistral-v3; else random tokens."
    )
    parser.add_argument("--size", choices=list(SIZES), default="toy", help="Model: toy for a CPU, 1b for a GPU.")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="Weights.")
    options = settle(parser.parse_args(argv), repeats=5)
    logging.set_verbosity_error()
    size = SIZES["tiny" if options.small else options.size]
    with tempfile.TemporaryDirectory() as folder:
        publish("scoring", [measure(size, options, Path(folder))], options)


def measure(size: Size, options: argparse.Namespace, folder: Path) -> Report:
    """Builds model and rows, checks that all contestants agree, times them and measures their memory."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, options.dtype)
    tokenizer_folder = None if options.data is None or options.small else options.data / "tokenizers" / "mistral-v3"
    save_model(size, dtype, folder, tokenizer_folder)
    scorer = CausalLMScorer(
        ReferenceConfig(model=str(folder)), resolve_checkpoint(str(folder), None, ScoreCache(folder / "scores"))
    )
    rows, origin = read_rows(size, scorer, options.data if tokenizer_folder else None)
    scorer.load(device)
    contestants = entrants(size, scorer, rows, folder=folder, device=device)
    check_agreement(contestants, dtype)
    timings = race(contestants, options.repeats, clock=options.clock, take=options.take, warm_up=False)
    floor = floor_seconds(size, scorer, rows, device=device, dtype=dtype, clock=options.clock)
    peaks = {entrant.name: peak_mib(entrant.run) for entrant in contestants}
    tokens, response = sum(map(len, rows)), sum(int(row.counted.sum()) for row in rows)
    total, head = scorer.num_parameters()
    share = 2 * head * response / scorer.flops(tokens, response)
    title = (
        f"Scoring {len(rows)} rows of {origin} ({tokens:,} tokens, {response:,} of responses), Llama of "
        f"{total / 1e6:.1f} M parameters, head of {size.vocabulary:,} tokens, {options.dtype}, {device}"
    )
    notes = (
        f"Floor: {scorer.flops(tokens, response):.3g} FLOPs at the measured matmul rates. The head is {share:.0%} of "
        "them here, a few percent in a model of 7 B parameters: these ratios are not those of such a model.",
        f"Padding to {PADDED_TO:,}: {size.padded_rows} rows, extrapolated.",
        f"{rounds(options)} Peak memory: above the loaded model.",
    )
    headings = ("contestant", "rows/s", "seconds", "range", "peak MiB", "to the best peer", "time / floor")
    return Report(title, headings, table_rows(timings, peaks, floor, len(rows)), notes)


def table_rows(timings: dict[str, Timing], peaks: dict[str, float], floor: float, rows: int) -> list[list[str]]:
    """Cells; one column is relative to the best peer that scores rows as they are: lm-eval, and the plain loop."""
    peer = max(timing.rate for name, timing in timings.items() if not name.startswith("ours"))
    cells = [
        [
            name, f"{timing.rate:.3g}", f"{rows / timing.rate:.3g}", timing.spread, f"{peaks[name]:,.0f}",
            ratio(timing.rate / peer), ratio(rows / timing.rate / floor),
        ]
        for name, timing in timings.items()
    ]  # fmt: skip
    return [*cells, ["floor", f"{rows / floor:.3g}", f"{floor:.3g}", "", "", ratio(rows / floor / peer), "1.00 x"]]


def entrants(
    size: Size, scorer: CausalLMScorer, rows: list[PreparedRow], *, folder: Path, device: str
) -> list[Contestant]:
    """Everyone who scores the rows."""
    found = [Contestant(f"ours, batch_tokens {n:,}", partial(ours, scorer, rows, n), len(rows)) for n in size.budgets]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    for batch_size in size.peers:
        from lm_eval.models.huggingface import HFLM  # late: it brings much along, and without peers it is not needed

        tokenizer = AutoTokenizer.from_pretrained(folder)
        peer = HFLM(model, tokenizer=tokenizer, batch_size=batch_size, device=device)
        found.append(Contestant(f"lm-eval HFLM, batch {batch_size}", partial(lm_eval_rewards, peer, rows), len(rows)))
    found.append(Contestant("transformers, sorted, batch 8", partial(plain_rewards, model, rows, 8), len(rows)))
    some = rows[:: max(1, len(rows) // size.padded_rows)][: size.padded_rows]
    name = f"transformers, padded to {PADDED_TO:,}"
    found.append(Contestant(name, partial(plain_rewards, model, some, 1, PADDED_TO), len(some)))
    return found


def ours(scorer: CausalLMScorer, rows: list[PreparedRow], batch_tokens: int) -> Rewards:
    """The scorer as `axolotl poft score` runs it."""
    return {
        score.key: score.value for batch in batches_for(scorer, rows, batch_tokens) for score in scorer.score(batch)
    }


def lm_eval_rewards(peer: Any, rows: list[PreparedRow]) -> Rewards:
    """What `HFLM.loglikelihood` runs once it has tokenized: contexts and continuations as ids."""
    requests, counts = [], []
    for row in rows:
        first, last = response_span(row)
        ids = row.input_ids.tolist()
        requests.append((("", row.key), ids[:first], ids[first:last]))
        counts.append(last - first)
    answers = peer._loglikelihood_tokens(requests, disable_tqdm=True)
    return {row.key: total / count for row, (total, _), count in zip(rows, answers, counts, strict=True)}


@torch.inference_mode()
def plain_rewards(model: Any, rows: list[PreparedRow], batch_size: int, width: int | None = None) -> Rewards:
    """Right-padded batches of rows of like length, all logits, a log-softmax over all of them."""
    ordered, rewards = sorted(rows, key=len, reverse=True), {}
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        shape = len(batch), width or max(map(len, batch))
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        counted = torch.zeros(shape, dtype=torch.bool)
        for number, row in enumerate(batch):
            ids[number, : len(row)] = torch.from_numpy(row.input_ids)
            mask[number, : len(row)] = 1
            counted[number, : len(row)] = torch.from_numpy(row.counted)
        ids, mask, counted = (tensor.to(model.device) for tensor in (ids, mask, counted))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logps = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        kept = counted[:, 1:]
        means = torch.where(kept, logps, 0).sum(1) / kept.sum(1)
        rewards |= {row.key: mean for row, mean in zip(batch, means.tolist(), strict=True)}
    return rewards


def check_agreement(contestants: Sequence[Contestant], dtype: torch.dtype) -> None:
    """All contestants once, which warms them up too.

    Raises:
        AssertionError: naming two that differ.
    """
    budget = AGREEMENT if dtype == torch.float32 else 0.05
    (first, expected), *others = [(entrant.name, entrant.run()) for entrant in contestants]
    for name, answer in others:
        worst = max(abs(expected[key] - reward) for key, reward in answer.items())
        assert worst <= budget, f"{first} and {name} differ by {worst:.3g} nats per token"


def floor_seconds(
    size: Size, scorer: CausalLMScorer, rows: list[PreparedRow], *, device: str, dtype: torch.dtype, clock: str
) -> float:
    """The needed products at the best rates measured: many tokens at once, the head whole and in pieces."""
    tokens, response = sum(map(len, rows)), sum(int(row.counted.sum()) for row in rows)
    many = 1024 if device == "cpu" else 8192
    rate = partial(matmul_rate, device=device, dtype=dtype, clock=clock)
    body = rate(many, size.hidden, _wide(size))
    shapes = ((128, size.vocabulary), (many, size.vocabulary), (many, 2048))
    head = max(rate(few, size.hidden, columns) for few, columns in shapes)
    return scorer.flops(tokens, 0) / body + scorer.flops(0, response) / head


def response_span(row: PreparedRow) -> tuple[int, int]:
    """Where the counted tokens of a row begin and end: one stretch."""
    counted = np.flatnonzero(row.counted)
    first, last = int(counted[0]), int(counted[-1]) + 1
    assert last - first == len(counted), f"row {row.key}: several responses"
    return first, last


def save_model(size: Size, dtype: torch.dtype, folder: Path, tokenizer: Path | None) -> None:
    """A random Llama, and a tokenizer beside it."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=_wide(size),
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(1, size.heads // 2),
        max_position_embeddings=PADDED_TO,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    if tokenizer is not None and tokenizer.is_dir():
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        return
    words = WordLevel({f"w{number}": number for number in range(size.vocabulary)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w2", pad_token="w0").save_pretrained(folder)


def read_rows(size: Size, scorer: CausalLMScorer, data: Path | None) -> tuple[list[PreparedRow], str]:
    """The rows as tokens, and where they are from; random tokens of like lengths where there is no data."""
    file = None if data is None else data / "alpaca" / "alpaca.jsonl.gz"
    if file is None or not file.is_file():
        print(f"no rows at {file or '--data'}: random tokens of like lengths instead")
        return random_rows(size.rows, size.vocabulary, prompt=25, response=45), "random tokens"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line, _ in zip(lines, range(size.rows), strict=False)]
    rows = []
    for number, record in enumerate(records):
        question = "\n\n".join(filter(None, [record["instruction"], record["input"]]))
        conversation = (Turn("user", question, False), Turn("assistant", record["output"] or "-", True))
        rows.append(scorer.prepare(str(number), conversation, f"row {number}"))
    return rows, "Alpaca"


def _wide(size: Size) -> int:
    return size.hidden * 11 // 4


if __name__ == "__main__":
    main()
