"""From a raw preference row to a prompt and its responses, best first.

Each dataset `type` that works has one reader. The keys of an entry that name fields are the host's where the host has
such a key, and spelt like them where it has none.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from poft_plugin.config import Block
from poft_plugin.data.ranked import RankedSample, pair, ranked_list
from poft_plugin.data.rows import RowError, Turn

HH_RLHF = "poft_plugin.hh_rlhf"
RANKED = "poft_plugin.ranked"
PAIRS = ("chat_template", "chat_template.default")
DIALOGUES = "chat_template.argilla_chat"
RANKED_TYPES = (*PAIRS, DIALOGUES, HH_RLHF, RANKED)

Row = Mapping[str, Any]
RankedReader = Callable[[Row, str], RankedSample]

_MARK = re.compile(r"\n\n(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}
_DEFAULT_ROLES = {"user": ["user", "human"], "assistant": ["assistant", "gpt"], "system": ["system"], "tool": ["tool"]}


class RankedFields(Block):
    """The keys of a dataset entry that say where prompt, responses and scores are."""

    field_messages: str = Field("messages", description="Turns of the prompt (or its text).")
    field_prompt: str = Field("prompt", description="Text of the prompt, where there are no messages.")
    field_chosen: str = Field("chosen", description="The better response: text, a message, or (dialogues) all turns.")
    field_rejected: str = Field("rejected", description="The worse response.")
    field_responses: str = Field("responses", description="`poft_plugin.ranked`: the list of responses.")
    field_response_text: str | None = Field(None, description="Field of a response's text, where it is an object.")
    field_response_score: str | None = Field(None, description="Field of a response's score, where it is an object.")
    field_scores: str = Field("scores", description="A score for each response (a pair: the chosen one's first).")
    message_property_mappings: Mapping[str, str] = Field(
        default_factory=dict, description="The host's: names of `role` and `content` in a message."
    )
    roles: Mapping[str, Sequence[str]] | None = Field(None, description="The host's: names of roles in the data.")
    on_unusable_row: Literal["error", "drop"] | None = Field(
        None, description="A row without two usable responses: error (the default), or drop (hh_rlhf's default)."
    )

    def drops(self, kind: str) -> bool:
        """Whether rows that cannot be used are left out, with a line that counts them."""
        return (self.on_unusable_row or ("drop" if kind == HH_RLHF else "error")) == "drop"


def ranked_reader(kind: str, fields: RankedFields) -> RankedReader:
    """How rows of a `type` are read.

    Args:
        kind: one of `RANKED_TYPES`.
        fields: the entry's own keys.
    """
    if kind == HH_RLHF:
        return lambda row, where: _from_hh(row, fields, where)
    if kind == RANKED:
        return lambda row, where: _from_list(row, fields, where)
    if kind == DIALOGUES:
        return lambda row, where: _from_dialogues(row, fields, where)
    return lambda row, where: _from_pair(row, fields, where)


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


def _from_hh(row: Row, fields: RankedFields, where: str) -> RankedSample:
    chosen, rejected = (
        parse_hh_dialogue(_text(row, name, where), where) for name in (fields.field_chosen, fields.field_rejected)
    )
    return _from_turns(chosen, rejected, _scores(row, fields), where)


def _from_dialogues(row: Row, fields: RankedFields, where: str) -> RankedSample:
    chosen, rejected = (
        _turns(_field(row, name, where), fields, where) for name in (fields.field_chosen, fields.field_rejected)
    )
    return _from_turns(chosen, rejected, _scores(row, fields), where)


def _from_turns(
    chosen: Sequence[Turn], rejected: Sequence[Turn], scores: Sequence[float] | None, where: str
) -> RankedSample:
    """Two whole dialogues that differ in the last answer alone."""
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[-1].role != "assistant":
            raise RowError(f"{where}: the {name} dialogue does not end with an assistant turn. Remove the row")
    if list(chosen[:-1]) != list(rejected[:-1]):
        raise RowError(
            f"{where}: the two dialogues differ before the last answer, so that there is no common prompt. Remove the "
            "row, or set `on_unusable_row: drop` for the data set"
        )
    return pair(chosen[:-1], chosen[-1].content, rejected[-1].content, scores=scores, where=where)


def _from_pair(row: Row, fields: RankedFields, where: str) -> RankedSample:
    if fields.field_chosen not in row and fields.field_responses in row:
        raise RowError(
            f"{where}: a list of responses; set `type: {RANKED}` for the data set, or give `{fields.field_chosen}`"
        )
    chosen, rejected = (_response(row, name, fields, where) for name in (fields.field_chosen, fields.field_rejected))
    return pair(_prompt(row, fields, where), chosen, rejected, scores=_scores(row, fields), where=where)


def _from_list(row: Row, fields: RankedFields, where: str) -> RankedSample:
    items = _field(row, fields.field_responses, where)
    if isinstance(items, (str, Mapping)) or not isinstance(items, Sequence):
        raise RowError(f"{where}: {fields.field_responses!r} is no list but {items!r}")
    texts, scores = [], []
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            texts.append(item)
            continue
        if fields.field_response_text is None:
            raise RowError(
                f"{where}: response {number} is an object with {sorted(item)}; set `field_response_text:` (and "
                "`field_response_score:`) for the data set"
            )
        texts.append(_field(item, fields.field_response_text, f"{where} response {number}"))
        if fields.field_response_score is not None:
            scores.append(_field(item, fields.field_response_score, f"{where} response {number}"))
    found = scores or _scores(row, fields)
    return ranked_list(_prompt(row, fields, where), texts, scores=found, where=where)


def _prompt(row: Row, fields: RankedFields, where: str) -> list[Turn]:
    if row.get(fields.field_messages) is not None:
        return _turns(row[fields.field_messages], fields, where)
    if row.get(fields.field_prompt) is not None:
        return _turns(row[fields.field_prompt], fields, where)
    raise RowError(
        f"{where}: no prompt under {fields.field_messages!r} or {fields.field_prompt!r}; the row has {sorted(row)}. "
        "Set `field_messages:` or `field_prompt:`"
    )


def _turns(value: Any, fields: RankedFields, where: str) -> list[Turn]:
    """Messages as turns; a text is one user turn."""
    if isinstance(value, str):
        return [Turn("user", value)]
    if not isinstance(value, Sequence):
        raise RowError(f"{where}: expected messages or text, found {value!r}")
    return [_turn(message, fields, where) for message in value]


def _turn(message: Any, fields: RankedFields, where: str) -> Turn:
    names = {key: fields.message_property_mappings.get(key, key) for key in ("role", "content")}
    found = {key: message.get(name) if isinstance(message, Mapping) else None for key, name in names.items()}
    if not all(isinstance(value, str) for value in found.values()):
        raise RowError(
            f"{where}: a message without text under {names['role']!r} and {names['content']!r}: {message!r}. Set "
            "`message_property_mappings:` to the names in your data"
        )
    for role, aliases in (fields.roles or _DEFAULT_ROLES).items():
        if found["role"] in aliases:
            return Turn(role, str(found["content"]))
    raise RowError(f"{where}: a message of the unknown role {found['role']!r}; set `roles:` for the data set")


def _response(row: Row, name: str, fields: RankedFields, where: str) -> str:
    """A response as text, a message, or a list whose last message it is."""
    value = _field(row, name, where)
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value:
        value = value[-1]
    turn = _turn(value, fields, f"{where}: {name}")
    if turn.role != "assistant":
        raise RowError(f"{where}: {name!r} is a {turn.role} turn; a response is the assistant's")
    return turn.content


def _scores(row: Row, fields: RankedFields) -> Sequence[float] | None:
    return row.get(fields.field_scores)


def _text(row: Row, name: str, where: str) -> str:
    value = _field(row, name, where)
    if not isinstance(value, str):
        raise RowError(f"{where}: {name!r} is {value!r}, not text")
    return value


def _field(row: Row, name: str, where: str) -> Any:
    if row.get(name) is None:
        raise RowError(f"{where}: no {name!r}; the row has {sorted(row)}. Check the field names of the dataset entry")
    return row[name]
