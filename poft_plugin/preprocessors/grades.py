"""DEFT's training preprocessor: a level for every training row, and the discrepancy distribution of them all."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel
from safetensors.numpy import load_file, save_file

from poft_plugin.config import DeftConfig
from poft_plugin.data.columns import LEVEL, ORDER, RANKED_LABELS, SCORES, SEQUENCE_LENGTHS
from poft_plugin.data.discrepancy import GradedSample, TokenCounts, count_tokens
from poft_plugin.data.grading import grade_within
from poft_plugin.data.groups import in_order, longest_sequences, responses
from poft_plugin.data.preparation import Policy, Prepared, Rows, RunContext
from poft_plugin.report.grading import GradingSummary, print_grading, summarise_grading, top_tokens
from poft_plugin.scoring.cache import ScoreCache, atomic_file, cache_folder
from poft_plugin.scoring.jobs import preprocessor

DISCREPANCY = "discrepancy"
"""Name of the tensor that the trainer gets, `(V,)` float64."""

SUMMARY_FILE, DISCREPANCY_FILE = "grading.json", "discrepancy.safetensors"
CONTRACT = "token counts of graded responses, version 1"
NUMBERS = ("samples", "responses_positive", "responses_negative", "middle_uncounted", "middle_contradictory")


@preprocessor(reads=DeftConfig, scope="training", columns=(LEVEL,))
def grades(rows: Rows, settings: BaseModel, context: RunContext) -> Prepared:
    """Attaches `level` to training rows and counts their tokens (sections 3.1 and 3.2 of the paper).

    Args:
        rows: all training rows, before any is left out, with `scores` (and `order`) attached.
        settings: the block `deft:`.
        context: this process, with its policy; rank 0 prints the summary and saves it in the run's output folder.

    Returns:
        The levels, numbers for the trackers, and the tensor `discrepancy` unless `omega` is 0.

    Raises:
        ValueError: as `grade_levels` and `count_tokens`.
    """
    assert isinstance(settings, DeftConfig)
    assert context.policy is not None
    if not settings.grades:
        return Prepared({})
    scores = in_order(rows.attached[SCORES], rows.attached.get(ORDER))
    best = np.array([grade_score(row) for row in scores])
    groups = rows.groups(settings.grade_within) if settings.grade_within != "none" else np.full(len(rows), "all")
    levels = grade_within(
        best,
        groups.tolist(),
        top_percent=settings.top_percent,
        bottom_percent=settings.bottom_percent,
        keys=rows.keys.to_pylist(),
    )
    counts = _counted(rows, levels, scores, ScoreCache(cache_folder(settings.score_cache)), context.policy)
    summary = _summary(rows, settings, context.policy, levels=levels, best=best, groups=groups, counts=counts)
    tensors = {DISCREPANCY: counts.discrepancy()} if settings.omega else {}
    if context.rank == 0:
        print_grading(summary)
        if context.output_dir is not None:
            _save(context.output_dir, summary, tensors)
    return Prepared({LEVEL: levels}, statistics=summary.statistics(), tensors=tensors)


def grade_score(scores: Sequence[float]) -> float:
    """A sample's grade score: the highest of its responses; of a pair the positive one's, as in the paper (3.1).

    Args:
        scores: of the sample's responses, best first by the run's order.

    Examples:
        >>> grade_score([0.2, 0.9]), grade_score([0.2, 0.9, 0.1])
        (0.2, 0.9)
    """
    return scores[0] if len(scores) == 2 else max(scores)


def load_discrepancy(output_dir: Path) -> np.ndarray:
    """The discrepancy distribution that a training run saved in its output folder, for evaluating its model.

    Raises:
        ValueError: if there is none.
    """
    path = output_dir / DISCREPANCY_FILE
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file: the distribution reward needs the discrepancy distribution that `axolotl train` "
            "saves there. Set `output_dir:` to the training run's, or `omega: 0`"
        )
    return np.asarray(load_file(path)[DISCREPANCY])


def _counted(
    rows: Rows, levels: np.ndarray, scores: list[list[float]], cache: ScoreCache, policy: Policy
) -> TokenCounts:
    """Token counts, from the cache where the same rows, levels and scores were counted before."""
    path = cache.folder / f"tokens-{_content(rows, levels, scores, policy)}.safetensors"
    if path.is_file():
        stored = load_file(path)
        numbers = dict(zip(NUMBERS, stored["numbers"].tolist(), strict=True))
        return TokenCounts(positive=stored["positive"], negative=stored["negative"], **numbers)
    counts = count_tokens(
        _graded(rows, levels, scores), vocab_size=policy.vocab_size, special_token_ids=policy.special_token_ids
    )
    cache.folder.mkdir(parents=True, exist_ok=True)
    numbers_array = np.array([getattr(counts, name) for name in NUMBERS])
    with atomic_file(path) as temporary:
        save_file({"positive": counts.positive, "negative": counts.negative, "numbers": numbers_array}, temporary)
    return counts


def _graded(rows: Rows, levels: np.ndarray, scores: list[list[float]]) -> Iterator[GradedSample]:
    for level, tokens, row in zip(levels.tolist(), responses(rows), scores, strict=True):
        yield GradedSample(level, tokens, row)


def _content(rows: Rows, levels: np.ndarray, scores: list[list[float]], policy: Policy) -> str:
    """Hash of everything that the counts depend on."""
    digest = hashlib.sha256(json.dumps([CONTRACT, policy.vocab_size, policy.special_token_ids]).encode())
    order = rows.attached.get(ORDER)
    digest.update("".join(levels.tolist()).encode())
    for values in (scores, [] if order is None else order):
        digest.update(np.array([len(row) for row in values], dtype=np.int64).tobytes())
        digest.update(np.array([value for row in values for value in row], dtype=np.float64).tobytes())
    for name in (RANKED_LABELS, SEQUENCE_LENGTHS):
        for chunk in rows.table[name].chunks:
            digest.update(np.asarray(chunk.flatten(), dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def _summary(
    rows: Rows,
    settings: DeftConfig,
    policy: Policy,
    *,
    levels: np.ndarray,
    best: np.ndarray,
    groups: np.ndarray,
    counts: TokenCounts,
) -> GradingSummary:
    lost = (longest_sequences(rows) > policy.sequence_len) & (levels == "A")
    summary = summarise_grading(
        levels,
        best,
        groups,
        top_percent=settings.top_percent,
        bottom_percent=settings.bottom_percent,
        grade_within=settings.grade_within,
        disagree=_disagreement(rows),
        counts=counts,
        tokens=top_tokens(counts.discrepancy(), policy.text_of),
    )
    return summary.with_level_a_lost({str(name): int(lost[groups == name].sum()) for name in dict.fromkeys(groups)})


def _disagreement(rows: Rows) -> np.ndarray:
    """`(n,)`: whether the scores prefer another response than the best ones by label."""
    found = np.zeros(len(rows))
    for index, scores in enumerate(rows.attached[SCORES]):
        ranks = rows.sample(index).ranks
        best_by_label = max(score for score, rank in zip(scores, ranks, strict=True) if rank == 0)
        found[index] = max(scores) > best_by_label
    return found


def _save(folder: Path, summary: GradingSummary, tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / SUMMARY_FILE) as temporary:
        temporary.write_text(json.dumps(summary.as_json(), indent=2, ensure_ascii=False))
    if tensors:
        with atomic_file(folder / DISCREPANCY_FILE) as temporary:
            save_file(tensors, temporary)
