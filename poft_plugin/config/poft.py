"""The block `poft:`."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from poft_plugin.config.blocks import Block
from poft_plugin.config.scoring import ScoringBlock

MOST_BETA = 1000.0
"""At that, a difference of 0.04 nats per token is a sigmoid of 1 in float32: no row is weighed any more. Above, it is a
slip of units or of the decimal point, and the gradient grows with it."""

MOST_GAMMA = 100.0
"""In float32, exp(-100) is 0: the coefficient is 0 or beta for every row, and a larger margin changes nothing."""


class ReferenceConfig(Block):
    """One aligned reference LLM: a model that this project scores with, or a file of scores made elsewhere."""

    model: str | None = Field(None, description="Hub id or local folder of the reference, or a GGUF file in one.")
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
        None, description="transformers' attention implementation; null: its own choice, or `eager` for a soft-cap."
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


class PoftConfig(ScoringBlock):
    """The block `poft:`, read by `rl: poft`."""

    references: tuple[ReferenceConfig, ...] = Field(
        description="One or more aligned LLMs whose mean reward the policy is asked to beat.", min_length=1
    )
    beta: float = Field(
        1.0, gt=0, le=MOST_BETA, description="Scale of policy reward minus reference reward (paper: 1)."
    )
    gamma: float = Field(0.0, ge=-MOST_GAMMA, le=MOST_GAMMA, description="Margin in logits (paper: 0).")
    include_end_of_turn: Literal["auto", True, False] = Field(
        "auto",
        description="References' rewards count their own end-of-turn token: where the policy's labels hold one | "
        "always (true) | never (false).",
    )
    keep_top_percent: float = Field(
        100.0, gt=0, le=100, description="Share of training rows kept, by preference score (Fig. 4), in percent."
    )
    keep_within: str = Field("none", description="Rank rows for `keep_top_percent` within: none | dataset | <column>.")
    on_bad_row: Literal["error", "drop"] = Field(
        "error",
        description="A row that cannot be read, or that the policy's or a reference's chat template refuses or "
        "changes: error | drop it.",
    )

    @field_validator("references", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        many = [value] if isinstance(value, (str, Mapping)) else value
        if not isinstance(many, (list, tuple)):
            raise ValueError("expected a list of references, each a model or a block of keys")
        return [{"model": entry} if isinstance(entry, str) else entry for entry in many]

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
