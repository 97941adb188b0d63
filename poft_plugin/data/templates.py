"""A chat template at work, bounded: whatever goes wrong in it is one kind of error, and it ends.

Jinja's sandbox bounds a single `range` and nothing else: loops inside loops, recursion and long texts are not.
"""

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
"""CPU time of one rendering. A long conversation takes some milliseconds."""

CHARACTERS = 1_000_000
"""What a template may write of its own, besides this many times the characters of the conversation."""
REPEATS = 20

FAILURES = (
    TemplateError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
)
"""What expressions of a template raise. A RecursionError is a RuntimeError."""


class TemplateFailedError(ValueError):
    """A template cannot render a conversation."""


class EndlessTemplateError(ValueError):
    """A template does not come to an end: no row can be rendered with it."""


def render_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **settings: Any) -> str:
    """The text that a chat template makes of a conversation.

    Args:
        tokenizer: whose `apply_chat_template` is called.
        messages: the conversation.
        settings: further arguments of it, such as `chat_template`.

    Raises:
        TemplateFailedError: if the template fails, whatever the reason.
        EndlessTemplateError: if it takes more than `SECONDS`, or writes far more than the conversation.
    """
    try:
        with _bounded(SECONDS):
            text = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, **settings)
    except _OutOfTimeError as error:
        raise EndlessTemplateError(f"it does not end: one conversation takes more than {SECONDS:g} seconds") from error
    except FAILURES as error:
        raise TemplateFailedError(_reason(error)) from error
    assert isinstance(text, str)
    bound = CHARACTERS + REPEATS * sum(len(str(message)) for message in messages)
    if len(text) > bound:
        raise EndlessTemplateError(f"it writes {len(text):,} characters (allowed here: {bound:,})")
    return text


class _OutOfTimeError(BaseException):
    """Not an `Exception`: Jinja swallows those while it folds constants, and would compute the same again."""


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Ends what takes longer, in CPU time. Signals reach the main thread alone: in another one there is no bound."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself without an end"
    if isinstance(error, MemoryError):
        return "it writes more than fits into memory"
    return str(error) or type(error).__name__
