"""A preference row: one prompt, its responses from best to worst, and maybe a score for each.

Axes: C responses of a sample.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from poft_plugin.data.rows import KEY_LENGTH, Conversation, RowError, Turn


@dataclass(frozen=True)
class RankedSample:
    """One prompt and its C responses.

    Args:
        prompt: the turns before the response; none of them counts.
        responses: C texts, best first.
        ranks: C integers: 0 for the best, ascending; equal ones are ties.
        scores: C finite numbers that came with the data, or None.
    """

    prompt: Conversation
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None

    def conversation(self, index: int) -> Conversation:
        """The prompt with one response: what a scorer gets to see."""
        return (*self.prompt, Turn("assistant", self.responses[index], counted=True))

    def dumps(self) -> str:
        """The JSON text that rows travel in."""
        prompt = [[turn.role, turn.content] for turn in self.prompt]
        return json.dumps([prompt, self.responses, self.ranks, self.scores], ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def loads(cls, text: str) -> "RankedSample":
        """The inverse of `dumps`."""
        prompt, responses, ranks, scores = json.loads(text)
        turns = tuple(Turn(role, content) for role, content in prompt)
        return cls(turns, tuple(responses), tuple(ranks), None if scores is None else tuple(scores))

    @property
    def key(self) -> str:
        """Content key over the prompt and the responses in order; ranks and scores are not part of it.

        Examples:
            >>> a = RankedSample((Turn("user", "hi"),), ("ho", "no"), (0, 1))
            >>> b = RankedSample((Turn("user", "hi"),), ("ho", "no"), (0, 1), (2.0, 1.0))
            >>> a.key == b.key, len(a.key)
            (True, 32)
        """
        content = [[[turn.role, turn.content] for turn in self.prompt], self.responses]
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def pair(
    prompt: Sequence[Turn], chosen: str, rejected: str, *, scores: Sequence[float] | None = None, where: str
) -> RankedSample:
    """A chosen and a rejected response; the label is the order, whatever the scores say.

    Args:
        prompt: the turns before.
        chosen: the better response.
        rejected: the worse one.
        scores: two numbers, the chosen response's first, or None.
        where: names the row in errors.

    Raises:
        RowError: as `ranked_list`.

    Examples:
        >>> pair([Turn("user", "hi")], "ho", "no", where="row 0").ranks
        (0, 1)
    """
    checked = None if scores is None else _checked_scores(scores, 2, where)
    return RankedSample(_checked_prompt(prompt, where), _checked_responses((chosen, rejected), where), (0, 1), checked)


def ranked_list(
    prompt: Sequence[Turn], responses: Sequence[str], *, scores: Sequence[float] | None = None, where: str
) -> RankedSample:
    """Responses of one prompt, from best to worst as they come, or sorted by their scores.

    Args:
        prompt: the turns before.
        responses: at least two texts.
        scores: one finite number per response: the list is sorted by them, highest first, stably; equal scores are
            ties. None: the list is in order, without ties.
        where: names the row in errors.

    Raises:
        RowError: for fewer than two responses, an empty one, an empty prompt, or scores that do not fit or are not
            finite.

    Examples:
        >>> sample = ranked_list([Turn("user", "hi")], ["a", "b", "c"], scores=[0.5, 0.7, 0.5], where="row 0")
        >>> sample.responses, sample.ranks
        (('b', 'a', 'c'), (0, 1, 1))
    """
    if len(responses) < 2:
        raise RowError(f"{where}: {len(responses)} response(s); a ranked row needs at least two. Remove the row")
    turns, texts = _checked_prompt(prompt, where), _checked_responses(responses, where)
    if scores is None:
        return RankedSample(turns, texts, tuple(range(len(texts))))
    checked = _checked_scores(scores, len(texts), where)
    order = sorted(range(len(texts)), key=lambda index: -checked[index])
    ordered = tuple(checked[index] for index in order)
    return RankedSample(turns, tuple(texts[index] for index in order), dense_ranks(ordered), ordered)


def dense_ranks(scores: Sequence[float]) -> tuple[int, ...]:
    """Ranks from 0 of scores, the highest first; equal scores share one.

    Examples:
        >>> dense_ranks([0.1, 3.0, 0.1, 2.0])
        (2, 0, 2, 1)
    """
    rank_of = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
    return tuple(rank_of[score] for score in scores)


def _checked_prompt(prompt: Sequence[Turn], where: str) -> Conversation:
    if not any(turn.content.strip() for turn in prompt):
        raise RowError(f"{where}: an empty prompt. Remove the row, or check the field names of the dataset entry")
    return tuple(prompt)


def _checked_responses(responses: Sequence[str], where: str) -> tuple[str, ...]:
    for number, text in enumerate(responses):
        if not isinstance(text, str) or not text.strip():
            raise RowError(
                f"{where}: response {number} of {len(responses)} has no text ({text!r}). Remove the row, or check the "
                "field names of the dataset entry"
            )
    return tuple(responses)


def _checked_scores(scores: Sequence[float], count: int, where: str) -> tuple[float, ...]:
    if isinstance(scores, (str, Mapping)) or not isinstance(scores, Sequence):
        raise RowError(f"{where}: the scores are {scores!r}, not a list of numbers; check `field_scores`")
    if len(scores) != count:
        raise RowError(f"{where}: {len(scores)} scores for {count} responses; give one each")
    for number, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not isfinite(score):
            raise RowError(f"{where}: the score of response {number} is {score!r}, not a finite number")
    return tuple(float(score) for score in scores)
