"""From a raw preference row to a prompt and its responses, best first.

Each dataset `type` that works has one reader. Every text under the fields that an entry names is in the sample, or the
row is refused: no turn is lost, none becomes part of another.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from poft_plugin.data.ranked import RankedSample, pair, ranked_list, refuse_answered
from poft_plugin.data.rows import RowError, Turn
from poft_plugin.hosts.axolotl.ranked_fields import (
    DIALOGUES,
    HH_RLHF,
    RANKED,
    RankedFields,
    Row,
    field_of,
    is_list,
    shown,
)
from poft_plugin.hosts.axolotl.ranked_order import ranks_by_winner, ranks_of, scores_of
from poft_plugin.hosts.axolotl.ranked_turns import answer, dialogue, has_question, is_marked, prompt_turns
from poft_plugin.hosts.axolotl.reasoning import Reasoned, reasoning_of

RankedReader = Callable[[Row, str], RankedSample]

Answer = tuple[list[Turn], Any]
"""The turns that a response's field holds before the response, and its text."""

TEXT_COLUMNS = ("system", "system_prompt", "system_message", "instruction", "input", "context", "history")
"""Columns whose text people expect in the prompt."""


def ranked_reader(kind: str, fields: RankedFields) -> RankedReader:
    """How rows of a `type` are read.

    Args:
        kind: one of `RANKED_TYPES`.
        fields: the entry's own keys.
    """
    readers = {HH_RLHF: _from_hh, RANKED: _from_list, DIALOGUES: _from_dialogues}
    reader = readers.get(kind, _from_pair)

    def read(row: Row, where: str) -> RankedSample:
        _refuse_tools(row, where)
        return reader(row, fields, where)

    return read


def unread_columns(row: Row, sample: RankedSample, fields: RankedFields) -> list[str]:
    """Columns that look like a part of the prompt, are not empty, and are neither read nor in the prompt already."""
    known = "\n".join(turn.content for turn in sample.prompt)
    found = []
    for name in TEXT_COLUMNS:
        value = row.get(name)
        text = value.strip() if isinstance(value, str) else ""
        if name not in fields.columns() and (text not in known if text else is_list(value) and value):
            found.append(name)
    return found


def _from_hh(row: Row, fields: RankedFields, where: str) -> RankedSample:
    """Two whole dialogues as text; or a prompt as such text, with bare responses beside it."""
    fields = fields.model_copy(update={"text_format": "hh"})
    names = (fields.field_chosen, fields.field_rejected)
    texts = [_text(row, name, where) for name in names]
    if row.get(fields.field_prompt) is None or any(has_question(text) for text in texts):
        return _from_dialogues(row, fields, where)
    answers = [answer(text, name, fields, where) for name, text in zip(names, texts, strict=True)]
    return _pair(row, _prompt(row, fields, where), answers, fields, where)


def _from_dialogues(row: Row, fields: RankedFields, where: str) -> RankedSample:
    """Two whole dialogues that differ in the last answer alone."""
    names = (fields.field_chosen, fields.field_rejected)
    found = [dialogue(field_of(row, name, where), fields, where) for name in names]
    for name, turns in zip(("chosen", "rejected"), found, strict=True):
        if not turns or turns[-1].role != "assistant":
            raise RowError(f"{where}: the {name} dialogue does not end with an assistant turn. Remove the row")
    return _pair(row, None, [(turns[:-1], turns[-1].content) for turns in found], fields, where)


def _from_pair(row: Row, fields: RankedFields, where: str) -> RankedSample:
    lists = [fields.field_responses] if isinstance(fields.field_responses, str) else fields.field_responses
    if fields.field_chosen not in row and any(name in row for name in lists):
        raise RowError(
            f"{where}: a list of responses; set `type: {RANKED}` for the data set, or give `{fields.field_chosen}`"
        )
    names = (fields.field_chosen, fields.field_rejected)
    values = [field_of(row, name, where) for name in names]
    if not _has_prompt(row, fields) and all(is_list(value) and len(value) > 1 for value in values):
        raise _no_prompt(row, fields, where, f"Set `type: {DIALOGUES}`, which reads whole dialogues")
    prompt = _prompt(row, fields, where)
    hh = _prompt_is_hh(row, fields, where)
    answers = [answer(value, name, fields, where, hh=hh) for name, value in zip(names, values, strict=True)]
    return _pair(row, prompt, answers, fields, where)


def _from_list(row: Row, fields: RankedFields, where: str) -> RankedSample:
    items, names = _responses(row, fields, where)
    hh = _prompt_is_hh(row, fields, where)
    answers, scores, ranks = [], [], []
    for number, (item, name) in enumerate(zip(items, names, strict=True)):
        value = item
        if isinstance(item, Mapping) and not _is_message(item, fields):
            value = _part(item, fields.field_response_text, number, where)
            inside = f"{where} response {number}"
            if fields.field_response_score is not None:
                scores.append(field_of(item, fields.field_response_score, inside))
            if fields.field_response_rank is not None:
                ranks.append(field_of(item, fields.field_response_rank, inside))
        bare = not isinstance(value, (str, Mapping, Sequence)) or (is_list(value) and not _is_dialogue(value))
        answers.append(([], value) if bare else answer(value, name, fields, where, hh=hh))
    needs_prompt = _has_prompt(row, fields) or not all(before for before, _ in answers)
    prompt, texts = _together(row, _prompt(row, fields, where) if needs_prompt else None, answers, fields, where)
    found = scores or scores_of(row, fields, where)
    order = ranks or ranks_of(row, fields, where) or ranks_by_winner(row, names, fields, where)
    return ranked_list(prompt, texts, scores=found, ranks=order, where=where)


def _pair(
    row: Row, prompt: list[Turn] | None, answers: Sequence[Answer], fields: RankedFields, where: str
) -> RankedSample:
    turns, (chosen, rejected) = _together(row, prompt, answers, fields, where)
    return pair(turns, chosen, rejected, scores=scores_of(row, fields, where), where=where)


def _together(
    row: Row, prompt: list[Turn] | None, answers: Sequence[Answer], fields: RankedFields, where: str
) -> tuple[list[Turn], list[Any]]:
    """The common prompt and the responses' texts: turns before a response are the prompt's, or there are none."""
    given = prompt is not None
    if prompt is None:
        prompt = answers[0][0] if answers else []
    else:
        refuse_answered(prompt, where)
    for number, (before, _) in enumerate(answers):
        if (before != prompt) if not given else (before and _stripped(before) != _stripped(prompt)):
            raise _differing(number, before, where, given=given)
    turns = _with_input(row, [t for t in prompt if t.role != "system" or t.content.strip()], fields, where)
    return _with_system(row, turns, fields, where), [text for _, text in answers]


def _differing(number: int, before: Sequence[Turn], where: str, *, given: bool) -> RowError:
    if not given:
        return RowError(
            f"{where}: the two dialogues differ before the last answer, so that there is no common prompt. Remove the "
            "row, or set `on_unusable_row: drop` for the data set"
        )
    return RowError(
        f"{where}: response {number} has {len(before)} turn(s) before the answer "
        f"({', '.join(turn.role for turn in before)}) that are not the prompt's; they would be lost. Set `type: "
        f"{DIALOGUES}` for the data set if its responses are whole dialogues, or `field_messages:` to the turns before "
        "the answer"
    )


def _stripped(turns: Sequence[Turn]) -> list[tuple[str, str, str]]:
    """What is compared: blank system turns are none."""
    found = [(turn.role, turn.content.strip(), reasoning_of(turn.content)) for turn in turns]
    return [turn for turn in found if turn != ("system", "", "")]


def _with_system(row: Row, turns: list[Turn], fields: RankedFields, where: str) -> list[Turn]:
    text = _column_text(row, fields.field_system, where)
    own = [turn.content.strip() for turn in turns if turn.role == "system"]
    if text is None or text.strip() in own:
        return turns
    if own:
        raise RowError(
            f"{where}: the prompt has a system turn, and {fields.field_system!r} another text ({shown(text)}). Remove "
            "one of them, or `field_system:`"
        )
    return [Turn("system", text), *turns]


def _with_input(row: Row, turns: list[Turn], fields: RankedFields, where: str) -> list[Turn]:
    text = _column_text(row, fields.field_input, where)
    if text is None:
        return turns
    if not turns or turns[-1].role != "user":
        raise RowError(f"{where}: {fields.field_input!r} has a text, but the prompt does not end with a user turn")
    last, joined = turns[-1].content, f"{turns[-1].content}\n\n{text}"
    return [*turns[:-1], Turn("user", Reasoned(joined, last.reasoning) if isinstance(last, Reasoned) else joined)]


def _column_text(row: Row, name: str | None, where: str) -> str | None:
    """A column's text, None where it is blank."""
    if name is None:
        return None
    if name not in row:
        if name == "system":  # the host's types read it where it is there; the name cannot be a slip
            return None
        raise RowError(f"{where}: no {name!r}; the row has {sorted(row)}. Check the field names of the dataset entry")
    if row[name] is not None and not isinstance(row[name], str):
        raise RowError(f"{where}: {name!r} is {shown(row[name])}, not text")
    return row[name] if row[name] and row[name].strip() else None


def _prompt(row: Row, fields: RankedFields, where: str) -> list[Turn]:
    if not _has_prompt(row, fields):
        raise _no_prompt(row, fields, where, "Set `field_messages:` or `field_prompt:`")
    first, second = row.get(fields.field_messages), row.get(fields.field_prompt)
    if first is None:
        return prompt_turns(second, fields, where)
    turns = prompt_turns(first, fields, where)
    if second is not None and fields.field_prompt != fields.field_messages:
        known = {turn.content.strip() for turn in turns}
        others = [turn for turn in prompt_turns(second, fields, where) if turn.content.strip() not in known]
        if any(turn.content.strip() for turn in others):
            raise RowError(
                f"{where}: {fields.field_messages!r} and {fields.field_prompt!r} are both there, and differ "
                f"({shown(others[0].content)}). Set `field_messages: {fields.field_prompt}` or `field_prompt: "
                f"{fields.field_messages}` to read one of them alone"
            )
    return turns


def _has_prompt(row: Row, fields: RankedFields) -> bool:
    return any(row.get(name) is not None for name in (fields.field_messages, fields.field_prompt))


def _no_prompt(row: Row, fields: RankedFields, where: str, remedy: str) -> RowError:
    return RowError(
        f"{where}: no prompt under {fields.field_messages!r} or {fields.field_prompt!r}; the row has {sorted(row)}. "
        f"{remedy}"
    )


def _prompt_is_hh(row: Row, fields: RankedFields, where: str) -> bool:
    """Whether the prompt is text with marks, so that white space around responses is markup."""
    found = [row.get(name) for name in (fields.field_messages, fields.field_prompt)]
    return is_marked(next((value for value in found if value is not None), None), fields, where)


def _responses(row: Row, fields: RankedFields, where: str) -> tuple[Sequence[Any], Sequence[str]]:
    """The responses as they come, and a name for each."""
    if not isinstance(fields.field_responses, str):
        names = fields.field_responses
        return [field_of(row, name, where) for name in names], names
    items = field_of(row, fields.field_responses, where)
    if not is_list(items):
        raise RowError(f"{where}: {fields.field_responses!r} is no list but {shown(items)}")
    return items, [f"response {number}" for number in range(len(items))]


def _part(item: Mapping[str, Any], name: str | None, number: int, where: str) -> Any:
    if name is None:
        raise RowError(
            f"{where}: response {number} is an object with {sorted(item)}; set `field_response_text:` (and "
            "`field_response_score:` or `field_response_rank:`) for the data set"
        )
    return field_of(item, name, f"{where} response {number}")


def _is_message(item: Mapping[str, Any], fields: RankedFields) -> bool:
    names = {fields.message_property_mappings.get(key, key) for key in ("role", "content")}
    return fields.field_response_text is None and names <= item.keys()


def _is_dialogue(value: Any) -> bool:
    return bool(value) and all(isinstance(item, Mapping) for item in value)


def _refuse_tools(row: Row, where: str) -> None:
    tools = row.get("tools")
    if tools and str(tools).strip() not in ("", "[]", "{}", "null", "None"):
        raise RowError(
            f"{where}: it has tools ({shown(tools)}), which references and reward models cannot be given. Remove such "
            "rows (or the column, if the answers do not depend on it)"
        )


def _text(row: Row, name: str, where: str) -> str:
    value = field_of(row, name, where)
    if not isinstance(value, str):
        raise RowError(f"{where}: {name!r} is {shown(value)}, not text")
    return value
