"""Groups of responses as rectangles: what the losses of preference methods read.

Axes: S sequences of the micro-batch, G samples, C responses of the largest sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from poft_plugin.data.columns import RANKS
from poft_plugin.trainers.step import Metric, SequenceBatch


@dataclass(frozen=True)
class Ranked:
    """A micro-batch of samples, each sample's responses from best to worst, padded to C.

    Args:
        batch: where the numbers come from.
        mask: `(G, C)`, True where there is a response.
    """

    batch: SequenceBatch
    mask: Tensor

    @classmethod
    def of(cls, batch: SequenceBatch) -> "Ranked":
        """Finds the samples of a micro-batch."""
        counts = torch.bincount(batch.group_ids)
        return cls(batch, torch.arange(int(counts.max()), device=counts.device) < counts[:, None])

    def pad(self, values: Tensor) -> Tensor:
        """`(G, C)` from `(S,)`; padding is 0. Keeps gradients."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def best(self, values: Tensor) -> Tensor:
        """`(G,)`: each sample's value of its best response, from `(S,)`."""
        return values[self._first]

    def average(self, values: Tensor) -> Tensor:
        """`(G,)`: each sample's mean over its responses, from `(S,)`."""
        return self.pad(values).sum(1) / self.mask.sum(1)

    def column(self, name: str) -> Tensor:
        """`(G, C)`: one of the method's columns, in the dtype of the log-probabilities."""
        return self.pad(self.batch.columns[name].to(self.batch.sum_logps.dtype))

    @property
    def mean_logps(self) -> Tensor:
        """`(G, C)`, nats per token."""
        return self.pad(self.batch.mean_logps)

    @property
    def sum_logps(self) -> Tensor:
        """`(G, C)`, nats."""
        return self.pad(self.batch.sum_logps)

    @property
    def sft_losses(self) -> Tensor:
        """`(G,)`: `L_sft = - sum_t log p(y_1,t)`, the best response's (Eq. 9), nats."""
        return -self.best(self.batch.sum_logps)

    def ranking_metrics(self, scores: Tensor) -> dict[str, Metric]:
        """How well numbers `(G, C)` follow the labels.

        `rewards/accuracies` is the share of a sample's untied pairs in which the better response has the higher
        number (a sample of ties has none), `rewards/margins` the best response's number minus the mean of the others'.
        """
        scores, ranks = scores.detach(), self.column(RANKS)
        both = self.mask[:, :, None] & self.mask[:, None, :]
        better = both & (ranks[:, :, None] < ranks[:, None, :])
        right = (better & (scores[:, :, None] > scores[:, None, :])).sum((1, 2))
        pairs = better.sum((1, 2))
        others = self.mask.clone()
        others[:, 0] = False
        mean_of_others = (scores * others).sum(1) / others.sum(1).clamp(min=1)
        return {
            "rewards/accuracies": Metric(right.to(scores.dtype) / pairs.clamp(min=1), weights=pairs > 0),
            "rewards/margins": Metric(scores[:, 0] - mean_of_others),
        }

    @property
    def _first(self) -> Tensor:
        counts = self.mask.sum(1)
        return counts.cumsum(0) - counts
