r"""Turns out of what a field of a preference row holds: messages, a message, text, `\n\nHuman:` text, JSON text."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from poft_plugin.data.rows import RowError, Turn
from poft_plugin.hosts.axolotl.ranked_fields import RankedFields, is_list, shown
from poft_plugin.hosts.axolotl.reasoning import REASONING, Reasoned

_MARK = re.compile(r"\n\n(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}
_DEFAULT_ROLES = {"user": ["user", "human"], "assistant": ["assistant", "gpt"], "system": ["system"], "tool": ["tool"]}

_OPEN_ASSISTANT = re.compile(r"\s*(?:<\|endoftext\|>)?<\|(prompter|assistant)\|>")
"""How OpenAssistant's models and PRO's files begin a turn."""

_TEMPLATE_MARKUP = re.compile(
    r"\s*(?:<\|begin_of_text\|>|<s>)?\s*(<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|user\|>|<\|system\|>)"
)
"""How a prompt begins that a chat template wrote already."""

CALLS = ("tool_calls", "function_call")


def parse_hh_dialogue(text: str, where: str) -> list[Turn]:
    r"""The turns of a dialogue of Anthropic/hh-rlhf; two marks of one role in a row are one turn.

    Args:
        text: `\n\nHuman: ...\n\nAssistant: ...`.
        where: names the row in errors.

    Examples:
        >>> [turn.content for turn in parse_hh_dialogue("\n\nHuman: hi\n\nAssistant: ho", "row 0")]
        ['hi', 'ho']
    """
    before, *pieces = _MARK.split(text if text.startswith("\n") else f"\n\n{text}")
    if before.strip() or not pieces:
        raise RowError(f"{where}: not a dialogue of hh-rlhf: it begins {text[:40]!r}, not '\\n\\nHuman:'")
    turns: list[Turn] = []
    for mark, content in zip(pieces[::2], pieces[1::2], strict=True):
        role, content = _ROLE[mark], content.strip()
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, "\n\n".join(filter(None, [turns[-1].content, content])))
        else:
            turns.append(Turn(role, content))
    return turns


def is_hh(text: str) -> bool:
    r"""Whether a text is a dialogue of hh-rlhf: it begins with a mark, and has its blank line or another mark.

    Examples:
        >>> [is_hh(text) for text in ("\n\nHuman: hi", "Human: hi\n\nAssistant:", "Human: hi", "say\n\nHuman: hi")]
        [True, True, False, False]
    """
    begins = _MARK.match(f"\n\n{text.lstrip()}") is not None
    return begins and (text.startswith("\n\n") or _MARK.search(text) is not None)


def is_marked(value: Any, fields: RankedFields, where: str) -> bool:
    """Whether a prompt is text with marks of hh-rlhf or OpenAssistant."""
    text = value if fields.text_format == "plain" else _joined_pieces(value, where)
    return isinstance(text, str) and fields.text_format != "plain" and is_hh(text)


def has_marks(text: str) -> bool:
    r"""Whether a mark of hh-rlhf begins a paragraph anywhere in a text."""
    return _MARK.search(text) is not None


def has_question(text: str) -> bool:
    r"""Whether a text is a dialogue of hh-rlhf with more than the answer.

    Examples:
        >>> [has_question(text) for text in ("\n\nHuman: hi\n\nAssistant: ho", "\n\nAssistant: ho", "ho")]
        [True, False, False]
    """
    return is_hh(text) and "Human" in [mark[1] for mark in _MARK.finditer(f"\n\n{text.lstrip()}")]


def prompt_turns(value: Any, fields: RankedFields, where: str) -> list[Turn]:
    """The turns of a prompt; an empty assistant turn at its end is a header, not a turn.

    Args:
        value: messages, or text of any format; PRO's `prefix`, too, which has it in pieces, once for each response.
        fields: the entry's own keys.
        where: names the row in errors.

    Raises:
        RowError: for anything else, and for text that holds turns which this entry does not read.
    """
    value = value if fields.text_format == "plain" else _joined_pieces(value, where)
    turns = _turns_of_text(value, fields, where) if isinstance(value, str) else messages(value, fields, where)
    if len(turns) > 1 and turns[-1].role == "assistant" and not turns[-1].content.strip():
        turns = turns[:-1]
    return turns


def dialogue(value: Any, fields: RankedFields, where: str) -> list[Turn]:
    """The turns of a whole dialogue, its answer the last; text as in `prompt_turns`."""
    return _turns_of_text(value, fields, where) if isinstance(value, str) else messages(value, fields, where)


def answer(value: Any, name: str, fields: RankedFields, where: str, *, hh: bool = False) -> tuple[list[Turn], str]:
    """A response, and the turns that its field holds before it.

    Args:
        value: text, a message, or messages of which the last is the response; text may hold messages, too.
        name: its field.
        fields: the entry's own keys.
        where: names the row in errors.
        hh: whether the prompt is text of hh-rlhf: the white space around a response is then markup.

    Raises:
        RowError: where the last turn is not the assistant's, or text holds turns which this entry does not read.
    """
    if isinstance(value, str):
        found = _turns_of_answer(value, name, fields, where, hh=hh)
        if isinstance(found, str):
            return [], found
        turns = found
    elif isinstance(value, Sequence) and value:
        turns = messages(value, fields, f"{where}: {name}")
    else:
        turns = [turn_of(value, fields, f"{where}: {name}")]
    if turns[-1].role != "assistant":
        raise RowError(f"{where}: {name!r} is a {turns[-1].role} turn; a response is the assistant's")
    return turns[:-1], turns[-1].content


def messages(value: Any, fields: RankedFields, where: str) -> list[Turn]:
    """Messages as turns."""
    if not is_list(value):
        raise RowError(f"{where}: expected messages or text, found {shown(value)}")
    return [turn_of(message, fields, where) for message in value]


def turn_of(message: Any, fields: RankedFields, where: str) -> Turn:
    """One message as a turn.

    Raises:
        RowError: for a message that has no text or an unknown role, or has more than text: calls, reasoning in a field
            that is not named.
    """
    names = _names(fields)
    found = {key: message.get(name) if isinstance(message, Mapping) else None for key, name in names.items()}
    _refuse_more_than_text(message, fields, where)
    if isinstance(message, Mapping) and set(names.values()) <= message.keys():
        for key, value in found.items():
            if not isinstance(value, str):
                raise RowError(
                    f"{where}: a message whose {names[key]!r} is {shown(value)}, not text: {shown(message)}. Write it "
                    "as one text, or remove the row"
                )
    if not all(isinstance(value, str) for value in found.values()):
        raise RowError(
            f"{where}: a message without text under {names['role']!r} and {names['content']!r}: {shown(message)}. Set "
            "`message_property_mappings:` to the names in your data"
        )
    for role, aliases in (fields.roles or _DEFAULT_ROLES).items():
        if found["role"] in aliases:
            return Turn(role, _with_reasoning(message, str(found["content"]), fields, where))
    raise RowError(f"{where}: a message of the unknown role {found['role']!r}; set `roles:` for the data set")


def _refuse_more_than_text(message: Any, fields: RankedFields, where: str) -> None:
    for key in (*CALLS, *REASONING):
        if key == fields.field_thinking or not isinstance(message, Mapping) or not message.get(key):
            continue
        remedy = "Write it into `content` as the policy's template writes calls, or remove the row"
        if key in REASONING:
            remedy = f"Set `field_thinking: {key}` for the data set, or remove the field"
        raise RowError(f"{where}: a message has {key!r} ({shown(message[key])}), which is not read here. {remedy}")


def _with_reasoning(message: Mapping[str, Any], text: str, fields: RankedFields, where: str) -> str:
    reasoning = message.get(fields.field_thinking)
    if not reasoning:
        return text
    if not isinstance(reasoning, str):
        raise RowError(
            f"{where}: a message whose {fields.field_thinking!r} is {shown(reasoning)}, not text. Write it as one text"
        )
    return Reasoned(text, reasoning)


def _names(fields: RankedFields) -> dict[str, str]:
    return {key: fields.message_property_mappings.get(key, key) for key in ("role", "content")}


def _turns_of_text(text: str, fields: RankedFields, where: str) -> list[Turn]:
    form = fields.text_format
    if form == "plain":
        return [Turn("user", text)]
    if form == "hh" or is_hh(text):
        return parse_hh_dialogue(text if text.startswith("\n") else text.lstrip(), where)
    if (found := _json_messages(text, fields)) is not None:
        return messages(found, fields, where)
    if has_marks(text):
        raise RowError(
            f"{where}: a text with '\\n\\nHuman:' or '\\n\\nAssistant:' in it that does not begin with such a mark: "
            f"{shown(text)}. Set `text_format: plain` if it is one user turn, or let it begin with '\\n\\nHuman:'"
        )
    _refuse_markup(text, f"{where}: a prompt that")
    return [Turn("user", text)]


def _refuse_markup(text: str, what: str) -> None:
    if markup := _TEMPLATE_MARKUP.match(text):
        raise RowError(
            f"{what} begins with {markup[1]!r}, a chat template's markup, which the policy's template would write "
            "around it once more. Take the markup off (give messages, or the bare text), or set `text_format: plain`"
        )


def _turns_of_answer(text: str, name: str, fields: RankedFields, where: str, *, hh: bool) -> str | list[Turn]:
    form = fields.text_format
    if form == "plain":
        return text
    if is_hh(text):
        return parse_hh_dialogue(text if text.startswith("\n") else text.lstrip(), where)
    if (found := _json_messages(text, fields)) is not None:
        if form != "json":
            remedy = "Set `text_format: json` to read it as messages, or `text_format: plain` if it is the response"
            raise RowError(
                f"{where}: {name!r} is text that holds messages in JSON. {remedy if form is None else 'Remove the row'}"
            )
        return messages(found, fields, f"{where}: {name}")
    _refuse_markup(text, f"{where}: {name!r}")
    hh = hh or form == "hh"
    if hh and has_marks(text):
        raise RowError(
            f"{where}: {name!r} goes on with another turn ('\\n\\nHuman:' or '\\n\\nAssistant:' in it). Cut it there, "
            "or remove the row"
        )
    return text.strip() if hh else text


def _json_messages(text: str, fields: RankedFields) -> list[Any] | None:
    """The messages that a text holds as JSON, if it does: a list of objects with a role and a content."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = [found] if isinstance(found, dict) else found
    names = set(_names(fields).values())
    return found if found and all(isinstance(item, dict) and names <= item.keys() for item in found) else None


def _joined_pieces(value: Any, where: str) -> Any:
    """OpenAssistant's markup, in one text or (PRO) in pieces, as text of hh-rlhf; anything else as it is."""
    nested = is_list(value) and bool(value) and all(is_list(part) for part in value)
    parts = value if nested else [value if is_list(value) else [value]]
    if not all(isinstance(piece, str) for part in parts for piece in part):
        return value
    texts = list(dict.fromkeys("".join(part) for part in parts))
    if not texts or not all(_OPEN_ASSISTANT.match(text) for text in texts):
        return value
    if len(texts) > 1:
        raise RowError(f"{where}: the prompts of its responses differ, so that there is no common one. Remove the row")
    return _OPEN_ASSISTANT.sub(lambda mark: "\n\nHuman: " if mark[1] == "prompter" else "\n\nAssistant: ", texts[0])
