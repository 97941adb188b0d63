"""Our keys in Axolotl's config schema: one block per registered method, and the top-level keys of this project.

Axolotl merges this class into its own by name, which is why it is called after us.
"""

from typing import Any, Optional, Union

from pydantic import BaseModel, Field, create_model

from poft_plugin.config import RowFilterConfig
from poft_plugin.plugins import load_object, registry

NAME = "poft_plugin.PoftPlugin"
"""What a config writes under `plugins:`."""

TAKEN_OVER = "poft_plugin_rl"
"""Top-level key that `register` writes: the `rl` type that it took off the config. A saved config still names it."""


TAKEN_KEYS = "poft_plugin_keys"
"""Top-level key that `register` writes: the top-level keys of the host that it took off with `rl`."""

KEPT = "poft_plugin_kept"
"""Top-level key that `register` writes for workers of Ray's: the config as it was before, and the driver's folder."""


def _blocks() -> dict[str, Any]:
    """One field per block; where several methods share one, a value fits the narrowest of their models."""
    models: dict[str, list[Any]] = {}
    for method in registry().methods.values():
        known = models.setdefault(method.block, [])
        model = load_object(method.config)
        if model not in known:
            known.append(model)
    fields: dict[str, Any] = {}
    for block, known in models.items():
        narrow_first = sorted(known, key=lambda model: len(model.model_fields))
        description = (narrow_first[-1].__doc__ or "").split("\n")[0]
        fields[block] = (Optional[Union[tuple(narrow_first)]], Field(None, description=description))  # noqa: UP007, UP045
    return fields


class _OwnKeys(BaseModel):
    poft_plugin_rl: str | None = Field(
        None, description="Written by poft_plugin: the rl type that it trains. Set `rl:` instead."
    )
    poft_plugin_keys: dict[str, Any] | None = Field(
        None, description="Written by poft_plugin: the host's keys that it reads itself. Set them at the top level."
    )
    poft_plugin_kept: dict[str, Any] | None = Field(
        None, description="Written by poft_plugin for workers of Ray's: the config as it was written. Leave it out."
    )
    row_filters: list[RowFilterConfig] | None = Field(
        None, description="Registered filters for training rows, applied in order: `{name: ..., settings ...}`."
    )


PoftPluginArgs = create_model("PoftPluginArgs", __base__=_OwnKeys, **_blocks())
