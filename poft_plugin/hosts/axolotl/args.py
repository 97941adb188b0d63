"""Our keys in Axolotl's config schema: one block per registered method, and the top-level keys of this project.

Axolotl merges this class into its own by name, which is why it is called after us.
"""

from typing import Any, Optional

from pydantic import BaseModel, Field, create_model

from poft_plugin.config import RowFilterConfig
from poft_plugin.plugins import load_object, registry

TAKEN_OVER = "poft_plugin_rl"
"""Top-level key that `register` writes: the `rl` type that it took off the config. A saved config still names it."""


def _blocks() -> dict[str, Any]:
    models = {method.block: load_object(method.config) for method in registry().methods.values()}
    return {
        block: (Optional[model], Field(None, description=(model.__doc__ or "").split("\n")[0]))  # noqa: UP045
        for block, model in models.items()
    }


class _OwnKeys(BaseModel):
    poft_plugin_rl: str | None = Field(
        None, description="Written by poft_plugin: the rl type that it trains. Set `rl:` instead."
    )
    row_filters: list[RowFilterConfig] | None = Field(
        None, description="Registered filters for training rows, applied in order: `{name: ..., settings ...}`."
    )


PoftPluginArgs = create_model("PoftPluginArgs", __base__=_OwnKeys, **_blocks())
