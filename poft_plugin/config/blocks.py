"""What every config block shares: frozen, unknown keys refused, and errors in the user's own terms."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, create_model, field_validator


class Block(BaseModel):
    """Base of every config block: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_min_length=1)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        expected = cls.model_fields[str(info.field_name)].annotation
        parts = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(part, bool) for part in parts) and _takes_numbers(expected):
            raise ValueError("expected a number, not true or false")
        return value


def _takes_numbers(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_takes_numbers, get_args(annotation)))


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
        key: the block's key, such as `poft`; empty for keys at the top level.

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


def entries_of(raw: Any, key: str) -> list[Mapping[str, Any]]:
    """The entries of a list of mappings; none where the key is not there.

    Raises:
        ValueError: for anything else, naming the key and what was found.
    """
    if raw is None:
        return []
    if not isinstance(raw, (list, tuple)):
        raise ValueError(f"{key}: expected a list of entries (`- key: value`), found {raw!r}")
    for number, entry in enumerate(raw):
        if not isinstance(entry, Mapping) or not all(isinstance(name, str) for name in entry):
            raise ValueError(f"{key}[{number}]: expected an entry of keys (`- key: value`), found {entry!r}")
    return list(raw)


def _explain(model: type[BaseModel], key: str, detail: Any) -> str:
    path = ".".join(filter(None, [key, *map(str, detail["loc"])]))
    start = f"{path}: " if path else ""  # keys at the top level that do not go together have no path
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown key; allowed here: {', '.join(sorted(_block_at(model, detail['loc']).model_fields))}"
    if detail["type"] == "too_short":
        return f"{path}: empty; {_description(model, detail['loc'])}"
    if detail["type"] == "missing":
        return f"{path}: missing; {_description(model, detail['loc'])}"
    if detail["type"] == "model_type":
        return f"{path}: expected a block of keys, found {detail['input']!r}"
    given = "" if isinstance(detail["input"], Mapping) else f" (given: {detail['input']!r})"
    return f"{start}{detail['msg'].removeprefix('Value error, ')}{given}"


def _block_at(model: type[BaseModel], loc: tuple[Any, ...]) -> type[BaseModel]:
    """The (nested) block that a location lies in."""
    for part in loc[:-1]:
        if str(part) in model.model_fields:
            model = _nested(model.model_fields[str(part)].annotation) or model
    return model


def _nested(annotation: Any) -> type[BaseModel] | None:
    """The block inside an annotation such as `Block | None` or `tuple[Block, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _nested(part))), None)


def _description(model: type[BaseModel], loc: tuple[Any, ...]) -> str:
    field = _block_at(model, loc).model_fields.get(str(loc[-1]))
    return (field.description or "required") if field else "required"
