"""A small family of string tasks whose answers can be checked, and the recipe that spoils some of them.

Every row asks for one operation on one random word. Words are drawn without replacement, so the sets made by `splits`
share no word, and an answer on a held-out row cannot have been memorised.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

LETTERS = "abcdefghijkl"
WORD_LENGTHS = (4, 5, 6, 7)
SPOILED = ("swapped", "edited")

TASKS: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "upper": lambda word: word.upper(),
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "rotate": lambda word: word[1:] + word[0],
    "ends": lambda word: word[0] + word[-1],
}


@dataclass(frozen=True)
class Row:
    """One question and its answer; `spoiled` names what was done to the answer, "" if nothing."""

    id: str
    prompt: str
    answer: str
    spoiled: str = ""

    def messages(self) -> list[dict[str, str]]:
        """The row as a chat conversation."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]


def solve(prompt: str) -> str:
    """The right answer to a prompt of this family."""
    name, word = prompt.split(": ")
    return TASKS[name](word)


def splits(sizes: dict[str, int], seed: int) -> dict[str, list[Row]]:
    """Row sets of the given sizes, clean, without a common word."""
    rng = random.Random(seed)
    words = _new_words(rng)
    return {name: [_row(f"{name}-{i:05d}", next(words), rng) for i in range(size)] for name, size in sizes.items()}


def _new_words(rng: random.Random) -> Iterator[str]:
    """Random words, none of them twice."""
    seen: set[str] = set()
    while True:
        word = "".join(rng.choices(LETTERS, k=rng.choice(WORD_LENGTHS)))
        if word not in seen:
            seen.add(word)
            yield word


def _row(row_id: str, word: str, rng: random.Random) -> Row:
    prompt = f"{rng.choice(list(TASKS))}: {word}"
    return Row(row_id, prompt, solve(prompt))


def spoil(rows: list[Row], share: float, seed: int) -> list[Row]:
    """The rows, with exactly `round(share * len(rows))` answers made wrong, in two ways by turns.

    "swapped": another row's answer. "edited": characters of the row's own answer inserted, deleted and changed. These
    are the operations of the noise study in the PoFT paper; here they fall on different rows, so that the report can
    show them apart.
    """
    rng = random.Random(seed)
    spoiled = list(rows)
    for turn, index in enumerate(rng.sample(range(len(rows)), round(share * len(rows)))):
        row = rows[index]
        if turn % 2:
            spoiled[index] = replace(row, answer=_edited(row.answer, rng), spoiled="edited")
        else:
            spoiled[index] = replace(row, answer=_other_answer(row, rows, rng), spoiled="swapped")
    return spoiled


def _other_answer(row: Row, rows: list[Row], rng: random.Random) -> str:
    """Another row's answer that is not by chance the right one."""
    while True:
        other = rng.choice(rows).answer
        if other != row.answer:
            return other


def _edited(answer: str, rng: random.Random) -> str:
    """The answer after one to three random edits which leave something, and something wrong."""
    while True:
        text = answer
        for _ in range(rng.randint(1, 3)):
            text = rng.choice((_insert, _delete, _change))(text, rng)
        if text and text != answer:
            return text


def _insert(text: str, rng: random.Random) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + rng.choice(LETTERS) + text[at:]


def _delete(text: str, rng: random.Random) -> str:
    at = rng.randrange(max(len(text), 1))
    return text[:at] + text[at + 1 :]


def _change(text: str, rng: random.Random) -> str:
    at = rng.randrange(max(len(text), 1))
    return text[:at] + rng.choice(LETTERS) + text[at + 1 :]


def write_jsonl(rows: list[Row], path: Path) -> None:
    """What training reads: conversations, with nothing that says which rows are spoiled."""
    lines = (json.dumps({"id": row.id, "messages": row.messages()}) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_labels(rows: list[Row], path: Path) -> None:
    """The side file for the report: row id -> how the row was spoiled, "" for a clean one."""
    path.write_text(json.dumps({row.id: row.spoiled for row in rows}, indent=0), encoding="utf-8")
