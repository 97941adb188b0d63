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

from poft_plugin.data.response_spans import NotFoundError, Span, find_responses, skipped_turns
from poft_plugin.data.rows import Conversation, RowError, Turn
from poft_plugin.data.templates import EndlessTemplateError, TemplateFailedError, render_template

FIXED_DATE = datetime.date(2024, 7, 26)
"""What templates that print today's date print here: a cached score must not depend on the day it was made."""

SystemTurns = Literal["keep", "merge", "drop"]

EndOfTurn = Literal["auto", True, False]
"""Whether the token that ends a response counts: where the policy's labels hold one (`Turn.ends`), always, never."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as one model sees it.

    Args:
        input_ids: token ids of the whole rendered text.
        counted: for each token whether it is part of the response; the first token never is (nothing predicts it).
        text: the rendered text.
        offsets: for each token its character span in `text`.
        skipped: roles of turns of the prompt that the template leaves out.
        lacks_end: the policy is trained on a token that ends a response, and this template writes none there.
    """

    input_ids: tuple[int, ...]
    counted: tuple[bool, ...]
    text: str
    offsets: tuple[Span, ...]
    skipped: tuple[str, ...] = ()
    lacks_end: bool = False

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
        include_end_of_turn: count the token that the template writes at the end of a counted turn.
        needs_response: a response that is not found in the rendered text is an error; else no token counts then.

    Raises:
        ValueError: if the tokenizer is not a fast one.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    name: str
    system_turns: SystemTurns = "keep"
    include_end_of_turn: EndOfTurn = False
    needs_response: bool = True

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
        text = self._render(turns, where)
        spans = self._spans(turns, text, where)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets: list[Span] = encoding["offset_mapping"]
        counted, lacks_end = [False] * len(offsets), False
        if spans is not None:
            ends = [self._ends(turn, text, span[1], where) for turn, span in zip(_responses(turns), spans, strict=True)]
            lacks_end = any(len(found) < turn.ends for turn, found in zip(_responses(turns), ends, strict=True))
            lacks_end &= self.include_end_of_turn == "auto"
            own = [*self._own_characters(text, encoding["input_ids"], offsets)]
            counted = counted_tokens(own, [*spans, *(span for found in ends for span in found)])
            counted[:1] = [False] * len(counted[:1])
        if self.needs_response and not any(counted):
            raise RowError(f"{where}: {self.name}: the response has no token in the rendered text")
        skipped = skipped_turns(turns, text, self._probe)
        return Rendered(tuple(encoding["input_ids"]), tuple(counted), text, tuple(offsets), skipped, lacks_end)

    def _spans(self, turns: Conversation, text: str, where: str) -> list[Span] | None:
        """The character span of each counted turn in the text."""
        try:
            return find_responses(turns, text, self._probe)
        except NotFoundError as error:
            if not self.needs_response:
                return None
            raise RowError(
                f"{where}: {self.name}: {error}. Give it another `chat_template:` or remove the row"
            ) from None

    def _probe(self, turns: Conversation) -> str | None:
        """The rendered text, or None where the template refuses what it is tried with."""
        try:
            return self._apply(turns)
        except TemplateFailedError:
            return None

    def _apply(self, turns: Conversation) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return render_template(
            self.tokenizer, messages, chat_template=self.chat_template, strftime_now=FIXED_DATE.strftime
        )

    def _render(self, turns: Conversation, where: str) -> str:
        try:
            return self._apply(turns)
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

    def _own_characters(self, text: str, ids: Sequence[int], offsets: Sequence[Span]) -> Iterator[Span]:
        """Each token's characters in the text, where its offsets say more or less than it holds.

        Added tokens may swallow the white space beside them (Phi-3's role tokens), and it may be the response's.
        Byte-level tokenizers may leave the spaces at a token's ends out of its offsets (`trim_offsets`), down to empty
        ones for runs of spaces. Characters that a normalizer composes or removes are nobody's.
        """
        tokens = self.tokenizer.convert_ids_to_tokens(list(ids)) if self._trims else None
        used_up = 0
        for number, (start, end) in enumerate(offsets):
            if ids[number] in self._added:
                own = text.find(self._added[ids[number]], start, end)
                start, end = (own, own + len(self._added[ids[number]])) if own >= 0 else (start, end)
            elif tokens is not None and SPACE in tokens[number]:
                start, end = _with_spaces(text, tokens[number], (start, end), used_up)
            used_up = max(used_up, end)
            yield start, end

    @cached_property
    def _added(self) -> dict[int, str]:
        added: dict[int, Any] = self.tokenizer.added_tokens_decoder
        return {number: token.content for number, token in added.items()}

    @cached_property
    def _trims(self) -> bool:
        """Whether it is byte-level."""
        return '"ByteLevel"' in self.tokenizer.backend_tokenizer.to_str()

    def _ends(self, turn: Turn, text: str, end: int, where: str) -> list[Span]:
        """The tokens that end a response and count, white space before them aside."""
        if self.include_end_of_turn is False or (self.include_end_of_turn == "auto" and not turn.ends):
            return []
        found = self._end_tokens(text, end)
        if not found and self.include_end_of_turn is True:
            raise RowError(
                f"{where}: {self.name}: `include_end_of_turn: true`, but its template writes no special "
                f"token after the response (found {text[end : end + 20]!r}). Set it to `auto` or false, or change the "
                "template"
            )
        return found[: max(turn.ends, 1)]

    def _end_tokens(self, text: str, end: int) -> list[Span]:
        """The special tokens right after a response that end it: the tokenizer's own end of text, and the first."""
        found: list[Span] = []
        while self._special and (match := self._special.match(text, end)):
            found.append(match.span(1))
            end = match.end()
        own = [span for span in found if text[slice(*span)] == self.tokenizer.eos_token]
        return list(dict.fromkeys([*own[:1], *found[:1]]))

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """White space and a special token, the longest that fits; made once, since tokenizers have hundreds."""
        special = sorted(filter(None, special_tokens(self.tokenizer)), key=len, reverse=True)
        return re.compile(r"\s*(" + "|".join(map(re.escape, special)) + ")") if special else None


def apply_system_turns(conversation: Conversation, mode: SystemTurns) -> Conversation:
    r"""Keeps, merges or drops system turns. A blank one is none.

    Args:
        conversation: the row.
        mode: `keep`; `merge` puts the system text before the first user turn's, a blank line between; `drop`.

    Examples:
        >>> turns = (Turn("system", "Be kind."), Turn("user", "hi"))
        >>> apply_system_turns(turns, "merge")[0].content
        'Be kind.\n\nhi'
        >>> apply_system_turns((Turn("system", " "), Turn("user", "hi")), "keep")[0].content
        'hi'
    """
    conversation = tuple(turn for turn in conversation if turn.role != "system" or turn.content.strip())
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


SPACE = "Ġ"
"""How byte-level vocabularies write a space."""


def _with_spaces(text: str, token: str, span: Span, used_up: int) -> Span:
    """A byte-level token's span with the spaces at its ends that its offsets may leave out."""
    start, end = span
    spaces = len(token) - len(token.strip(SPACE))
    if start == end and not token.strip(SPACE):  # nothing but spaces, all trimmed
        return max(used_up, start - spaces), end
    inside = text[start:end]
    leading = len(token) - len(token.lstrip(SPACE)) - (len(inside) - len(inside.lstrip(" ")))
    trailing = len(token) - len(token.rstrip(SPACE)) - (len(inside) - len(inside.rstrip(" ")))
    while leading > 0 and start > used_up and text[start - 1] == " ":
        start, leading = start - 1, leading - 1
    while trailing > 0 and end < len(text) and text[end] == " ":
        end, trailing = end + 1, trailing - 1
    return start, end


def _responses(turns: Conversation) -> list[Turn]:
    return [turn for turn in turns if turn.counted]


def counted_tokens(tokens: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token holds a character of a span, or lies between two that do (and holds none at all).

    Args:
        tokens: each token's characters.
        spans: the responses.

    Examples:
        >>> counted_tokens([(0, 3), (3, 5), (5, 5), (5, 8), (8, 9)], [(4, 7)])
        [False, True, True, True, False]
    """
    starts, ends = np.array([start for start, _ in tokens], int), np.array([end for _, end in tokens], int)
    counted = np.zeros(len(ends), dtype=bool)
    for start, end in spans:
        holding = np.flatnonzero(np.maximum(starts, start) < np.minimum(ends, end))
        if len(holding):
            counted[holding[0] : holding[-1] + 1] = True
    return [bool(value) for value in counted]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts of all special tokens, added ones too."""
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    return {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
