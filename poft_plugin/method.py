"""A method: one row of the table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """An rl type: what `rl: NAME` trains.

    Args:
        name: the value of `rl:`.
        paper: where the method comes from.
        block: the config block that it reads.
        config: `module:Class` of the block's pydantic model.
        step: `module:factory`; `factory(setup)` with a `StepSetup` gives the step object.
        loss: name of a registered loss.
        ranked: whether a row is a prompt with ranked responses (a preference method) or one conversation.
        max_responses: most responses that a ranked row may have; None for any number.
        preprocessors: names of registered preprocessors; each says itself which rows it gets, and when.
        columns: columns that a batch must carry, one number per sequence (or one per row, for all of its sequences).
        keys: `module:Class` of a pydantic model of top-level keys that the method reads, or None.
        defaults: values of the block's keys where they are null.
        unread: keys of the block that this method does not read: refused where they are set.
        alone: whether `rl: NAME` itself may be written; otherwise the method is there to be wrapped.
        check: `module:function` that refuses settings which cannot work, before any data is read; or None.
        base: the method that this one wraps, or None.
    """

    name: str
    paper: str
    block: str
    config: str
    step: str
    loss: str
    ranked: bool = False
    max_responses: int | None = None
    preprocessors: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    keys: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    alone: bool = True
    check: str | None = None
    base: "Method | None" = None
