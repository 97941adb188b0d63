"""A package of somebody else: rl types, losses, preprocessors and a row filter, by the door that ours use."""

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch.nn.functional import softplus

from poft_plugin.data.groups import ragged
from poft_plugin.data.preparation import Prepared
from poft_plugin.hookspecs import hookimpl
from poft_plugin.method import Method
from poft_plugin.scoring.jobs import preprocessor
from poft_plugin.trainers.ranked import Ranked
from poft_plugin.trainers.step import Metric, StepOutput


class ToyConfig(BaseModel):
    """The block `toy:`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strength: float = 1.0


def check_toy(settings):
    """Refuses what cannot work before any data is read."""
    if settings.strength <= 0:
        raise ValueError(f"toy.strength: {settings.strength}; above 0")


def count_words(conversation):
    """Words of the last turn."""
    return max(len(conversation[-1].content.split()), 1)


def toy_rows_loss(mean_logps, bonus, *, strength):
    """Length-normalised SFT, a row weighed by its bonus."""
    return -strength * bonus * mean_logps


@preprocessor(reads=ToyConfig, columns=("bonus",))
def row_bonus(rows, settings, context):
    """A column out of the text alone: one over the number of words of the row's last turn."""
    return Prepared({"bonus": np.array([1 / count_words(rows.conversation(index)) for index in range(len(rows))])})


def short_rows(rows, *, max_words):
    """Keeps rows whose last turn has at most `max_words` words."""
    return np.array([count_words(rows.conversation(index)) <= max_words for index in range(len(rows))])


def toy_rows_step(setup):
    """The step object's factory."""

    def step(batch):
        bonus = batch.columns["bonus"].to(batch.mean_logps.dtype)
        losses = setup.loss(batch.mean_logps, bonus, strength=setup.settings.strength)
        return StepOutput(losses, {"toy/bonus": Metric(bonus)})

    return step


def toy_loss(mean_logps, mask, bonus):
    """How far the best response is from the mean of the others, weighed by its bonus."""
    others = mask.clone()
    others[:, 0] = False
    margins = mean_logps[:, 0] - (mean_logps * others).sum(1) / others.sum(1)
    return bonus * softplus(-margins)


@preprocessor(reads=ToyConfig, columns=("bonus",))
def response_bonus(rows, settings, context):
    """A number for each response: the strength over its words."""
    samples = [rows.sample(index) for index in range(len(rows))]
    words = [[count_words(s.conversation(number)) for number in range(len(s.responses))] for s in samples]
    return Prepared({"bonus": ragged([[settings.strength / count for count in row] for row in words])})


def toy_step(setup):
    """The step object's factory."""

    def step(batch):
        ranked = Ranked.of(batch)
        bonus = ranked.column("bonus")[:, 0]
        return StepOutput(setup.loss(ranked.mean_logps, ranked.mask, bonus), {"toy/bonus": Metric(bonus)})

    return step


@hookimpl
def register_methods(register):
    both = {"paper": "none", "block": "toy", "config": "toy_method:ToyConfig", "columns": ("bonus",)}
    both["check"] = "toy_method:check_toy"
    register(
        Method(
            name="toy_rows",
            step="toy_method:toy_rows_step",
            loss="toy_rows",
            preprocessors=("row_bonus",),
            **both,
        )
    )
    register(
        Method(
            name="toy",
            step="toy_method:toy_step",
            loss="toy",
            ranked=True,
            preprocessors=("response_bonus",),
            **both,
        )
    )


@hookimpl
def register_losses(register):
    register("toy_rows", toy_rows_loss)
    register("toy", toy_loss)


@hookimpl
def register_preprocessors(register):
    register("row_bonus", row_bonus)
    register("response_bonus", response_bonus)


@hookimpl
def register_row_filters(register):
    register("short_rows", short_rows)
