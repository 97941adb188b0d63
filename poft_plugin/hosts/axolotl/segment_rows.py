"""Rows of text segments in the policy's own markup (`type: input_output`)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from axolotl.prompt_strategies.input_output import RawInputOutputStrategy

from poft_plugin.data.render import special_tokens
from poft_plugin.data.rows import RowError, Turn, checked_conversation
from poft_plugin.hosts.axolotl.ranked_fields import shown
from poft_plugin.hosts.axolotl.reading import Read, Row

HEADERS = ("system", "user", "assistant")


@dataclass(frozen=True)
class SegmentReader:
    """Runs of trained segments are the assistant's turns, the rest is the prompt; the policy's markup is taken off.

    Args:
        strategy: the host's.
    """

    strategy: RawInputOutputStrategy

    def __call__(self, row: Row, where: str) -> Read:
        """The row, and the conversation in it.

        Raises:
            RowError: for segments that are none, or a response with the policy's markup inside.
        """
        segments = row.get("segments")
        if not segments:
            raise RowError(f"{where}: a row without a response: no `segments`; the row has {sorted(row)}")
        if not isinstance(segments, list):
            raise RowError(f"{where}: 'segments' is {shown(segments)}, not a list of {{label: .., text: ..}}")
        for number, segment in enumerate(segments):
            _check_segment(segment, f"segments[{number}]", where)
        markers = sorted(filter(None, special_tokens(self.strategy.tokenizer)), key=len, reverse=True)
        marker = re.compile("|".join(map(re.escape, markers)) or r"(?!)")
        turns: list[Turn] = []
        for trained, run in groupby(self.strategy.prompter.build_prompt(segments), key=lambda pair: bool(pair[0])):
            text = "".join(segment[1] for segment in run)
            turns += [_trained_segment(text, marker, where)] if trained else _prompt_turns(text, marker)
        return Read(row, checked_conversation(turns, where, field="segments"))


def _check_segment(segment: Any, place: str, where: str) -> None:
    if not isinstance(segment, Mapping):
        raise RowError(f"{where}: {place} is {shown(segment)}, not a mapping of `label` and `text`")
    if not isinstance(segment.get("text"), str):
        raise RowError(f"{where}: {place}.text is {shown(segment.get('text'))}, not text")
    if segment.get("label") not in (True, False):
        raise RowError(f"{where}: {place}.label is {shown(segment.get('label'))}; give true (trained on) or false")


def _trained_segment(text: str, marker: re.Pattern[str], where: str) -> Turn:
    """A response, without the special tokens (and the white space around them) at its ends."""
    text = re.sub(rf"^(?:(?:{marker.pattern})\s*)+", "", text)
    text = re.sub(rf"\s*(?:(?:{marker.pattern})\s*)+$", "", text)
    if inner := marker.search(text):
        raise RowError(
            f"{where}: a trained segment holds {inner.group()!r} inside, the policy's own markup, which references of "
            "other kinds cannot be given. Make it several segments, or use `type: chat_template`"
        )
    return Turn("assistant", text, counted=True)


def _prompt_turns(text: str, marker: re.Pattern[str]) -> list[Turn]:
    """The turns of a prompt in the policy's markup: a role's name right after a special token is a header."""
    if not marker.search(text):
        return [Turn("user", text)] if text.strip() else []
    turns, role = [], "user"
    for number, piece in enumerate(marker.split(text)):
        head, _, rest = piece.strip().partition("\n")
        if number and head.strip() in HEADERS:
            role, piece = head.strip(), rest
        if piece.strip():
            turns.append(Turn(role, piece.strip()))
            role = "user"
    return turns
