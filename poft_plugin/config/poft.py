"""The block `poft:`."""

from pathlib import PurePosixPath
from typing import Literal

from pydantic import Field, model_validator

from poft_plugin.config.blocks import Block


class ReferenceConfig(Block):
    """One aligned reference LLM: a model that this project scores with, or a file of scores made elsewhere."""

    model: str | None = Field(None, description="Hub id or local folder of the reference.")
    scores: str | None = Field(
        None, description="Parquet file of scores made elsewhere (`row_key, reward`); nothing is loaded."
    )
    name: str | None = Field(None, description="Short name in tables; default: the model's last path part.")
    revision: str | None = Field(None, description="Hub revision; resolved to a commit before anything is keyed by it.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights' dtype; `auto`: as the checkpoint says."
    )
    quantization: Literal["int8", "nf4"] | None = Field(
        None, description="bitsandbytes quantization; part of the score's identity."
    )
    attn_implementation: str | None = Field(
        None, description="transformers' attention implementation; null: its own choice."
    )
    devices: int = Field(1, ge=1, description="GPUs per copy (device_map), for references larger than one.")
    chat_template: str | None = Field(
        None, description="null: the tokenizer's own; a file, Jinja text, or a template name of the host's."
    )
    system_turns: Literal["keep", "merge", "drop"] = Field(
        "keep", description="keep | merge (into the first user turn) | drop: some templates refuse system turns."
    )
    on_long_row: Literal["error", "drop", "truncate"] = Field(
        "error", description="A row longer than this reference's context: error | drop the row | cut its end."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the checkpoint.")

    @model_validator(mode="after")
    def _model_or_scores(self) -> "ReferenceConfig":
        if (self.model is None) == (self.scores is None):
            raise ValueError("a reference is either `model:` (scored here) or `scores:` (a parquet file), not both")
        if self.scores is not None:
            if self.name is None:
                raise ValueError("a reference with `scores:` needs a `name:` for tables and logs")
            ignored = sorted(self.model_fields_set - {"name", "scores"})
            if ignored:
                raise ValueError(f"{', '.join(ignored)}: not used with `scores:`; remove")
        return self

    @property
    def label(self) -> str:
        """The name in tables."""
        return self.name or PurePosixPath(str(self.model)).name or str(self.model)

    @property
    def source(self) -> str:
        """The string that stands for this reference in exported files: `model` as written, or the name."""
        return self.model if self.model is not None else str(self.name)


class PoftConfig(Block):
    """The block `poft:`, read by `rl: poft`."""

    references: tuple[ReferenceConfig, ...] = Field(
        description="One or more aligned LLMs whose mean reward the policy is asked to beat.", min_length=1
    )
    beta: float = Field(1.0, gt=0, description="Scale of policy reward minus reference reward (paper: 1).")
    gamma: float = Field(0.0, description="Margin in logits (paper: 0).")
    include_end_of_turn: Literal["auto", True, False] = Field(
        "auto",
        description="References' rewards count their own end-of-turn token: where the policy's labels hold one | "
        "always (true) | never (false).",
    )
    keep_top_percent: float = Field(
        100.0, gt=0, le=100, description="Share of training rows kept, by preference score (Fig. 4), in percent."
    )
    keep_within: str = Field("none", description="Rank rows for `keep_top_percent` within: none | dataset | <column>.")
    missing_scores: Literal["score", "error"] = Field(
        "score", description="What `axolotl train` does with rows that have no cached score: score | error."
    )
    batch_tokens: int | None = Field(
        None, ge=1, description="Scoring batch, in tokens (padding included); default: 8192 on a GPU, 1024 on a CPU."
    )
    score_cache: str | None = Field(
        None, description="Folder of the score cache; default: $POFT_SCORE_CACHE, else ./poft_scores."
    )

    @model_validator(mode="after")
    def _within_what(self) -> "PoftConfig":
        if self.keep_within != "none" and self.keep_top_percent == 100:
            raise ValueError(f"keep_within: {self.keep_within} does nothing without `keep_top_percent:` below 100")
        return self

    @model_validator(mode="after")
    def _distinct_references(self) -> "PoftConfig":
        for attribute, what in (("source", "model"), ("label", "name")):
            seen: set[str] = set()
            for reference in self.references:
                value = getattr(reference, attribute)
                if value in seen:
                    raise ValueError(f"references: two of them have the {what} {value!r}; give each its own `{what}:`")
                seen.add(value)
        return self
