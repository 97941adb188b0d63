"""Rows of a prompt and a completion, each a text or a list of messages, of which the completion is trained on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from poft_plugin.config import Block
from poft_plugin.data.rows import RowError
from poft_plugin.hosts.axolotl.chat_rows import ChatReader
from poft_plugin.hosts.axolotl.ranked_fields import shown
from poft_plugin.hosts.axolotl.reading import Read, Row

PROMPT_COMPLETION = "poft_plugin.prompt_completion"
TRAINED = "training"

HOST_SETTINGS = {
    "type": "chat_template", "field_messages": "messages", "message_field_training": TRAINED, "roles_to_train": [],
}  # fmt: skip
"""How the host's own chat strategy sees such rows once they are messages."""


class PromptCompletionFields(Block):
    """The keys of a dataset entry that say where prompt and completion are."""

    field_prompt: str = Field("prompt", description="The prompt: text (a user turn), or messages.")
    field_completion: str = Field("completion", description="The response: text, or messages of the assistant.")


@dataclass(frozen=True)
class PromptCompletionReader:
    """Makes messages of a row and reads those.

    Args:
        chat: reads messages.
        fields: the entry's own keys.
    """

    chat: ChatReader
    fields: PromptCompletionFields

    def __call__(self, row: Row, where: str) -> Read:
        """The messages that the host is to tokenize, and the conversation in them.

        Raises:
            RowError: for a prompt or completion that is missing, or neither text nor messages.
        """
        messages = [
            *self._messages(row, self.fields.field_prompt, "user", where),
            *self._messages(row, self.fields.field_completion, "assistant", where),
        ]
        prompter = self.chat.strategy.prompter
        given = {name: row[name] for name in (prompter.field_system, prompter.field_tools) if name in row}
        return self.chat({prompter.field_messages: messages, **given}, where)

    def _messages(self, row: Row, name: str, role: str, where: str) -> list[Any]:
        value = row.get(name)
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            value = _as_messages(value)
        if not value:
            raise RowError(
                f"{where}: no {name!r}; the row has {sorted(row)}. Set `field_prompt:` and `field_completion:` to the "
                "names in your data, or remove the row"
            )
        names = self.chat.strategy.prompter.message_property_mappings
        if isinstance(value, str):
            value = [{names.get("role", "role"): role, names.get("content", "content"): value}]
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, list):
            raise RowError(f"{where}: {name!r} is {shown(value)}, neither text nor a list of messages")
        if role == "user":
            return [{**turn, TRAINED: False} if isinstance(turn, Mapping) else turn for turn in value]
        return [self._trained(turn, f"{name}[{number}]", where) for number, turn in enumerate(value)]

    def _trained(self, turn: Any, place: str, where: str) -> Any:
        if not isinstance(turn, Mapping):
            return turn
        prompter = self.chat.strategy.prompter
        role = turn.get(prompter.message_property_mappings.get("role", "role"))
        if isinstance(role, str) and prompter.roles.get(role, role) != "assistant":
            raise RowError(
                f"{where}: {place} is a turn of {role!r}; a completion is the assistant's alone. Move the turns before "
                "it into the prompt, or use `type: chat_template`"
            )
        return {**turn, TRAINED: True}


def _as_messages(text: str) -> Any:
    """The messages that are stored as text; a text that is no JSON is a text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
