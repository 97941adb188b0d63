"""A package of somebody else: an rl type, a loss, a preprocessor and a row filter, by the door that ours use."""

import numpy as np
from pydantic import BaseModel, ConfigDict

from poft_plugin.data.preparation import Prepared
from poft_plugin.hookspecs import hookimpl
from poft_plugin.methods import Method
from poft_plugin.trainers.step import Metric, StepOutput


class ToyConfig(BaseModel):
    """The block `toy:`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strength: float = 1.0


def toy_loss(mean_logps, bonus, *, strength):
    """Length-normalised SFT, a row weighed by its bonus."""
    return -strength * bonus * mean_logps


def count_words(rows, settings, run):
    """A column out of the text alone: one over the number of words of the row's last turn."""
    words = [len(rows.conversation(index)[-1].content.split()) for index in range(len(rows))]
    return Prepared({"bonus": 1 / np.maximum(words, 1)})


def short_rows(rows, *, max_words):
    """Keeps rows whose last turn has at most `max_words` words."""
    return np.array([len(rows.conversation(index)[-1].content.split()) <= max_words for index in range(len(rows))])


def toy_step(settings, loss):
    """The step object's factory."""

    def step(batch):
        bonus = batch.columns["bonus"].to(batch.mean_logps.dtype)
        losses = loss(batch.mean_logps, bonus, strength=settings.strength)
        return StepOutput(losses, {"toy/bonus": Metric(bonus)})

    return step


@hookimpl
def register_methods(register):
    register(
        Method(
            name="toy",
            paper="none",
            block="toy",
            config="toy_method:ToyConfig",
            step="toy_method:toy_step",
            loss="toy",
            preprocessors=("count_words",),
            columns=("bonus",),
        )
    )


@hookimpl
def register_losses(register):
    register("toy", toy_loss)


@hookimpl
def register_preprocessors(register):
    register("count_words", count_words)


@hookimpl
def register_row_filters(register):
    register("short_rows", short_rows)
