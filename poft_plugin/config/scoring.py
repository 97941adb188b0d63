"""The keys of every block whose method scores rows."""

from typing import Literal

from pydantic import Field

from poft_plugin.config.blocks import Block


class ScoringBlock(Block):
    """Base of the blocks that score: how, what may be scored when, and where scores are kept."""

    batch_tokens: int | None = Field(
        None, ge=1, description="Scoring batch, in tokens (padding included); default: 8192 on a GPU, 1024 on a CPU."
    )
    missing_scores: Literal["score", "error"] = Field(
        "score",
        description="What `axolotl train` does with rows or responses without a cached score: score | error.",
    )
    score_cache: str | None = Field(
        None, description="Folder of the score cache; default: $POFT_SCORE_CACHE, else ./poft_scores."
    )
