"""Rows of an instruction and its answer: the texts that the host trains on, or the field that is no text."""

import math
from dataclasses import dataclass, field
from typing import Any

from poft_plugin.data.rows import RowError, Turn, checked_conversation
from poft_plugin.hosts.axolotl.ranked_fields import shown
from poft_plugin.hosts.axolotl.reading import HOST_ERRORS, Read, Row, described

PARTS = ("instruction", "input", "response", "system text")


class _Name(str):
    """Stands for a field's value while a strategy says which fields it reads; a list's only item is itself."""

    def __iter__(self) -> Any:
        yield str(self)


@dataclass(frozen=True)
class FieldReader:
    """Reads rows with a strategy of the host that has `parse_instruction_fields`.

    Args:
        strategy: the host's.
    """

    strategy: Any
    _names: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)

    def __call__(self, row: Row, where: str) -> Read:
        """The row, and the conversation in it.

        Raises:
            RowError: for a field that is missing, or no text where the host would not make text of it.
        """
        row = dict(row)
        names = self._fields(row, where)
        try:
            parts = dict(zip(PARTS, self.strategy.parse_instruction_fields(row), strict=False))
        except HOST_ERRORS as error:
            odd = {name: row[name] for name in names.values() if not isinstance(row[name], str)}
            raise RowError(
                f"{where}: Axolotl cannot make text of {shown(odd or row)} ({described(error)}). Write it as text, or "
                "remove the row"
            ) from error
        named = {part: names.get(part, part) for part in PARTS}
        turns = []
        if system := _optional(parts.get("system text"), named["system text"], where):
            turns.append(Turn("system", system))
        instruction = _formatted(parts["instruction"], named["instruction"], where)
        given = _optional(parts["input"], named["input"], where)
        turns.append(Turn("user", "\n\n".join(filter(None, [instruction, given]))))
        turns.append(Turn("assistant", self._response(parts["response"], names, row, where), counted=True))
        return Read(row, checked_conversation(turns, where, field=names.get("response", "output")))

    def _response(self, value: Any, names: dict[str, str], row: Row, where: str) -> str:
        if "response" not in names:
            raise RowError(
                f"{where}: a row without a response: no field for it. The row has {sorted(row)}; set `field_output`"
            )
        if value is not None and not isinstance(value, str):
            raise RowError(
                f"{where}: the response under {names['response']!r} is {shown(value)}, not text. Write it as text, or "
                "remove the row"
            )
        return value or ""

    def _fields(self, row: Row, where: str) -> dict[str, str]:
        """Which field each part is read from, for the fields that the row has."""
        keys = tuple(row)
        if keys not in self._names:
            marks = {key: _Name(f"\0{key}\0") for key in keys}
            try:
                parts = zip(PARTS, self.strategy.parse_instruction_fields(marks), strict=False)
            except KeyError as error:
                raise RowError(f"{where}: no field {error} in the row; it has {sorted(row)}") from None
            found = {part: next((key for key in keys if f"\0{key}\0" in str(text)), None) for part, text in parts}
            self._names[keys] = {part: key for part, key in found.items() if key is not None}
        return self._names[keys]


def _formatted(value: Any, name: str, where: str) -> str:
    """What the host's formats make of a value: text, or a number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not isinstance(value, str) and not number:
        raise RowError(f"{where}: {name!r} is {shown(value)}, not text. Write it as text, or remove the row")
    return str(value)


def _optional(value: Any, name: str, where: str) -> str:
    """The same of a part that may be empty. The host takes 0 for empty, which the data does not say."""
    if value is None or value == [] or value == {}:
        return ""
    if not isinstance(value, str) and not value:
        raise RowError(
            f"{where}: {name!r} is {shown(value)}, which Axolotl takes for an empty field. Write it as text, or make "
            "it empty"
        )
    return _formatted(value, name, where)
