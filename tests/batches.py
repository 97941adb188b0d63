"""Micro-batches of ranked samples from plain lists: what the steps of preference methods are tested with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import oracles
import torch
from torch import Tensor

from poft_plugin.trainers.metrics import MetricSums
from poft_plugin.trainers.step import Metric, SequenceBatch, Step


@dataclass(frozen=True)
class Group:
    """One sample, a number for each of its responses, best first."""

    sums: Sequence[float]
    tokens: Sequence[int]
    ranks: Sequence[int]
    scores: Sequence[float]
    reference: Sequence[float]
    rewards: Sequence[float]

    @property
    def means(self) -> list[float]:
        """Log-probabilities per token."""
        return [total / count for total, count in zip(self.sums, self.tokens, strict=True)]


TRIPLE = Group(
    (-6.0, -2.0, -9.0), (3, 4, 2), (0, 1, 2), scores=(2.0, 0.5, -1.0), reference=(0.0,) * 3, rewards=(0.5, -2.0, 4.0)
)
LOST = Group((-8.0, -1.0), (2, 4), (0, 1), scores=(0.3, 0.1), reference=(-5.0, -3.0), rewards=(-1.5, 0.25))
WON = Group((-3.0, -7.5), (6, 3), (0, 1), scores=(-1.0, -1.5), reference=(-4.0, -6.0), rewards=(3.0, 1.0))
TIED = Group((-4.0, -2.0), (2, 2), (0, 0), scores=(1.0, 1.0), reference=(-4.0, -2.5), rewards=(0.0, -0.5))
HALF_TIED = Group(
    (-1.0, -8.0, -3.0, -2.5, -5.0), (1, 4, 2, 5, 1), (0, 0, 1, 1, 2),
    scores=(4.0, 4.0, 1.0, 1.0, -2.0), reference=(0.0,) * 5, rewards=(0.1, 0.2, 0.3, 0.4, 0.5),
)  # fmt: skip
LISTS = (LOST, HALF_TIED, TIED, TRIPLE, WON)
PAIRS = (LOST, TIED, WON)


def batch(groups: Sequence[Group], dtype: torch.dtype = torch.float64, *, rewards: bool = True) -> SequenceBatch:
    """The samples end to end. `sum_logps` and `distribution_rewards` are leaves that take gradients."""

    def column(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor([number for group in groups for number in getattr(group, name)], dtype=dtype)

    sizes = torch.tensor([len(group.sums) for group in groups])
    return SequenceBatch(
        sum_logps=column("sums", dtype).requires_grad_(),
        num_tokens=column("tokens", torch.long),
        group_ids=torch.repeat_interleave(torch.arange(len(groups)), sizes),
        columns={
            "ranks": column("ranks"),
            "scores": column("scores"),
            "reference_sum_logps": column("reference"),
        },
        distribution_rewards=column("rewards", dtype).requires_grad_() if rewards else None,
    )


def logged(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """What the log shows of one micro-batch."""
    sums = MetricSums()
    sums.add(metrics)
    return sums.pop(lambda tensor: tensor)


def mean(values: Sequence[float]) -> float:
    """The plain mean."""
    return sum(values) / len(values)


def ranking(groups: Sequence[Group], numbers: Sequence[Sequence[float]]) -> dict[str, float]:
    """What every step logs on how well its numbers follow the labels."""
    accuracies = [oracles.ranking_accuracy(row, group.ranks) for group, row in zip(groups, numbers, strict=True)]
    return {
        "rewards/accuracies": mean([a for a in accuracies if a is not None]),
        "rewards/margins": mean([row[0] - mean(row[1:]) for row in numbers]),
    }


def assert_equal(losses: Tensor, expected: Sequence[float]) -> None:
    """Losses of float64 numbers, one a sample, to float64's last digits."""
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def gradient_of(losses: Tensor, values: Tensor | None) -> list[float]:
    """Of the losses' sum."""
    assert values is not None
    return torch.autograd.grad(losses.sum(), values, retain_graph=True)[0].tolist()


def check_laws(step: Step, groups: Sequence[Group]) -> None:
    """What holds for every step: no sample sees another, metrics carry no gradient, dtypes are the policy's."""
    together = step(batch(groups))
    alone = [step(batch([group])) for group in groups]
    torch.testing.assert_close(together.losses, torch.cat([output.losses for output in alone]))
    for name, metric in together.metrics.items():
        assert not metric.values.requires_grad, name
        torch.testing.assert_close(metric.values, torch.cat([output.metrics[name].values for output in alone]))
    for dtype in (torch.float32, torch.float64):
        losses = step(batch(groups, dtype)).losses
        assert (losses.shape, losses.dtype, losses.requires_grad) == ((len(groups),), dtype, True)
