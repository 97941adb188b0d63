"""What a method does with one micro-batch, without knowing who trains.

Axes: S sequences of the micro-batch, G samples (groups of sequences).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import BaseModel
from torch import Tensor

LossFunction = Callable[..., Tensor]
"""A pure function of per-sequence numbers, `(S,)` tensors in, `(G,)` losses out."""


@dataclass(frozen=True)
class SequenceBatch:
    """Per-sequence numbers of a micro-batch: all that a loss may see.

    Args:
        sum_logps: `(S,)`, nats, from the policy, summed over the counted tokens. Carries gradient.
        num_tokens: `(S,)`, counted tokens under the policy's tokenizer.
        group_ids: `(S,)`, the sample of each sequence; a sample's sequences come from best to worst.
        columns: the method's columns, `(S,)` float64.
        distribution_rewards: `(S,)`, DEFT's `R_dis` of each sequence, where it is asked for. Carries gradient.
    """

    sum_logps: Tensor
    num_tokens: Tensor
    group_ids: Tensor
    columns: Mapping[str, Tensor]
    distribution_rewards: Tensor | None = None

    @property
    def mean_logps(self) -> Tensor:
        """`(S,)`, nats per token. Carries gradient. A sequence without tokens has 0."""
        return self.sum_logps / self.num_tokens.clamp(min=1)


@dataclass(frozen=True)
class Metric:
    """A number to log: the weighted mean of per-sample values over all samples of the logged steps and ranks.

    Args:
        values: `(G,)`, without gradient.
        weights: `(G,)`, or None for a plain mean over samples.
        with_std: log the (population) standard deviation too, under `NAME_std`.
    """

    values: Tensor
    weights: Tensor | None = None
    with_std: bool = False


@dataclass(frozen=True)
class StepOutput:
    """Losses and metrics of a micro-batch.

    Args:
        losses: `(G,)`, one per sample, not reduced: the trainer takes the mean over the whole optimizer step.
        metrics: what to log, by name.
    """

    losses: Tensor
    metrics: Mapping[str, Metric] = field(default_factory=dict)


class Step(Protocol):
    """A method's step object, made once per run from its config block."""

    def __call__(self, batch: SequenceBatch) -> StepOutput:
        """Losses and metrics of one micro-batch."""
        ...


@dataclass(frozen=True)
class StepSetup:
    """What a step is made from, once per run.

    Args:
        settings: the method's config block, its defaults filled in.
        loss: the registered loss.
        keys: the top-level keys that the method reads (`Method.keys`), or None.
        base: for a wrapping method, the step of the method inside, or None.
    """

    settings: BaseModel
    loss: LossFunction
    keys: BaseModel | None = None
    base: Step | None = None
