"""THE TABLE of methods. This module is itself a plugin: its hooks register what the project ships."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from poft_plugin.data.columns import REFERENCE_LOGP
from poft_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from poft_plugin.data.preparation import Preprocessor, RowFilter
    from poft_plugin.trainers.step import LossFunction


@dataclass(frozen=True)
class Method:
    """An rl type: what `rl: NAME` trains.

    Args:
        name: the value of `rl:`.
        paper: where the method comes from.
        block: the config block that it reads.
        config: `module:Class` of the block's pydantic model.
        step: `module:factory`; `factory(settings, loss)` gives the step object.
        loss: name of a registered loss.
        preprocessors: names of registered preprocessors, run in this order.
        columns: per-sequence columns that a batch must carry.
        check: `module:function` that refuses settings which cannot work, before any data is read; or None.
    """

    name: str
    paper: str
    block: str
    config: str
    step: str
    loss: str
    preprocessors: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    check: str | None = None


METHODS = (
    Method(
        name="poft",
        paper="Fan et al. 2025, arXiv:2412.12865",
        block="poft",
        config="poft_plugin.config:PoftConfig",
        step="poft_plugin.trainers.poft:poft_step",
        loss="poft",
        preprocessors=("reference_rewards",),
        columns=(REFERENCE_LOGP,),
        check="poft_plugin.scoring.references:check_references",
    ),
)


@hookimpl
def register_methods(register: "Callable[[Method], None]") -> None:
    """Our rl types."""
    for method in METHODS:
        register(method)


@hookimpl
def register_losses(register: "Callable[[str, LossFunction], None]") -> None:
    """Our losses."""
    from poft_plugin.losses import poft_loss

    register("poft", poft_loss)


@hookimpl
def register_preprocessors(register: "Callable[[str, Preprocessor], None]") -> None:
    """Our preprocessors."""
    from poft_plugin.scoring.references import reference_rewards

    register("reference_rewards", reference_rewards)


@hookimpl
def register_row_filters(register: "Callable[[str, RowFilter], None]") -> None:
    """Our row filters."""
    from poft_plugin.data.filters import keep_top_percent

    register("keep_top_percent", keep_top_percent)
