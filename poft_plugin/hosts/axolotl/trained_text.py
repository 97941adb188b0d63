"""What the policy's labels train, held against the response: the same text, row by row, as the references score.

Both sides are brought to one form (encoded and decoded by the policy's tokenizer, special tokens taken out) and walked
turn by turn, so that turns may follow each other without a header between. Whatever the host's strategy or the
policy's template leaves out, changes, doubles or adds is seen here.

The host finds a turn by what changes where another text stands in its stead. A template that looks at the text
(Qwen3's opens a think block of its own before an answer without one) writes the beginning of such a response in both
cases, so the host leaves it unlabelled though it is written word for word. `completed` labels it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from poft_plugin.data.render import special_tokens
from poft_plugin.data.rows import Conversation, RowError
from poft_plugin.losses.logps import IGNORED

MOST_ENDS = 2
"""Tokens that end one turn: the template's, and the tokenizer's own end of text after it."""

SHOWN = 60
"""Characters of a text in an error."""

PLACEHOLDERS = ("[[dummy_message]]", "zzdummymessagezz")
"""What the host puts into a turn's place to see where it stands; in a text they move its labels."""


class TextDiffersError(Exception):
    """The trained text is not the response's."""


@dataclass(frozen=True)
class Segment:
    """Tokens that are trained on end to end, none of them special.

    Args:
        ids: the tokens.
        ends: special tokens that are trained on after them, before anything else is.
    """

    ids: tuple[int, ...]
    ends: int = 0


@dataclass(frozen=True)
class TrainedText:
    """Reads labels back.

    Args:
        tokenizer: the policy's.
        end_tokens: texts of tokens that end a turn, besides the special ones (`eot_tokens`).
    """

    tokenizer: PreTrainedTokenizerBase
    end_tokens: tuple[str, ...] = ()

    def check(self, conversation: Conversation, labels: Sequence[int], where: str) -> Conversation:
        """The conversation with `ends` filled in, from one row's labels.

        Args:
            conversation: the row.
            labels: the host's.
            where: names the row in errors.

        Raises:
            RowError: if the labels train another text than the turns that count.
        """
        segments = self._segments(labels)
        try:
            return self._checked(conversation, segments, self._decode([segment.ids for segment in segments]))
        except TextDiffersError as error:
            raise RowError(f"{where}: {error}. {_remedy(conversation)}") from None

    def completed(self, conversation: Conversation, input_ids: Sequence[int], labels: Sequence[int]) -> list[int]:
        """The labels of whole responses, and of nothing before them.

        Beginnings that are written word for word but not labelled are added; tokens of white space that is not the
        response's are taken off (`type: alpaca` encodes an answer apart, before which SentencePiece puts a space).

        Args:
            conversation: the row.
            input_ids: its tokens.
            labels: the host's.

        Returns:
            The same labels where nothing is missing, or what is missing does not stand right before.
        """
        found = [int(label) for label in labels]
        contents = [turn.content for turn in conversation if turn.counted]
        runs = _runs(found)
        if len(runs) != len(contents):
            return found
        free = 0  # the first token that belongs to no response before
        for content, (start, end) in zip(contents, runs, strict=True):
            begin = free + self._beginning(content.strip(), input_ids[free:end], start - free)
            found[begin:start] = input_ids[begin:start]
            if not content[:1].isspace():
                blank = self._blank(input_ids[begin:end])
                found[begin : begin + blank] = [IGNORED] * blank
            free = end
        return found

    def _blank(self, ids: Sequence[int]) -> int:
        """How many tokens at the beginning hold nothing but white space."""
        blank = 0
        while blank < len(ids) - 1 and ids[blank] not in self._marks and not self._decode([[ids[blank]]])[0].strip():
            blank += 1
        return blank

    def _beginning(self, core: str, ids: Sequence[int], start: int) -> int:
        """Where in tokens that end with a labelled run a response begins: at `start`, or before it."""
        (trained,) = self._decode([[id_ for id_ in ids[start:] if id_ not in self._marks]])
        lacking = len(core) - len(trained.strip())
        if lacking <= 0 or not core.endswith(trained.strip()):
            return start
        for begin in range(start - 1, max(start - 2 * lacking - 2, -1), -1):  # some tokens hold no character of it
            if ids[begin] in self._marks:
                break
            (text,) = self._decode([[id_ for id_ in ids[begin:] if id_ not in self._marks]])
            if text.strip() == core:
                return begin
        return start

    def _checked(self, conversation: Conversation, segments: Sequence[Segment], texts: Sequence[str]) -> Conversation:
        contents = [turn.content for turn in conversation if turn.counted]
        own_ends = [0] * len(contents)
        try:
            places = walk("".join(texts), contents)
        except TextDiffersError:  # as this tokenizer would write them: it may normalise, and take up special tokens
            forms = [self._segments(self._encode(content)) for content in contents]
            pieces = [self._decode([segment.ids for segment in form]) for form in forms]
            written = ["".join(texts_of_one) for texts_of_one in pieces]
            own_ends = [
                _ends_at(walk(text, [text]), form, parts)[0]
                for text, form, parts in zip(written, forms, pieces, strict=True)
            ]
            texts = self._without_shared_ends(segments, texts, written)
            places = walk("".join(texts), written)
        ends = iter(
            min(max(count - own, 0), MOST_ENDS)
            for count, own in zip(_ends_at(places, segments, texts), own_ends, strict=True)
        )
        return tuple(replace(turn, ends=next(ends)) if turn.counted else turn for turn in conversation)

    def _segments(self, labels: Iterable[int]) -> list[Segment]:
        segments: list[Segment] = []
        ids: list[int] = []
        for label in [*labels, IGNORED]:
            if label == IGNORED or label in self._marks:
                if ids:
                    segments.append(Segment(tuple(ids)))
                    ids = []
                if label != IGNORED and segments:
                    segments[-1] = replace(segments[-1], ends=segments[-1].ends + 1)
            else:
                ids.append(int(label))
        return segments

    def _without_shared_ends(
        self, segments: Sequence[Segment], texts: Sequence[str], contents: Sequence[str]
    ) -> list[str]:
        """Takes off what a token at a segment's end holds of the template's text, besides the response's."""
        trimmed = []
        for segment, text in zip(segments, texts, strict=True):
            first, last = self._decode([segment.ids[:1], segment.ids[-1:]])
            cores = [content.strip() for content in contents]
            leads = [n for n in range(len(first)) if any(text[n:].startswith(core[:SHOWN]) for core in cores)]
            text = text[leads[0] :] if leads else text
            tails = [
                n for n in range(len(last)) if any(text[: len(text) - n].endswith(core[-SHOWN:]) for core in cores)
            ]
            trimmed.append(text[: len(text) - tails[0]] if tails else text)
        return trimmed

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        if not sequences:  # transformers takes an empty list for one sequence
            return []
        return self.tokenizer.batch_decode(
            [list(ids) for ids in sequences], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    @cached_property
    def _marks(self) -> frozenset[int]:
        """Ids of the tokens that are no text: an unknown word's may be the response's, if it is nothing else."""
        tokenizer = self.tokenizer
        marks: Any = tokenizer.convert_tokens_to_ids([*special_tokens(tokenizer), *self.end_tokens])
        ids = set(marks)
        others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        unknown = set() if tokenizer.unk_token_id in others else {tokenizer.unk_token_id}
        return frozenset(ids - unknown - {None})


def _runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Where each run of tokens that are trained on begins, and what comes after it.

    Examples:
        >>> _runs([IGNORED, 5, 6, IGNORED, 7])
        [(1, 3), (4, 5)]
    """
    trained = np.concatenate(([False], np.asarray(labels) != IGNORED, [False]))
    borders = np.flatnonzero(trained[1:] != trained[:-1])
    return [(int(start), int(end)) for start, end in borders.reshape(-1, 2)]


def walk(text: str, contents: Sequence[str]) -> list[int]:
    """Where each content ends in a text that is these contents in order, white space at their ends aside.

    Args:
        text: what is trained on.
        contents: what is to be.

    Raises:
        TextDiffersError: if the text is anything else.

    Examples:
        >>> walk("one. two", ["one. ", "two"])
        [4, 8]
    """
    places, position = [], 0
    for number, content in enumerate(contents):
        core = content.strip()
        position += len(text[position:]) - len(text[position:].lstrip())
        if not text.startswith(core, position):
            raise TextDiffersError(_difference(core, text[position:].rstrip(), f"response {number + 1}"))
        position += len(core)
        places.append(position)
    if extra := text[position:].strip():
        raise TextDiffersError(_difference("", extra, "after the last response"))
    return places


def _difference(expected: str, trained: str, what: str) -> str:
    """A sentence with the two texts from a little before where they part."""
    same = next((i for i, (a, b) in enumerate(zip(expected, trained, strict=False)) if a != b), None)
    begin = max(0, (min(len(expected), len(trained)) if same is None else same) - SHOWN // 3)
    shown = [
        repr(("..." if begin else "") + text[begin : begin + SHOWN]) if text else "nothing"
        for text in (expected, trained)
    ]
    return f"what the policy is trained on is not the response: {what} is {shown[0]}, trained on is {shown[1]}"


def _remedy(conversation: Conversation) -> str:
    held = next((word for word in PLACEHOLDERS if any(word in turn.content for turn in conversation)), None)
    if held is not None:
        return (
            f"The row holds {held!r}, by which the host finds its labels: change that word in it, or remove such rows"
        )
    if any("</think>" in turn.content for turn in conversation if turn.counted):
        return (
            "Qwen3-like templates write `<think>\\n..\\n</think>\\n\\n` around the reasoning of the last turn and "
            "delete that of earlier ones, R1-like ones delete all, and references would score another text. Write it "
            "in the data as the template does (none in earlier turns), give the policy a `chat_template:` that keeps "
            "it, such as `chatml`, or remove such rows"
        )
    return (
        "The policy's chat template (or the prompt's format) leaves out, changes or adds something there, and "
        "references would score another text: give the policy another `chat_template:`, or remove such rows"
    )


def _ends_at(places: Sequence[int], segments: Sequence[Segment], texts: Sequence[str]) -> list[int]:
    """How many special tokens are trained on right after each place, white space aside."""
    text, borders = "".join(texts), np.cumsum([len(piece) for piece in texts])
    counts = []
    for place in places:
        blank_until = place + len(text[place:]) - len(text[place:].lstrip())
        counts.append(
            sum(s.ends for s, border in zip(segments, borders, strict=True) if place <= border <= blank_until)
        )
    return counts
