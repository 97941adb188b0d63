"""The host's own types of preference rows (`rl: dpo`), as entries that we read.

Each of them reads fixed columns and writes the markup of one chat template. Where that says what to read, the entry is
rewritten; where it does not, it is refused with the lines to write instead.
"""

from collections.abc import Mapping
from typing import Any

from poft_plugin.hosts.axolotl.ranked_fields import DIALOGUES, PAIRS, RANKED

TEMPLATES = ("chatml", "llama3")
"""Types of the host that are named as the chat template whose markup they write."""

_PAIR: dict[str, Any] = {"type": PAIRS[0], "field_system": "system"}
STYLES: dict[str, dict[str, Any]] = {
    "intel": {**_PAIR, "field_prompt": "question"},
    "icr": {**_PAIR, "field_prompt": "input"},
    "prompt_pairs": {**_PAIR, "field_prompt": "prompt"},
    "ultra": {**_PAIR, "field_prompt": "prompt"},
    "argilla": {
        **_PAIR, "field_prompt": "instruction", "field_chosen": "chosen_response",
        "field_rejected": "rejected_response",
    },
    "argilla_chat": {"type": DIALOGUES},
}  # fmt: skip
"""What each style reads, in our keys."""

USER_DEFINED = ("field_prompt", "field_system", "field_chosen", "field_rejected")
FORMATS = {"prompt_format": "{prompt}", "chosen_format": "{chosen}", "rejected_format": "{rejected}"}


def from_host_type(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An entry with one of the host's preference types as one of ours; any other entry as it is.

    Args:
        raw: the entry's keys.
        where: names the entry in errors.

    Raises:
        ValueError: for a host type that does not say what to read, with the lines to write instead.

    Examples:
        >>> from_host_type({"path": "data", "type": "chatml.icr"}, "datasets[0]")["field_prompt"]
        'input'
    """
    kind = raw.get("type")
    if isinstance(kind, Mapping):
        return _from_formats(raw, kind, where)
    template, _, style = str(kind).partition(".")
    if template in TEMPLATES:
        return _from_template(raw, template, style, where)
    if kind == "user_defined.default":
        raise ValueError(_instead(raw, where, "names no columns", {"type": PAIRS[0], "field_prompt": "prompt"}))
    if template == "zephyr":
        lines = {"type": RANKED, "field_responses": "answers", "field_response_text": "answer"}
        why = "takes two of the answers and writes Zephyr's markup"
        raise ValueError(_instead(raw, where, why, {**lines, "field_response_rank": "rank"}))
    return dict(raw)


def _from_template(raw: Mapping[str, Any], template: str, style: str, where: str) -> dict[str, Any]:
    if style not in STYLES:
        lines = {**_PAIR, "field_prompt": "prompt", "chat_template": template}
        raise ValueError(_instead(raw, where, "reads whichever of several columns a row has", lines))
    own = raw.get("chat_template")
    if own not in (None, template):
        raise ValueError(
            f"{where} ({raw.get('path')}): type {raw['type']!r} writes the markup of {template}, and `chat_template: "
            f"{own}` is set. Remove one of them: `type: {STYLES[style]['type']}` takes any template"
        )
    return {**STYLES[style], **raw, "type": STYLES[style]["type"], "chat_template": template}


def _from_formats(raw: Mapping[str, Any], kind: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A mapping with field names, as the host's `user_defined.default` takes it."""
    named = {key: kind[key] for key in USER_DEFINED if kind.get(key)}
    plain = {"type": PAIRS[0], **named}
    unknown = sorted(set(kind) - {*USER_DEFINED, *FORMATS})
    if unknown:
        raise ValueError(_instead(raw, where, f"has unknown keys {unknown} for preference rows", plain))
    for key, bare in FORMATS.items():
        if kind.get(key) not in (None, "", bare):
            why = f"with `{key}: {kind[key]!r}` puts text around the columns, which is the chat template's to write"
            raise ValueError(_instead(raw, where, why, plain))
    # without a format that has {system}, the host does not read that column
    return {**raw, **{key: value for key, value in plain.items() if key != "field_system"}}


def _instead(raw: Mapping[str, Any], where: str, why: str, lines: Mapping[str, Any]) -> str:
    text = "\n".join(f"    {key}: {value}" for key, value in lines.items())
    shown = raw["type"] if isinstance(raw["type"], str) else dict(raw["type"])
    return (
        f"{where} ({raw.get('path')}): type {shown!r} {why}. Write this instead, with the names of your columns (the "
        f"policy's chat template then writes the markup):\n{text}"
    )
