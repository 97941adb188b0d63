"""What reading a row gives, and how the host's errors are said."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jinja2 import TemplateError

from poft_plugin.data.rows import Conversation
from poft_plugin.data.templates import FAILURES

Row = Mapping[str, Any]

HOST_ERRORS = (*FAILURES, AssertionError)
"""What a chat template, or the host's strategy around it, raises while a row is tokenized."""


class Read(NamedTuple):
    """A row as it was read.

    Args:
        row: what the host's strategy is to tokenize: the raw row, without what stands for nothing.
        conversation: what references get to see.
    """

    row: Row
    conversation: Conversation


Reader = Callable[[Row, str], Read]


def described(error: BaseException) -> str:
    """An error of the host or of a template in one line.

    Examples:
        >>> described(KeyError("role"))
        "KeyError: 'role'"
    """
    text = " ".join(str(error).split()) or "no reason given"
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"


def printable(text: str) -> str:
    r"""A text that can be stored: half of a surrogate pair, which JSON can spell, cannot.

    Examples:
        >>> printable("a\ud800")
        'a\\ud800'
    """
    return text.encode("utf-8", "backslashreplace").decode()
