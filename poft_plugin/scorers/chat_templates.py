"""Chat templates of what scores: the tokenizer's own, a file, Jinja text, or a name that the host knows."""

from pathlib import Path
from typing import Any

NAMED: dict[str, str] = {}
"""Jinja texts by the names that the host has for them; it fills them in when it takes a run over."""

OWN = "tokenizer_default"
FALLBACK = "tokenizer_default_fallback_"

LONGEST_PATH = 4096


def resolve_template(given: str | None, own: str | None, title: str) -> str | None:
    """The Jinja text that `chat_template:` stands for.

    Args:
        given: as in the config.
        own: the tokenizer's.
        title: the model in errors.

    Returns:
        None where the tokenizer's own is asked for and it has none.

    Raises:
        ValueError: for what is neither a name, a file nor Jinja text.

    Examples:
        >>> NAMED["toy"] = "{{ messages[0].content }}"
        >>> resolve_template("tokenizer_default_fallback_toy", None, "reference 'ref'")
        '{{ messages[0].content }}'
        >>> resolve_template("tokenizer_default", "{{ own }}", "reference 'ref'")
        '{{ own }}'
        >>> del NAMED["toy"]
    """
    if given is None or given == OWN:
        return own
    if given in NAMED:
        return NAMED[given]
    if given.startswith(FALLBACK) and given.removeprefix(FALLBACK) in NAMED:
        return own or NAMED[given.removeprefix(FALLBACK)]
    if len(given) >= LONGEST_PATH or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise ValueError(f"{title}: chat_template {given!r}: the file cannot be read: {error}") from error
    names = ", ".join([OWN, f"{FALLBACK}NAME", *sorted(NAMED)])
    raise ValueError(
        f"{title}: chat_template {given!r}: no such file, not Jinja text, and no template's name. Names: {names}"
    )


def own_template(tokenizer: Any) -> str | None:
    """A tokenizer's template, the default one of several."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return str(template) if template else None
