"""Reasoning that stands in a field of its own: written into the turn's text, as the policy's template writes it.

References know nothing of the field, and their templates would each write it in another way, or leave it out. So the
text of such a turn is what the policy is trained on: everything that the template writes differently because of the
turn's texts. This is also how the host finds the tokens to train on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from axolotl.prompt_strategies.chat_template import ChatTemplateStrategy

from poft_plugin.data.rows import RowError
from poft_plugin.hosts.axolotl.ranked_fields import shown
from poft_plugin.hosts.axolotl.reading import HOST_ERRORS, described

REASONING = ("reasoning_content", "reasoning", "thinking", "thoughts")
"""What data sets call the field."""

STAND_INS = ("[[dummy_message]]", "zzdummymessagezz")
"""Texts that share neither first nor last character: an end that the template shares with one shows under the other."""


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
    written = text[begin:end]
    missing = [name for name in ("content", *names) if turn[name].strip() not in written]
    if not missing:
        return written
    if counted:
        raise RowError(
            f"{where}: the policy's chat template does not write {missing[0]!r} of the turn {index} as it is: "
            f"{shown(turn[missing[0]])}. Remove the field from such rows, or set a `chat_template:` that writes it"
        )
    return str(turn["content"])


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
