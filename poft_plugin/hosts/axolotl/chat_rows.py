"""Rows of chat messages: checked before the host reads them, so that what is wrong is said of a row and a field."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from axolotl.prompt_strategies.chat_template import ChatTemplateStrategy
from axolotl.utils.dict import remove_none_values

from poft_plugin.data.rows import RowError, Turn, checked_conversation
from poft_plugin.hosts.axolotl.ranked_fields import shown
from poft_plugin.hosts.axolotl.reading import HOST_ERRORS, Read, Row, described
from poft_plugin.hosts.axolotl.reasoning import REASONING, written_turn

NOTHING: tuple[Any, ...] = (None, "", [], {})
"""What an empty list of tools is stored as, also as JSON text (which may be `null`)."""

ROLE_NAMES = ("role", "from", "speaker", "author")
TEXT_NAMES = ("content", "value", "text", "message")
CALLS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class ChatReader:
    """Reads rows with the host's own chat strategy.

    Args:
        strategy: the host's.
    """

    strategy: ChatTemplateStrategy

    def __call__(self, row: Row, where: str) -> Read:
        """The row that the host is to tokenize, and the conversation in it.

        Raises:
            RowError: for anything in the row that cannot be read, or that references cannot be given as text.
        """
        prompt = self._without_tools(remove_none_values(dict(row)), where)
        messages = self._messages(prompt, where)
        prompt[self.strategy.prompter.field_messages] = messages
        for number, message in enumerate(messages):
            self._check(message, f"{self.strategy.prompter.field_messages}[{number}]", where)
        messages = self._without_blank_systems(prompt, messages)
        prompt[self.strategy.prompter.field_messages] = messages
        try:
            turns = self.strategy.get_conversation_thread(prompt)
        except HOST_ERRORS as error:
            raise RowError(
                f"{where}: Axolotl cannot read the messages under {self.strategy.prompter.field_messages!r} "
                f"({described(error)}): {shown(messages)}. Mend or remove the row"
            ) from error
        skipped = len(turns) - len(messages)  # 1: a system text from its own column; -1: the system turn was dropped
        for number, message in enumerate(messages):
            if number + skipped >= 0:
                self._check_unread(message, turns[number + skipped], number, where)
        field = self.strategy.prompter.message_property_mappings.get("content", "content")
        return Read(prompt, checked_conversation(self._turns(turns, where), where, field=field))

    def _without_tools(self, prompt: dict[str, Any], where: str) -> dict[str, Any]:
        """The row without an empty list of tools, however it is stored.

        Raises:
            RowError: for tools.
        """
        name = self.strategy.prompter.field_tools
        tools = prompt.pop(name, None)
        stored = tools.strip() if isinstance(tools, str) else tools
        if isinstance(stored, str) and stored:
            try:
                stored = json.loads(stored)
            except (ValueError, RecursionError) as error:
                raise RowError(
                    f"{where}: the tools under {name!r} are text that is no JSON ({error}): {shown(tools)}. Store a "
                    "list, or remove the field"
                ) from error
        if stored not in NOTHING:
            raise RowError(
                f"{where}: it has tools, which references of other kinds cannot be given ({name}: {shown(tools)}); "
                "remove such rows"
            )
        return prompt

    def _without_blank_systems(self, prompt: dict[str, Any], messages: list[Any]) -> list[Any]:
        """A blank system text is no system turn, for the policy as for references: its column and messages go."""
        prompter = self.strategy.prompter
        system = prompt.get(prompter.field_system)
        if isinstance(system, str) and not system.strip():
            del prompt[prompter.field_system]
        names = prompter.message_property_mappings
        role, text = names.get("role", "role"), names.get("content", "content")
        return [
            message
            for message in messages
            if prompter.roles.get(message[role], message[role]) != "system"
            or not isinstance(message[text], str)
            or message[text].strip()
        ]

    def _messages(self, prompt: Row, where: str) -> list[Any]:
        field = self.strategy.prompter.field_messages
        messages = prompt.get(field)
        if isinstance(messages, str) and messages.strip():
            try:
                messages = json.loads(messages)
            except (ValueError, RecursionError) as error:
                raise RowError(
                    f"{where}: the messages under {field!r} are text that is no JSON ({error}): {shown(prompt[field])}"
                    ". Give a list of messages, or its JSON text"
                ) from error
        if not messages:
            hint = "set `field_messages`"
            if {"prompt", "completion"} <= set(prompt):
                hint = "rows of a prompt and a completion are `type: poft_plugin.prompt_completion`"
            raise RowError(
                f"{where}: a row without a response: no messages under {field!r}. The row has {sorted(prompt)}; {hint}"
            )
        if not isinstance(messages, list):
            raise RowError(f"{where}: {field!r} is {shown(messages)}, not a list of messages. Check `field_messages`")
        return messages

    def _check(self, message: Any, place: str, where: str) -> None:
        """Refuses a message without a role and a text."""
        if not isinstance(message, Mapping):
            raise RowError(
                f"{where}: {place} is {shown(message)}, not a message: a mapping of a role and a text. Check "
                "`field_messages`, or store `{role: .., content: ..}`"
            )
        names = self.strategy.prompter.message_property_mappings
        role, text = names.get("role", "role"), names.get("content", "content")
        if calls := [name for name in CALLS if message.get(name)]:
            raise RowError(
                f"{where}: a turn has {', '.join(calls)}, which references cannot be given as text ({place}: "
                f"{shown(message[calls[0]])}). Remove such rows"
            )
        if not isinstance(message.get(role), str):
            raise _no_text(message, role, place, where)
        content = message.get(text)
        if isinstance(content, list):
            for number, part in enumerate(content):
                _check_part(part, f"{place}.{text}[{number}]", where)
        elif not isinstance(content, str):
            raise _no_text(message, text, place, where)
        trained = self.strategy.prompter.message_field_training
        if trained and message.get(trained) not in (None, True, False):
            raise RowError(f"{where}: {place}.{trained} is {shown(message[trained])}; give true or false")

    def _check_unread(self, message: Row, turn: Row, number: int, where: str) -> None:
        """Refuses reasoning that the host leaves out without a word."""
        read = {*self.strategy.prompter.message_property_mappings.values(), *turn}
        for name in REASONING:
            if message.get(name) and name not in read:
                raise RowError(
                    f"{where}: {self.strategy.prompter.field_messages}[{number}].{name} is not read: "
                    f"{shown(message[name])}. Set `field_thinking: {name}` for the data set, or remove the "
                    "field"
                )

    def _turns(self, turns: Sequence[Row], where: str) -> list[Turn]:
        strategy = self.strategy
        last_only = not (strategy.roles_to_train or strategy.train_on_eos or strategy.train_on_eot)
        last_only &= not strategy.prompter.message_field_training
        flags = [
            index == len(turns) - 1 if last_only else turn.get("training", turn.get("role") in strategy.roles_to_train)
            for index, turn in enumerate(turns)
        ]
        return [self._turn(turns, index, bool(flag), where) for index, flag in enumerate(flags)]

    def _turn(self, turns: Sequence[Row], index: int, counted: bool, where: str) -> Turn:
        turn = turns[index]
        thinking = {*REASONING, self.strategy.prompter.template_thinking_key}
        if not isinstance(turn.get("content"), str):
            raise _no_text(turn, "content", self.strategy.prompter.field_system, where)
        extra = sorted(key for key in turn if key not in ("role", "content", "training", *thinking) and turn[key])
        if extra:
            raise RowError(f"{where}: a turn has {', '.join(extra)}, which references cannot be given as text")
        if any(turn.get(key) for key in thinking):
            return Turn(turn["role"], written_turn(self.strategy, turns, index, counted, where), counted)
        return Turn(turn["role"], turn["content"], counted)


def _no_text(message: Row, name: str, place: str, where: str) -> RowError:
    """A message whose role or text is not there, or no text."""
    found = "" if message.get(name) is None else f", but {shown(message[name])}"
    role = next((key for key in ROLE_NAMES if isinstance(message.get(key), str)), None)
    text = next((key for key in TEXT_NAMES if key != role and isinstance(message.get(key), str)), None)
    hint = "Write it as text, or remove the row"
    if not found:
        hint = "Set `message_property_mappings` to the names in your data, or remove the row"
        if role and text and name not in (role, text):
            hint = f"Set `message_property_mappings: {{role: {role}, content: {text}}}`"
    return RowError(f"{where}: a turn without text under {name!r}{found} ({place}: {shown(dict(message))}). {hint}")


def _check_part(part: Any, place: str, where: str) -> None:
    """The host takes what is no text in a list of parts for an empty text."""
    texts = [part.get(key) for key in ("text", "content", "value")] if isinstance(part, Mapping) else []
    text = next((text for text in texts if text), "" if "" in texts else None)
    if not isinstance(text, str):
        raise RowError(
            f"{where}: {place} is {shown(part)}, no part with a text, and references score text alone. Remove such "
            "rows, or store the content as one text"
        )
