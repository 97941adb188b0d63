"""The quickstart's preference pairs: two answers that a model gave to one question, and which of them is preferred.

The answers are sampled, so that they are what preference data are in practice: often neither of the two is right. Who
labels them compares each with the right answer, and now and then picks the worse one.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path

from quickstart.task import Row, solve

KINDS = ("right", "poor", "mislabelled")


@dataclass(frozen=True)
class Pair:
    """One question with a preferred and a rejected answer."""

    id: str
    prompt: str
    chosen: str
    rejected: str

    @property
    def kind(self) -> str:
        """right: the chosen answer is. poor: neither is. mislabelled: the rejected one is right."""
        right = solve(self.prompt)
        if self.chosen == right:
            return "right"
        return "mislabelled" if self.rejected == right else "poor"

    def rows(self) -> tuple[Row, Row]:
        """The question with the chosen, and with the rejected answer."""
        return Row(self.id, self.prompt, self.chosen), Row(self.id, self.prompt, self.rejected)


def closeness(prompt: str, answer: str) -> float:
    """How much of an answer is right, between 0 and 1."""
    return SequenceMatcher(None, solve(prompt), answer, autojunk=False).ratio()


def make_pairs(rows: list[Row], answers: list[list[str]], *, size: int, exchanged: float, seed: int) -> list[Pair]:
    """`size` pairs out of sampled answers, the closer one chosen, and `round(exchanged * size)` of them exchanged.

    Args:
        rows: questions; their own answers are not looked at.
        answers: some answers to each; the first two that differ, and not by chance equally close, make its pair.
        size: how many pairs; questions without two such answers are passed over.
        exchanged: share of the pairs whose label is the wrong way round.
        seed: decides which.

    Raises:
        ValueError: if the questions do not suffice.
    """
    found = [pair for row, texts in zip(rows, answers, strict=True) if (pair := _pair(row, texts)) is not None]
    if len(found) < size:
        raise ValueError(f"{len(found)} of {len(rows)} questions have two answers to compare; {size} pairs are wanted")
    pairs = found[:size]
    for index in random.Random(seed).sample(range(size), round(exchanged * size)):
        pairs[index] = replace(pairs[index], chosen=pairs[index].rejected, rejected=pairs[index].chosen)
    return pairs


def _pair(row: Row, answers: list[str]) -> Pair | None:
    """The first usable answer, and the first after it that is closer or further."""
    first, *others = [answer for answer in answers if answer.isalnum()] or [""]
    for other in others:
        gap = closeness(row.prompt, first) - closeness(row.prompt, other)
        if gap:
            return Pair(row.id, row.prompt, *((first, other) if gap > 0 else (other, first)))
    return None


def count_kinds(pairs: list[Pair]) -> dict[str, int]:
    """How many pairs of each kind."""
    count = Counter(pair.kind for pair in pairs)
    return {kind: count[kind] for kind in KINDS}


def write_pairs(pairs: list[Pair], path: Path) -> None:
    """What training reads: the question's turns and both answers, with nothing that says which labels are wrong."""
    lines = (
        json.dumps(
            {
                "id": pair.id,
                "messages": [{"role": "user", "content": pair.prompt}],
                "chosen": {"role": "assistant", "content": pair.chosen},
                "rejected": {"role": "assistant", "content": pair.rejected},
            }
        )
        for pair in pairs
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
