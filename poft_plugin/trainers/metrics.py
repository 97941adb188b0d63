"""Averages over the samples of many micro-batches and ranks, from sums and counts."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from poft_plugin.trainers.step import Metric

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over ranks."""


class MetricSums:
    """Running sums of weights, weighted values and weighted squares, `(3,)` float64 per metric.

    Every rank adds the same metrics in the same order, so that one reduced tensor serves them all.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._with_std: set[str] = set()

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Adds a micro-batch."""
        for name, metric in metrics.items():
            values = metric.values.detach().double()
            weights = torch.ones_like(values) if metric.weights is None else metric.weights.detach().double()
            sums = torch.stack([weights.sum(), (weights * values).sum(), (weights * values**2).sum()])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
            if metric.with_std:
                self._with_std.add(name)

    def pop(self, reduce: Reduce) -> dict[str, float]:
        """Averages over all ranks since the last call, and starts anew."""
        if not self._sums:
            return {}
        names, total = list(self._sums), reduce(torch.stack(list(self._sums.values()))).cpu()
        self._sums = {}
        averages: dict[str, float] = {}
        for name, (weight, value, square) in zip(names, total.tolist(), strict=True):
            if weight == 0:
                continue
            mean = value / weight
            averages[name] = mean
            if name in self._with_std:
                averages[f"{name}_std"] = max(square / weight - mean**2, 0.0) ** 0.5
        return averages


def merged(metrics: Iterable[tuple[int, Mapping[str, Metric]]]) -> dict[str, Metric]:
    """One metric set over single-sample ones, each sample (known by its index) taken once."""
    by_index = dict(metrics)
    names = next(iter(by_index.values()), {}).keys()
    return {name: _concatenated([sample[name] for sample in by_index.values()]) for name in names}


def _concatenated(parts: list[Metric]) -> Metric:
    weights = [part.weights for part in parts if part.weights is not None]
    return Metric(
        torch.cat([part.values for part in parts]),
        torch.cat(weights) if weights else None,
        parts[0].with_std,
    )
