"""A package of somebody else with a scorer of its own: rows weigh by their instruction-following difficulty.

IFD (Li et al. 2024, arXiv:2308.12032) is how much worse a model predicts a response with its prompt than without:
the ratio of the two mean cross-entropies. One model, two jobs.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
from pydantic import Field

from poft_plugin.config import ReferenceConfig, ScoringBlock
from poft_plugin.data.preparation import Prepared, Rows
from poft_plugin.data.rows import dump_conversation, row_key
from poft_plugin.hookspecs import hookimpl
from poft_plugin.method import Method
from poft_plugin.preprocessors.reference_rewards import reference_job
from poft_plugin.scoring.jobs import Preparation, preprocessor
from poft_plugin.trainers.step import Metric, StepOutput


class IfdConfig(ScoringBlock):
    """The block `ifd:`."""

    model: str = Field(description="The model that the difficulty is taken under.")


def without_prompt(rows):
    """The rows' responses alone, and which of them belongs to which row."""
    conversations = [[turn for turn in rows.conversation(i) if turn.role == "assistant"] for i in range(len(rows))]
    keys = [row_key(conversation) for conversation in conversations]
    columns = {"row_key": keys, "conversation": [dump_conversation(each) for each in conversations]}
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    for name in ("source", "row_number"):
        table = table.append_column(name, rows.table[name])
    return Rows(table, {}).unique(), keys


@preprocessor(reads=IfdConfig, columns=("ifd",))
def ifd(rows, settings, context):
    """Attaches `ifd`, the ratio of the mean cross-entropies of a response with and without its prompt."""
    alone, keys = without_prompt(rows)
    model = ReferenceConfig(model=settings.model)
    jobs = (
        replace(reference_job(model, rows, False), name="ifd: with the prompt", kind="difficulty model"),
        replace(reference_job(model, alone, False), name="ifd: without it", kind="difficulty model"),
    )

    def attach(lookups):
        asked, bare = lookups
        of_key = dict(zip(alone.keys.to_pylist(), bare.values.tolist(), strict=True))
        return Prepared({"ifd": asked.values / np.array([of_key[key] for key in keys])})

    return Preparation(jobs, attach)


def ifd_loss(mean_logps, difficulty):
    """Length-normalised SFT, a row weighed by its difficulty."""
    return -difficulty * mean_logps


def ifd_step(setup):
    """The step object's factory."""

    def step(batch):
        difficulty = batch.columns["ifd"].to(batch.mean_logps.dtype)
        return StepOutput(setup.loss(batch.mean_logps, difficulty), {"ifd/difficulty": Metric(difficulty)})

    return step


@hookimpl
def register_methods(register):
    register(
        Method(
            name="ifd",
            paper="Li et al. 2024, arXiv:2308.12032",
            block="ifd",
            config="ifd_method:IfdConfig",
            step="ifd_method:ifd_step",
            loss="ifd",
            preprocessors=("ifd",),
            columns=("ifd",),
        )
    )


@hookimpl
def register_losses(register):
    register("ifd", ifd_loss)


@hookimpl
def register_preprocessors(register):
    register("ifd", ifd)
