"""What a method does with one micro-batch, without knowing who trains.

Axes: S sequences of the micro-batch, G samples (groups of sequences).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

LossFunction = Callable[..., Tensor]
"""A pure function of per-sequence numbers, `(S,)` tensors in, `(G,)` losses out."""


@dataclass(frozen=True)
class SequenceBatch:
    """Per-sequence numbers of a micro-batch: all that a loss may see.

    Args:
        mean_logps: `(S,)`, nats per token, from the policy. Carries gradient.
        num_tokens: `(S,)`, counted tokens under the policy's tokenizer.
        group_ids: `(S,)`, the sample of each sequence.
        columns: the method's per-sequence columns, `(S,)` float64.
    """

    mean_logps: Tensor
    num_tokens: Tensor
    group_ids: Tensor
    columns: Mapping[str, Tensor]


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
