"""A row as every model sees it: a conversation, which of its turns count, and a key made of that content alone."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KEY_LENGTH = 32
"""Hex digits of a row key: 128 bits, no collision to be expected below 10^18 rows."""


class RowError(ValueError):
    """A row that cannot be used, with what is wrong and the remedy. Picklable, for errors out of worker processes."""


def raise_row_errors(errors: Sequence[str], total: int) -> None:
    """Raises the first of several rows' errors, with their number.

    Raises:
        RowError: if there are any.
    """
    if errors:
        raise RowError(f"{errors[0]} ({len(errors)} of {total} rows cannot be used)")


@dataclass(frozen=True)
class Turn:
    """One message.

    Args:
        role: `system`, `user`, `assistant` or another role that a chat template knows.
        content: the text, exactly as in the data.
        counted: whether its tokens are part of the response (whole assistant turns only).
        ends: of a counted turn, how many tokens that end it the policy is trained on (1 where its template has one
            and the labels hold it).
    """

    role: str
    content: str
    counted: bool = False
    ends: int = 0


Conversation = tuple[Turn, ...]


def row_key(conversation: Sequence[Turn]) -> str:
    """Content hash of what is scored: roles, texts, which turns count, and where their ends do. Never a position.

    Args:
        conversation: the turns in order.

    Returns:
        32 hex digits of SHA-256 over the JSON form of the turns.

    Examples:
        >>> a = row_key([Turn("user", "hi"), Turn("assistant", "ho", counted=True)])
        >>> a == row_key([Turn("user", "hi"), Turn("assistant", "ho", counted=True)])
        True
        >>> a == row_key([Turn("user", "hi"), Turn("assistant", "ho ", counted=True)])
        False
    """
    return hashlib.sha256(dump_conversation(conversation).encode()).hexdigest()[:KEY_LENGTH]


def dump_conversation(conversation: Iterable[Turn]) -> str:
    """The JSON text `[[role, content, counted], ...]` that rows travel in; `ends` follows where it is not 0.

    Examples:
        >>> dump_conversation([Turn("user", "hi"), Turn("assistant", "ho", counted=True, ends=1)])
        '[["user","hi",false],["assistant","ho",true,1]]'
    """
    turns = [[t.role, t.content, t.counted, *([t.ends] if t.ends else [])] for t in conversation]
    return json.dumps(turns, ensure_ascii=False, separators=(",", ":"))


def load_conversation(text: str) -> Conversation:
    """The inverse of `dump_conversation`."""
    return tuple(Turn(*turn) for turn in json.loads(text))


def checked_conversation(turns: Iterable[Turn], where: str, *, field: str = "content") -> Conversation:
    """Refuses a conversation without a response.

    Args:
        turns: the turns of a row.
        where: names the row in errors, such as `data.jsonl row 3`.
        field: where the response's text is, for errors.

    Raises:
        RowError: if no turn counts, or a turn that counts is not an assistant's or is blank.
    """
    conversation = tuple(turns)
    counted = [turn for turn in conversation if turn.counted]
    if not counted:
        raise RowError(
            f"{where}: a row without a response: no assistant turn is trained on. Remove the row, or check "
            "`roles_to_train`, `message_field_training` and the field names of the dataset entry"
        )
    for turn in counted:
        if turn.role != "assistant":
            raise RowError(
                f"{where}: a turn of role {turn.role!r} is trained on; only whole assistant turns can be "
                "scored by a reference. Check `roles_to_train` and `message_field_training`"
            )
        if not turn.content.strip():
            raise RowError(
                f"{where}: a row without a response: an assistant turn that is trained on has no text under {field!r}. "
                "Remove the row or fill in the answer"
            )
    return conversation
