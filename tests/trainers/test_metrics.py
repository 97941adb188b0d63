"""Averages that do not depend on how samples fall into micro-batches and ranks."""

import itertools
import math

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poft_plugin.trainers.metrics import MetricSums, merged
from poft_plugin.trainers.step import Metric

VALUES = st.floats(-100, 100)
WEIGHTS = st.integers(1, 1000).map(float)


def alone(sums: Tensor) -> Tensor:
    """The reduction of a run with one rank."""
    return sums


def metric(*values: float, weights: list[float] | None = None, with_std: bool = False) -> Metric:
    """In float32, as steps give them."""
    return Metric(torch.tensor(values), None if weights is None else torch.tensor(weights), with_std)


def test_means_by_hand() -> None:
    sums = MetricSums()
    sums.add({"a": metric(1.0, 2.0), "b": metric(10.0, 30.0, weights=[3.0, 1.0], with_std=True)})
    sums.add({"a": metric(6.0), "b": metric(20.0, weights=[4.0])})
    mean = (3 * 10 + 30 + 4 * 20) / (3 + 1 + 4)
    variance = (3 * (10 - mean) ** 2 + (30 - mean) ** 2 + 4 * (20 - mean) ** 2) / (3 + 1 + 4)
    assert sums.pop(alone) == pytest.approx({"a": (1 + 2 + 6) / 3, "b": mean, "b_std": math.sqrt(variance)})


@settings(deadline=None)
@given(st.data())
def test_the_split_does_not_matter(data: st.DataObject) -> None:
    """Any number of ranks, each with any number of micro-batches of any size, empty ones among them."""
    samples = data.draw(st.lists(st.tuples(VALUES, WEIGHTS), min_size=1, max_size=20))
    num_ranks = data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.integers(0, 7), min_size=num_ranks))
    cuts = [0, *[min(sum(sizes[: i + 1]), len(samples)) for i in range(len(sizes))], len(samples)]
    ranks = [MetricSums() for _ in range(num_ranks)]
    for number, (start, end) in enumerate(itertools.pairwise(cuts)):
        values = torch.tensor([v for v, _ in samples[start:end]], dtype=torch.float64)
        weights = torch.tensor([w for _, w in samples[start:end]], dtype=torch.float64)
        batch = {"plain": Metric(values, with_std=True), "weighted": Metric(values, weights, with_std=True)}
        ranks[number % num_ranks].add(batch)
    contributions: list[Tensor] = []

    def all_reduce(sums: Tensor) -> Tensor:
        contributions.append(sums)
        return torch.stack(contributions).sum(0)

    logged = [rank.pop(all_reduce) for rank in ranks][-1]
    for name, weights_of_all in (("plain", None), ("weighted", [w for _, w in samples])):
        expected = oracles.moments([v for v, _ in samples], weights_of_all)
        assert logged[name] == pytest.approx(expected.mean, rel=1e-12, abs=1e-10)
        assert logged[f"{name}_std"] == pytest.approx(expected.std, rel=1e-6, abs=1e-5)


def test_one_tensor_is_reduced_for_all_metrics() -> None:
    """One collective call per log, whatever is logged."""
    sums, calls = MetricSums(), []
    sums.add({"a": metric(1.0), "b": metric(2.0, weights=[2.0])})

    def two_equal_ranks(total: Tensor) -> Tensor:
        calls.append(total)
        return 2 * total

    assert sums.pop(two_equal_ranks) == {"a": 1.0, "b": 2.0}
    assert [(tuple(total.shape), total.dtype) for total in calls] == [((2, 3), torch.float64)]


def test_pop_starts_anew() -> None:
    sums = MetricSums()
    sums.add({"a": metric(1.0, with_std=True)})
    sums.pop(alone)
    assert sums.pop(alone) == {}
    sums.add({"a": metric(5.0, with_std=True)})
    assert sums.pop(alone) == {"a": 5.0, "a_std": 0.0}


def test_a_metric_without_samples_is_not_logged() -> None:
    sums = MetricSums()
    sums.add({"a": metric(1.0), "empty": metric(with_std=True), "weightless": metric(3.0, weights=[0.0])})
    assert sums.pop(alone) == {"a": 1.0}


@pytest.mark.parametrize(("value", "count"), [(0.7, 7), (0.1, 3), (-1.7, 1000), (0.3, 1000)])
def test_equal_values_have_no_spread_however_they_round(value: float, count: int) -> None:
    """The mean of the squares minus the square of the mean is a little below 0 for each of these."""
    sums = MetricSums()
    for _ in range(count):
        sums.add({"a": Metric(torch.tensor([value], dtype=torch.float64), with_std=True)})
    assert sums.pop(alone) == {"a": pytest.approx(value), "a_std": 0.0}


def test_adding_does_not_keep_the_graph() -> None:
    """A log window of micro-batches would hold all their activations."""
    sums, weight, seen = MetricSums(), torch.ones(2, requires_grad=True), []
    sums.add({"a": Metric(2 * weight, weights=3 * weight)})

    def reduce(total: Tensor) -> Tensor:
        seen.append(total.requires_grad)
        return total

    assert sums.pop(reduce) == {"a": 2.0}
    assert seen == [False]


def test_merged_takes_each_sample_once() -> None:
    """A launcher repeats rows of the evaluation set so that every rank has as many."""
    samples = [(7, 1.0, 3.0), (2, 5.0, 1.0), (7, 1.0, 3.0), (9, 2.0, 2.0), (2, 5.0, 1.0)]
    metrics = merged((i, {"a": metric(v, with_std=True), "b": metric(v, weights=[w])}) for i, v, w in samples)
    assert metrics.keys() == {"a", "b"}
    assert sorted(metrics["a"].values.tolist()) == [1, 2, 5]
    assert metrics["a"].weights is None
    assert metrics["a"].with_std
    assert metrics["b"].weights is not None
    assert not metrics["b"].with_std
    pairs = zip(metrics["b"].values.tolist(), metrics["b"].weights.tolist(), strict=True)
    assert sorted(pairs) == [(1, 3), (2, 2), (5, 1)]


def test_merged_of_nothing_is_nothing() -> None:
    assert merged([]) == {}
