"""The keys of a dataset entry that say where prompt, responses, order and scores are; spelt like the host's."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from poft_plugin.config import Block
from poft_plugin.data.rows import RowError

HH_RLHF = "poft_plugin.hh_rlhf"
RANKED = "poft_plugin.ranked"
PAIRS = ("chat_template", "chat_template.default")
DIALOGUES = "chat_template.argilla_chat"
RANKED_TYPES = (*PAIRS, DIALOGUES, HH_RLHF, RANKED)

Row = Mapping[str, Any]

_EVERYWHERE = frozenset({"field_system", "field_input", "field_scores", "message_property_mappings", "roles",
                         "field_thinking", "on_unusable_row", "text_format"})  # fmt: skip
_PROMPT, _PAIR = {"field_messages", "field_prompt"}, {"field_chosen", "field_rejected"}
_LIST = {"field_responses", "field_response_text", "field_response_score", "field_response_rank", "field_ranks",
         "field_winner", "winner_values"}  # fmt: skip
READ_BY = {
    **dict.fromkeys(PAIRS, _EVERYWHERE | _PROMPT | _PAIR),
    DIALOGUES: _EVERYWHERE | _PAIR,
    HH_RLHF: (_EVERYWHERE | _PROMPT | _PAIR) - {"text_format", "message_property_mappings", "roles", "field_thinking"},
    RANKED: _EVERYWHERE | _PROMPT | _LIST,
}
"""The keys that each type reads."""

SHOWN = 200
"""Characters of a value in a message: rows may be long."""


class RankedFields(Block):
    """The keys of a dataset entry that say where prompt, responses and scores are."""

    field_messages: str = Field("messages", description="Turns of the prompt (or its text).")
    field_prompt: str = Field("prompt", description="Text of the prompt, where there are no messages.")
    field_system: str | None = Field(None, description="Column of a system text; it becomes the prompt's first turn.")
    field_input: str | None = Field(
        None, description="Column of a text that goes behind the prompt's last turn, a blank line between."
    )
    field_chosen: str = Field("chosen", description="The better response: text, a message, or (dialogues) all turns.")
    field_rejected: str = Field("rejected", description="The worse response.")
    field_responses: str | tuple[str, ...] = Field(
        "responses", description="`poft_plugin.ranked`: the list of responses, or the columns that hold one each."
    )
    field_response_text: str | None = Field(None, description="Field of a response's text, where it is an object.")
    field_response_score: str | None = Field(None, description="Field of a response's score, where it is an object.")
    field_response_rank: str | None = Field(
        None, description="Field of a response's rank, where it is an object; the lowest is the best."
    )
    field_ranks: str | None = Field(None, description="Column of a rank for each response; the lowest is the best.")
    field_winner: str | None = Field(None, description="Column that says which of the responses is the best.")
    winner_values: tuple[str | int, ...] | None = Field(
        None, description="What it says for each response; null: 0, 1, ..., or the names in `field_responses`."
    )
    field_scores: str | tuple[str, ...] = Field(
        "scores", description="A list with a score for each response (a pair: the chosen one's first), or its columns."
    )
    text_format: Literal["plain", "hh", "json"] | None = Field(
        None,
        description="plain: texts as they are; hh: dialogues of HH-RLHF; json: answers, too; null: as texts begin.",
    )
    message_property_mappings: Mapping[str, str] = Field(
        default_factory=dict, description="The host's: names of `role` and `content` in a message."
    )
    roles: Mapping[str, Sequence[str]] | None = Field(None, description="The host's: names of roles in the data.")
    field_thinking: str = Field(
        "reasoning_content", description="The host's: field of a message's reasoning, beside its text."
    )
    on_unusable_row: Literal["error", "drop"] | None = Field(
        None,
        description="A row that cannot be read, or that a chat template refuses: error (the default), or drop "
        "(hh_rlhf's default).",
    )

    def drops(self, kind: str) -> bool:
        """Whether rows that cannot be used are left out, with a line that counts them."""
        return (self.on_unusable_row or ("drop" if kind == HH_RLHF else "error")) == "drop"

    def check(self, kind: str, where: str) -> None:
        """Refuses keys that the type does not read, and ones that do not go together.

        Raises:
            ValueError: naming the key and the remedy.
        """
        for key in sorted(self.model_fields_set - READ_BY[kind]):
            types = [name for name, keys in READ_BY.items() if key in keys]
            raise ValueError(f"{where}.{key}: not read by `type: {kind}`, but by {', '.join(types)}; remove it")
        if self.winner_values is not None and self.field_winner is None:
            raise ValueError(f"{where}.winner_values: there, but no `field_winner:` that has these values; add it")
        orders = [key for key in ("field_response_rank", "field_ranks", "field_winner") if getattr(self, key)]
        if len(orders) > 1:
            raise ValueError(f"{where}.{orders[0]}: `{orders[1]}` says the order, too; remove one of them")
        for key in ("winner_values", "field_scores"):
            values, names = getattr(self, key), self.field_responses if kind == RANKED else _PAIR
            if isinstance(values, tuple) and not isinstance(names, str) and len(values) != len(names):
                raise ValueError(f"{where}.{key}: {len(values)} for {len(names)} responses; give one for each")

    def columns(self) -> set[str]:
        """Names of all columns that may be read."""
        values = [self.field_messages, self.field_prompt, self.field_system, self.field_input, self.field_chosen]
        values += [self.field_rejected, self.field_ranks, self.field_winner]
        for names in (self.field_responses, self.field_scores):
            values += [names] if isinstance(names, str) else names
        return {value for value in values if value is not None}


def shown(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def field_of(row: Row, name: str, where: str) -> Any:
    """A field's value.

    Raises:
        RowError: where there is none.
    """
    if row.get(name) is None:
        raise RowError(f"{where}: no {name!r}; the row has {sorted(row)}. Check the field names of the dataset entry")
    return row[name]


def is_list(value: Any) -> bool:
    """Whether a value is a list, which a text is not."""
    return isinstance(value, Sequence) and not isinstance(value, str)
