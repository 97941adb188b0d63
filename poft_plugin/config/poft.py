"""The config blocks that users write: validated once, frozen, unknown keys refused by name."""

from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)


class Block(BaseModel):
    """Base of every config block: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_min_length=1)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        expected = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and expected in (int, float):
            raise ValueError("expected a number, not true or false")
        return value


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
    chat_template: str | None = Field(None, description="null: the tokenizer's own; or a file, or Jinja text.")
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
    include_end_of_turn: bool = Field(
        False, description="References' rewards count the end-of-turn token too, as the policy's always does."
    )
    keep_top_percent: float = Field(
        100.0, gt=0, le=100, description="Share of training rows kept, by preference score (Fig. 4), in percent."
    )
    keep_within: str = Field("none", description="Rank rows for `keep_top_percent` within: none | dataset | <column>.")
    missing_scores: Literal["score", "error"] = Field(
        "score", description="What `axolotl train` does with rows that have no cached score: score | error."
    )
    batch_tokens: int = Field(8192, ge=1, description="Scoring batch, in tokens (padding included).")
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


class RowFilterConfig(BaseModel):
    """One entry of the top-level list `row_filters:`: a registered filter's `name`, and that filter's own settings."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(description="Name of a registered row filter.")

    def settings(self) -> dict[str, Any]:
        """Everything but the name: handed to the filter as keywords."""
        return dict(self.model_extra or {})


class OpenBlock(Block):
    """A block that takes further keys: settings of a function with `**settings`."""

    model_config = ConfigDict(extra="allow")


def settings_model(function: Callable[..., Any]) -> type[BaseModel]:
    """A block out of a function's keyword-only parameters, their annotations and defaults.

    Examples:
        >>> def keep(rows, *, words: int, within: str = "none"): ...
        >>> sorted(settings_model(keep).model_fields)
        ['within', 'words']
    """
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError:  # names that its module imports for type checkers alone: any value goes
        hints = {}
    parameters = [p for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields: dict[str, Any] = {
        p.name: (hints.get(p.name, Any), ... if p.default is p.empty else p.default) for p in parameters
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature(function).parameters.values())
    base = OpenBlock if takes_any else Block
    return create_model(f"{getattr(function, '__name__', 'filter')}_settings", __base__=base, **fields)


AnyBlock = TypeVar("AnyBlock", bound=BaseModel)


def parse_block(model: type[AnyBlock], raw: Any, key: str) -> AnyBlock:
    """Validates a block and says what is wrong in the user's own terms.

    Args:
        model: the block's class.
        raw: the value in the YAML file.
        key: the block's key, such as `poft`.

    Raises:
        ValueError: naming each wrong key, its value and what is allowed.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"{key}: expected a block of keys, found {raw!r}")
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        details = error.errors()
        nested = {detail["loc"][0] for detail in details if len(detail["loc"]) > 1}
        # a list whose entries are wrong is not, besides, too short
        shown = [d for d in details if not (d["type"] == "too_short" and d["loc"][0] in nested)]
        lines = [_explain(model, key, detail) for detail in shown]
        raise ValueError("\n".join(lines)) from None


def _explain(model: type[BaseModel], key: str, detail: Any) -> str:
    path = ".".join([key, *map(str, detail["loc"])])
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown key; allowed here: {', '.join(_allowed(model, detail['loc']))}"
    if detail["type"] == "too_short":
        return f"{path}: empty; {_description(model, detail['loc'])}"
    if detail["type"] == "missing":
        return f"{path}: missing; {_description(model, detail['loc'])}"
    given = "" if isinstance(detail["input"], Mapping) else f" (given: {detail['input']!r})"
    return f"{path}: {detail['msg'].removeprefix('Value error, ')}{given}"


def _allowed(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    inside_reference = len(loc) > 1 and loc[0] == "references"
    return sorted((ReferenceConfig if inside_reference else model).model_fields)


def _description(model: type[BaseModel], loc: tuple[Any, ...]) -> str:
    field = model.model_fields.get(str(loc[0])) if len(loc) == 1 else None
    return (field.description or "required") if field else "required"
