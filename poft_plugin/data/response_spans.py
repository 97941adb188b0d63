"""Where the responses stand in a rendered text: character spans, proven by rendering the row with marks in it.

A mark instead of the response is not enough: templates look at what they write (Qwen3's takes `<think>` apart and
writes an empty one before an answer without it). So a mark is also put *into* the response, at several places. Where
the rendered text stays the same but for the mark, the place of the mark is the place of that character.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from poft_plugin.data.rows import Conversation, Turn

Span = tuple[int, int]
Render = Callable[[Conversation], str | None]
"""The text of a conversation; None where the template refuses it."""


class NotFoundError(Exception):
    """A response that is not in the rendered text, or not certainly; the message says which and why."""


def find_responses(turns: Conversation, text: str, render: Render) -> list[Span]:
    """The span of each counted turn in `text`, the white space that the template kept at its ends included.

    Args:
        turns: the conversation.
        text: what `render` makes of it.
        render: the template.

    Raises:
        NotFoundError: for a response that the text does not hold word for word, or holds at no certain place.
    """
    counted = [index for index, turn in enumerate(turns) if turn.counted]
    spans = _by_substitution(turns, counted, text, render)
    if spans is not None:
        return spans
    spans = []
    for index in counted:
        span = _by_insertion(turns, index, text, render) or _by_disappearance(turns, index, text, render)
        if span is None or (spans and span[0] < spans[-1][1]):
            raise NotFoundError(_why(turns, index, text, render))
        spans.append(span)
    return spans


def skipped_turns(turns: Conversation, text: str, render: Render) -> tuple[str, ...]:
    """Roles of the turns of the prompt that the template leaves out: whatever they say, the text stays the same.

    Args:
        turns: the conversation.
        text: what `render` makes of it.
        render: the template.
    """
    roles: dict[str, None] = {}
    for index, turn in enumerate(turns):
        core = turn.content.strip()
        if turn.counted or turn.role in roles or not core:
            continue
        if text.count(core) < sum(other.content.count(core) for other in turns) and text == render(
            _with_content(turns, index, marker(index, turns))
        ):
            roles[turn.role] = None
    return tuple(roles)


def marker(index: int, turns: Sequence[Turn]) -> str:
    """A word that stands for a turn's content and occurs in no turn."""
    word = f"xqTURN{index}qx"
    while any(word in turn.content for turn in turns):
        word = f"x{word}x"
    return word


def _with_content(turns: Conversation, index: int, content: str) -> Conversation:
    return (*turns[:index], replace(turns[index], content=content), *turns[index + 1 :])


def _by_substitution(turns: Conversation, counted: Sequence[int], text: str, render: Render) -> list[Span] | None:
    """One more rendering for all turns at once: what most templates need."""
    markers = {index: marker(index, turns) for index in counted}
    skeleton = render(tuple(replace(t, content=markers[i]) if i in markers else t for i, t in enumerate(turns)))
    pieces = [] if skeleton is None else re.split("|".join(map(re.escape, markers.values())), skeleton)
    if len(pieces) != len(counted) + 1:
        return None
    return _find_contents(text, pieces, [turns[i].content for i in counted])


def _find_contents(text: str, pieces: list[str], contents: list[str]) -> list[Span] | None:
    """Spans of the contents in `piece 0 + content 0 + piece 1 + ...`, where a template may have stripped a content."""
    if not text.startswith(pieces[0]):
        return None
    spans: list[Span] = []
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


def _by_insertion(turns: Conversation, index: int, text: str, render: Render) -> Span | None:
    """The response's span by a mark inside of it: nothing else of the text may change."""
    content = turns[index].content
    core = content.strip()
    first = content.find(core)
    for place in _places(core):
        mark = _mark_at(turns, index, first + place, text, render)
        start = None if mark is None else _start(text, core, mark, place)
        if start is not None:
            return _widened(turns, index, (start, start + len(core)), text, render)
    return None


def _places(core: str) -> Iterator[int]:
    """Where a mark is tried: the end, the beginning, the end of the first and the beginning of the last line."""
    places = [len(core), 0, core.find("\n"), core.rfind("\n") + 1, len(core) // 2]
    yield from dict.fromkeys(place for place in places if place >= 0)


def _mark_at(turns: Conversation, index: int, place: int, text: str, render: Render) -> int | None:
    """Where in `text` the character `place` of the turn's content stands; None where the mark changes more."""
    content, word = turns[index].content, marker(index, turns)
    marked = render(_with_content(turns, index, content[:place] + word + content[place:]))
    if marked is None or marked.count(word) != 1 or marked.replace(word, "") != text:
        return None
    return marked.find(word)


def _start(text: str, core: str, mark: int, place: int) -> int | None:
    """Where the response begins if its character `place` is at `mark`: white space may lie between, at its ends."""
    if mark >= place and text.startswith(core, mark - place):
        return mark - place
    before, after = text[:mark].rstrip(), text[mark:].lstrip()
    if place == len(core) and before.endswith(core):
        return len(before) - len(core)
    return len(text) - len(after) if place == 0 and after.startswith(core) else None


def _widened(turns: Conversation, index: int, span: Span, text: str, render: Render) -> Span:
    """With the white space at the response's ends that is its own: a mark before (or after) it tells."""
    content = turns[index].content
    core = content.strip()
    first, last = content.find(core), content.find(core) + len(core)
    start, end = span
    for place in dict.fromkeys((0, first - len(content[:first].lstrip("\n")))):
        kept = content[place:first]
        if kept and _mark_at(turns, index, place, text, render) == start - len(kept):
            start -= len(kept)
            break
    for place in dict.fromkeys((len(content), last + len(content[last:].rstrip("\n")))):
        kept = content[last:place]
        if kept and _mark_at(turns, index, place, text, render) == end + len(kept):
            end += len(kept)
            break
    return start, end


def _by_disappearance(turns: Conversation, index: int, text: str, render: Render) -> Span | None:
    """The one place that holds the response, if no place does once another word stands in its stead."""
    core = turns[index].content.strip()
    if text.count(core) != 1:
        return None
    without = render(_with_content(turns, index, marker(index, turns)))
    if without is None or core in without:
        return None
    return text.find(core), text.find(core) + len(core)


def _why(turns: Conversation, index: int, text: str, render: Render) -> str:
    core = turns[index].content.strip()
    if render(_with_content(turns, index, marker(index, turns))) == text:
        return f"its chat template leaves out turn {index}, a response"
    if not (times := text.count(core)):
        return f"its chat template changes the response, turn {index}: the rendered text does not hold it word for word"
    return (
        f"the text of turn {index}, a response, stands {times} time(s) in what its chat template writes, and which of "
        "them is the response cannot be told"
    )
