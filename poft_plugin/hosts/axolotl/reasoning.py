"""Reasoning that stands in a field of its own: written into the turn's text, as the policy's template writes it.

References know nothing of the field, and their templates would each write it in another way, or leave it out. So the
text of such a turn is what the policy is trained on: everything that the template writes differently because of the
turn's texts, and the mark before it that opens the reasoning (Qwen3's `<think>`, which the template writes before an
answer without reasoning, too).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from axolotl.prompt_strategies.chat_template import ChatTemplateStrategy

from poft_plugin.data.rows import Conversation, RowError, Turn
from poft_plugin.hosts.axolotl.ranked_fields import shown
from poft_plugin.hosts.axolotl.reading import HOST_ERRORS, described

REASONING = ("reasoning_content", "reasoning", "thinking", "thoughts")
"""What data sets call the field."""

STAND_INS = ("[[dummy_message]]", "zzdummymessagezz")
"""Texts that share neither first nor last character: an end that the template shares with one shows under the other."""


class Reasoned(str):
    """The text of a message that has reasoning in a field of its own, while its row is read.

    Args:
        text: the answer.
        reasoning: what stands in the field.
    """

    reasoning: str

    def __new__(cls, text: str, reasoning: str) -> "Reasoned":
        """As a text, it is the answer alone."""
        made = super().__new__(cls, text)
        made.reasoning = reasoning
        return made

    def __eq__(self, other: object) -> bool:
        """Equal is what has the same answer and the same reasoning."""
        return str.__eq__(self, str(other)) and isinstance(other, str) and self.reasoning == reasoning_of(other)

    __hash__ = str.__hash__


def reasoning_of(text: str) -> str:
    """What stands in the field of its own, or nothing."""
    return text.reasoning if isinstance(text, Reasoned) else ""


def as_messages(strategy: ChatTemplateStrategy, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as the host reads them, reasoning in the field that the policy's template knows.

    Args:
        strategy: the host's, with the policy's template.
        turns: the conversation; texts may be `Reasoned`.
    """
    key = strategy.prompter.template_thinking_key or REASONING[0]
    return [
        {"role": turn.role, "content": str(turn.content), "training": turn.counted}
        | ({key: turn.content.reasoning} if isinstance(turn.content, Reasoned) else {})
        for turn in turns
    ]


def folded(strategy: ChatTemplateStrategy, turns: Sequence[Turn], where: str) -> Conversation:
    """The turns with their reasoning in their texts.

    Args:
        strategy: the host's, with the policy's template.
        turns: the conversation; texts may be `Reasoned`.
        where: names the row in errors.

    Raises:
        RowError: as `written_turn`.
    """
    messages = as_messages(strategy, turns)
    return tuple(
        replace(turn, content=written_turn(strategy, messages, index, turn.counted, where))
        if isinstance(turn.content, Reasoned)
        else turn
        for index, turn in enumerate(turns)
    )


def written_turn(
    strategy: ChatTemplateStrategy, turns: Sequence[Mapping[str, Any]], index: int, counted: bool, where: str
) -> str:
    """The text of a turn with reasoning.

    Args:
        strategy: the host's, with the policy's template.
        turns: the conversation as the host reads it.
        index: the turn.
        counted: whether the turn is a response.
        where: names the row in errors.

    Raises:
        RowError: if the template does not write the reasoning of a response.
    """
    turn = turns[index]
    names = [name for name in dict.fromkeys((strategy.prompter.template_thinking_key, *REASONING)) if turn.get(name)]
    for name in names:
        if not isinstance(turn[name], str):
            raise RowError(f"{where}: {name!r} of a turn is {shown(turn[name])}, not text. Write it as text")
    text = _text(strategy, turns, where)
    begin, end = len(text), 0
    for stand_in in STAND_INS:
        other = [*turns[:index], {"role": turn["role"], "content": stand_in}, *turns[index + 1 :]]
        start, stop = _differing(text, _text(strategy, other, where))
        begin, end = min(begin, start), max(end, stop)
    written = text[_opening(text, begin, end) : end]
    missing = [name for name in ("content", *names) if turn[name].strip() not in written]
    if not missing:
        return written
    if counted:
        raise RowError(
            f"{where}: the policy's chat template does not write {missing[0]!r} of the turn {index} as it is: "
            f"{shown(turn[missing[0]])}. Remove the field from such rows, or set a `chat_template:` that writes it"
        )
    return str(turn["content"])


def _opening(text: str, begin: int, end: int) -> int:
    """Where a turn begins whose reasoning is closed in it: with what opens it, right before.

    Examples:
        >>> "user: hi <think>hm</think>ho"[_opening("user: hi <think>hm</think>ho", 16, 28) :]
        '<think>hm</think>ho'
    """
    opening = re.search(r"([<\[])(\w+)[>\]]\s*$", text[:begin])
    if opening is None:
        return begin
    bracket, name = opening.groups()
    closed = text.find(f"{bracket}/{name}", begin, end)
    return opening.start() if closed >= 0 and f"{bracket}{name}" not in text[begin:closed] else begin


def _differing(text: str, other: str) -> tuple[int, int]:
    """Where a text differs from another one: behind what both begin with, before what both end with."""
    start = _shared(text, other)
    return start, len(text) - _shared(text[start:][::-1], other[start:][::-1])


def _shared(text: str, other: str) -> int:
    """Characters that both begin with."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((index for index, (here, there) in pairs if here != there), min(len(text), len(other)))


def _text(strategy: ChatTemplateStrategy, turns: Sequence[Mapping[str, Any]], where: str) -> str:
    try:
        return strategy.prompter.build_prompt_text(list(turns)) or ""
    except HOST_ERRORS as error:
        raise RowError(
            f"{where}: the policy's chat template refuses the turns {[turn['role'] for turn in turns]}: "
            f"{described(error)}. Set another `chat_template:`, or remove the row"
        ) from error
