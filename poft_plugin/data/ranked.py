"""A preference row: one prompt, its responses from best to worst, and maybe a score for each.

Axes: C responses of a sample.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

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

    def only(self, positions: Sequence[int]) -> "RankedSample":
        """The same prompt with some of its responses, in their order.

        Examples:
            >>> sample = RankedSample((Turn("user", "hi"),), ("a", "b", "c"), (0, 1, 1)).only([0, 2])
            >>> sample.responses, sample.ranks
            (('a', 'c'), (0, 1))
        """
        responses = tuple(self.responses[position] for position in positions)
        kept = [self.ranks[position] for position in positions]
        scores = None if self.scores is None else tuple(self.scores[position] for position in positions)
        return RankedSample(self.prompt, responses, dense_ranks([-rank for rank in kept]), scores)

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
    checked = None if scores is None else _checked_numbers(scores, 2, "score", where)
    return RankedSample(_checked_prompt(prompt, where), _checked_responses((chosen, rejected), where), (0, 1), checked)


def ranked_list(
    prompt: Sequence[Turn],
    responses: Sequence[str],
    *,
    scores: Sequence[float] | None = None,
    ranks: Sequence[float] | None = None,
    where: str,
) -> RankedSample:
    """Responses of one prompt, from best to worst as they come, or sorted by their ranks, or by their scores.

    Args:
        prompt: the turns before.
        responses: at least two texts.
        scores: one finite number per response: the list is sorted by them, highest first, stably; equal scores are
            ties. None: the list is in order, without ties.
        ranks: one finite number per response, the lowest for the best: they make the order where they are given, and
            scores come along.
        where: names the row in errors.

    Raises:
        RowError: for fewer than two responses, an empty one, an empty prompt, or scores that do not fit or are not
            finite; so ranks.

    Examples:
        >>> sample = ranked_list([Turn("user", "hi")], ["a", "b", "c"], scores=[0.5, 0.7, 0.5], where="row 0")
        >>> sample.responses, sample.ranks
        (('b', 'a', 'c'), (0, 1, 1))
        >>> ranked_list([Turn("user", "hi")], ["a", "b"], ranks=[2, 1], where="row 0").responses
        ('b', 'a')
    """
    if len(responses) < 2:
        raise RowError(f"{where}: {len(responses)} response(s); a ranked row needs at least two. Remove the row")
    turns, texts = _checked_prompt(prompt, where), _checked_responses(responses, where)
    checked = None if scores is None else _checked_numbers(scores, len(texts), "score", where)
    places = None if ranks is None else _checked_numbers(ranks, len(texts), "rank", where)
    if checked is None and places is None:
        return RankedSample(turns, texts, tuple(range(len(texts))))
    goodness = [-place for place in places] if places is not None else list(checked or ())
    order = sorted(range(len(texts)), key=lambda index: -goodness[index])
    ordered = None if checked is None else tuple(checked[index] for index in order)
    by_place = dense_ranks([goodness[index] for index in order])
    return RankedSample(turns, tuple(texts[index] for index in order), by_place, ordered)


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
    refuse_answered(prompt, where)
    return tuple(prompt)


def refuse_answered(prompt: Sequence[Turn], where: str) -> None:
    """Refuses a prompt that holds an answer already.

    Raises:
        RowError: if its last turn is the assistant's.
    """
    if prompt and prompt[-1].role == "assistant":
        raise RowError(
            f"{where}: the prompt ends with an assistant turn, so that it holds an answer already: the responses would "
            "be second answers in a row. Set `field_messages:` to the field that holds the prompt alone (`prompt`, "
            "say), or `type: chat_template.argilla_chat` if `chosen` and `rejected` are whole dialogues"
        )


def _checked_responses(responses: Sequence[str], where: str) -> tuple[str, ...]:
    for number, text in enumerate(responses):
        if not isinstance(text, str) or not text.strip():
            raise RowError(
                f"{where}: response {number} of {len(responses)} has no text ({text!r}). Remove the row, or check the "
                "field names of the dataset entry"
            )
    return tuple(responses)


def _checked_numbers(values: Any, count: int, what: str, where: str) -> tuple[float, ...]:
    if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence):
        raise RowError(f"{where}: the {what}s are {values!r}, not a list of numbers; check `field_{what}s`")
    if len(values) != count:
        raise RowError(f"{where}: {len(values)} {what}s for {count} responses; give one each")
    for number, value in enumerate(values):
        if not _is_finite(value):
            raise RowError(f"{where}: the {what} of response {number} is {value!r}, not a finite number")
    return tuple(float(value) for value in values)


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False
