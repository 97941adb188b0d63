"""A conversation under a given tokenizer and chat template: token ids, and which of them are the response.

Response tokens are found by character offsets in the rendered text, so that a template needs no generation marker and
may strip or add white space. A response that cannot be found again exactly is an error, never a guess.
"""

import datetime
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from poft_plugin.data.rows import Conversation, RowError, Turn
from poft_plugin.data.templates import EndlessTemplateError, TemplateFailedError, render_template

FIXED_DATE = datetime.date(2024, 7, 26)
"""What templates that print today's date print here: a cached score must not depend on the day it was made."""

SystemTurns = Literal["keep", "merge", "drop"]


@dataclass(frozen=True)
class Rendered:
    """A conversation as one model sees it.

    Args:
        input_ids: token ids of the whole rendered text.
        counted: for each token whether it is part of the response; the first token never is (nothing predicts it).
        text: the rendered text.
        offsets: for each token its character span in `text`.
    """

    input_ids: tuple[int, ...]
    counted: tuple[bool, ...]
    text: str
    offsets: tuple[tuple[int, int], ...]

    @property
    def num_counted(self) -> int:
        """`T(y)`: response tokens under this tokenizer."""
        return sum(self.counted)


@dataclass(frozen=True)
class Renderer:
    """Renders conversations for one model.

    Args:
        tokenizer: a fast tokenizer (character offsets are needed).
        chat_template: Jinja text.
        name: the model in error messages, such as `reference 'zephyr'`.
        system_turns: `keep`; `merge` into the first user turn; `drop`.
        include_end_of_turn: count the end-of-turn token that the template writes after each counted turn.

    Raises:
        ValueError: if the tokenizer is not a fast one.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    name: str
    system_turns: SystemTurns = "keep"
    include_end_of_turn: bool = False

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{self.name}: {type(self.tokenizer).__name__} gives no character offsets; response "
                "tokens cannot be found. Use a model with a fast tokenizer (tokenizer.json)"
            )

    def __call__(self, conversation: Conversation, where: str) -> Rendered:
        """Renders and tokenizes one row.

        Args:
            conversation: the row.
            where: names the row in errors.

        Raises:
            RowError: if the template refuses the conversation, or a response cannot be found again exactly, or has no
                token, or has no end-of-turn token where one is to be counted.
        """
        turns = apply_system_turns(conversation, self.system_turns)
        text, spans = self._spans(turns, where)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets: list[tuple[int, int]] = encoding["offset_mapping"]
        if self.include_end_of_turn:
            spans = [(start, self._end_of_turn(text, end, where)) for start, end in spans]
        counted = _counted_tokens(offsets, spans)
        for number, (begin, end) in self._own_spans(text, encoding["input_ids"], offsets):
            counted[number] = any(begin < span_end and start < end for start, span_end in spans)
        counted[:1] = [False] * len(counted[:1])
        if not any(counted):
            raise RowError(f"{where}: {self.name}: the response has no token in the rendered text")
        return Rendered(tuple(encoding["input_ids"]), tuple(counted), text, tuple(offsets))

    def _spans(self, turns: Conversation, where: str) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and the character span of each counted turn in it."""
        counted = [index for index, turn in enumerate(turns) if turn.counted]
        markers = {index: _marker(index, turns) for index in counted}
        text = self._render(turns, where)
        skeleton = self._render(
            tuple(replace(t, content=markers[i]) if i in markers else t for i, t in enumerate(turns)), where
        )
        pieces = re.split("|".join(map(re.escape, markers.values())), skeleton)
        spans = None
        if len(pieces) == len(counted) + 1:
            spans = _find_contents(text, pieces, [turns[i].content for i in counted])
        if spans is None:
            raise RowError(
                f"{where}: {self.name}: its chat template changes the response, so that it cannot be "
                "found again in the rendered text. Give it another `chat_template:` or remove the row"
            )
        return text, spans

    def _render(self, turns: Conversation, where: str) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return render_template(
                self.tokenizer, messages, chat_template=self.chat_template, strftime_now=FIXED_DATE.strftime
            )
        except EndlessTemplateError as error:
            raise ValueError(f"{where}: the chat template of {self.name}: {error}. Correct it") from error
        except TemplateFailedError as error:
            roles = [turn.role for turn in turns]
            hint = (
                " Set `system_turns: merge` or `drop` for it, if it knows no system turn." if "system" in roles else ""
            )
            raise RowError(
                f"{where}: the chat template of {self.name} refuses the turns {roles}: {error}.{hint}"
            ) from error

    def _own_spans(
        self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, tuple[int, int]]]:
        """Position and own characters of added tokens that swallow the white space beside them (Phi-3's role tokens).

        Their offsets take that white space in, and it may be the response's.
        """
        for number, token in enumerate(ids if self._swallowing else ()):
            start, end = offsets[number]
            begin = text.find(self._swallowing[token], start, end) if token in self._swallowing else -1
            if begin >= 0:
                yield number, (begin, begin + len(self._swallowing[token]))

    @cached_property
    def _swallowing(self) -> dict[int, str]:
        added: dict[int, Any] = self.tokenizer.added_tokens_decoder
        return {number: token.content for number, token in added.items() if token.lstrip or token.rstrip}

    def _end_of_turn(self, text: str, end: int, where: str) -> int:
        """Character position after the special token that ends the turn (white space before it is part of it)."""
        match = self._special.match(text, end) if self._special else None
        if match is None:
            raise RowError(
                f"{where}: {self.name}: `include_end_of_turn: true`, but its template writes no special "
                f"token after the response (found {text[end : end + 20]!r}). Set it to false or change the template"
            )
        return match.end()

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """White space and a special token, the longest that fits; made once, since tokenizers have hundreds."""
        special = sorted(special_tokens(self.tokenizer), key=len, reverse=True)
        return re.compile(r"\s*(?:" + "|".join(map(re.escape, special)) + ")") if special else None


def apply_system_turns(conversation: Conversation, mode: SystemTurns) -> Conversation:
    r"""Keeps, merges or drops system turns.

    Args:
        conversation: the row.
        mode: `keep`; `merge` puts the system text before the first user turn's, a blank line between; `drop`.

    Examples:
        >>> turns = (Turn("system", "Be kind."), Turn("user", "hi"))
        >>> apply_system_turns(turns, "merge")[0].content
        'Be kind.\n\nhi'
    """
    system = [turn.content for turn in conversation if turn.role == "system"]
    if mode == "keep" or not system:
        return conversation
    rest = [turn for turn in conversation if turn.role != "system"]
    if mode == "merge":
        first_user = next((i for i, turn in enumerate(rest) if turn.role == "user"), None)
        if first_user is None:
            return (Turn("user", "\n\n".join(system)), *rest)
        merged = "\n\n".join([*system, rest[first_user].content])
        rest[first_user] = replace(rest[first_user], content=merged)
    return tuple(rest)


def _marker(index: int, turns: Sequence[Turn]) -> str:
    """A word that stands for a turn's content and occurs in no turn."""
    marker = f"xqTURN{index}qx"
    while any(marker in turn.content for turn in turns):
        marker = f"x{marker}x"
    return marker


def _find_contents(text: str, pieces: list[str], contents: list[str]) -> list[tuple[int, int]] | None:
    """Spans of the contents in `piece 0 + content 0 + piece 1 + ...`, where a template may have stripped a content."""
    if not text.startswith(pieces[0]):
        return None
    spans: list[tuple[int, int]] = []
    position = len(pieces[0])
    for number, (content, after) in enumerate(zip(contents, pieces[1:], strict=True)):
        last = number == len(contents) - 1
        for form in _forms(content):
            end = position + len(form)
            fits = text[end:] == after if last else text.startswith(after, end)
            if form and text.startswith(form, position) and fits:
                break
        else:
            return None
        spans.append((position, end))
        position = end + len(after)
    return spans


def _forms(content: str) -> list[str]:
    """What templates make of a text: as it is, or without white space, or without newlines, at either end."""
    strips = (str.strip, str.rstrip, str.lstrip)
    return [content, *(f(content) for f in strips), *(f(content, "\n") for f in strips)]


def _counted_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token shares at least one character with a span.

    Byte-level tokenizers report a leading space outside of the token (`trim_offsets`), down to empty tokens for runs
    of spaces: a token is taken to begin where the text before it was used up.
    """
    if not offsets:
        return []
    ends = np.array([end for _, end in offsets])
    used_up = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
    starts = np.minimum([start for start, _ in offsets], used_up)
    counted = np.zeros(len(ends), dtype=bool)
    for start, end in spans:
        counted |= np.maximum(starts, start) < np.minimum(ends, end)
    return [bool(value) for value in counted]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts of all special tokens, added ones too."""
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    return {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
