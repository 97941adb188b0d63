"""Samples as rectangles, and how well numbers follow their labels."""

import oracles
import pytest
import torch
from batches import LISTS, LOST, TIED, TRIPLE, WON, Group, batch, gradient_of, logged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poft_plugin.trainers.ranked import Ranked


def ranked(*groups: Group) -> Ranked:
    """Samples of a micro-batch."""
    return Ranked.of(batch(groups))


def metrics_of(ranks: list[list[int]], numbers: list[list[float]]) -> dict[str, list[float]]:
    """Values of each metric for samples with these ranks and numbers; a weight of 0 is shown as -1."""
    samples = ranked(*(Group(row, [1] * len(row), row, row, row, row) for row in ranks))
    values = torch.tensor([n for row in numbers for n in row], dtype=torch.float64)
    metrics = samples.ranking_metrics(samples.pad(values))
    accuracies = metrics["rewards/accuracies"]
    assert accuracies.weights is not None
    return {
        "accuracies": torch.where(accuracies.weights.bool(), accuracies.values, -1).tolist(),
        "margins": metrics["rewards/margins"].values.tolist(),
    }


def test_rectangles_by_hand() -> None:
    samples = ranked(LOST, TRIPLE, WON)
    assert samples.mask.tolist() == [[True, True, False], [True, True, True], [True, True, False]]
    assert samples.sum_logps.tolist() == [[-8, -1, 0], [-6, -2, -9], [-3, -7.5, 0]]
    assert samples.mean_logps.tolist() == [[-8 / 2, -1 / 4, 0], [-6 / 3, -2 / 4, -9 / 2], [-3 / 6, -7.5 / 3, 0]]
    assert samples.column("ranks").tolist() == [[0, 1, 0], [0, 1, 2], [0, 1, 0]]
    assert samples.column("reference_sum_logps").tolist() == [[-5, -3, 0], [0, 0, 0], [-4, -6, 0]]


def test_one_number_a_sample() -> None:
    samples = ranked(LOST, TRIPLE, WON)
    assert samples.sft_losses.tolist() == [8, 6, 3]
    values = torch.arange(7, dtype=torch.float64)
    assert samples.best(values).tolist() == [0, 2, 5]
    assert samples.average(values).tolist() == [(0 + 1) / 2, (2 + 3 + 4) / 3, (5 + 6) / 2]


def test_a_single_sample_and_a_single_response() -> None:
    assert ranked(TRIPLE).mask.tolist() == [[True, True, True]]
    single = Group([-3.0], [2], [0], [0.0], [0.0], [0.0])
    assert ranked(single, LOST).mask.tolist() == [[True, False], [True, True]]
    assert ranked(single, LOST).sft_losses.tolist() == [3, 8]


def test_gradients_go_back_to_where_they_came_from() -> None:
    """Each response's, once; padding gets none."""
    values = torch.arange(7, dtype=torch.float64, requires_grad=True)
    samples = ranked(LOST, TRIPLE, WON)
    weights = torch.tensor([[1.0, 2.0, 50.0], [3.0, 4.0, 5.0], [6.0, 7.0, 60.0]]).double()
    for result, expected in (
        ((samples.pad(values) * weights).sum(), [1, 2, 3, 4, 5, 6, 7]),
        ((samples.best(values) * weights[:, 0]).sum(), [1, 0, 3, 0, 0, 6, 0]),
        ((samples.average(values) * weights[:, 0]).sum(), [1 / 2, 1 / 2, 3 / 3, 3 / 3, 3 / 3, 6 / 2, 6 / 2]),
    ):
        torch.testing.assert_close(torch.autograd.grad(result, values)[0], torch.tensor(expected).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_are_in_the_policys_dtype(dtype: torch.dtype) -> None:
    samples = Ranked.of(batch(LISTS, dtype))
    assert {samples.column(name).dtype for name in ("ranks", "scores")} == {dtype}
    assert samples.sum_logps.dtype == samples.mean_logps.dtype == samples.sft_losses.dtype == dtype


def test_accuracies_by_hand() -> None:
    """The share of pairs in order; numbers that are equal are not in order."""
    three = [0, 1, 2]
    assert metrics_of([three, three, three], [[3, 2, 1], [1, 2, 3], [2, 3, 1]])["accuracies"] == [1, 0, 2 / 3]
    assert metrics_of([three, three], [[2, 2, 2], [2, 2, 1]])["accuracies"] == [0, 2 / 3]


def test_tied_responses_are_no_pair() -> None:
    assert metrics_of([[0, 0, 1], [0, 0, 1], [0, 1, 1]], [[5, 9, 1], [5, 1, 4], [1, 3, 0]])["accuracies"] == [
        2 / 2,
        1 / 2,
        1 / 2,
    ]


def test_a_sample_of_ties_has_no_accuracy() -> None:
    """It weighs nothing in the mean; a batch of ties logs none."""
    assert metrics_of([[0, 0], [0, 1], [3, 3, 3]], [[1, 2], [2, 1], [3, 2, 1]])["accuracies"] == [-1, 1, -1]
    samples = ranked(TIED, WON, TIED)
    assert logged(samples.ranking_metrics(samples.mean_logps))["rewards/accuracies"] == 1
    only = ranked(TIED)
    assert logged(only.ranking_metrics(only.mean_logps)).keys() == {"rewards/margins"}


def test_margins_by_hand() -> None:
    """The best one's number over the mean of all others, tied or not; padding is no response."""
    found = metrics_of([[0, 1], [0, 0], [0, 1, 2, 3]], [[-3, -1], [-1, -2], [-1, -2, -3, -7]])
    assert found["margins"] == [-3 - -1, -1 - -2, -1 - -(2 + 3 + 7) / 3]


NUMBERS = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=5)


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=4), st.data())
def test_equal_the_loop_over_pairs(numbers: list[list[float]], data: st.DataObject) -> None:
    ranks = [data.draw(st.lists(st.integers(0, 3), min_size=len(row), max_size=len(row))) for row in numbers]
    found = metrics_of(ranks, numbers)
    accuracies = [oracles.ranking_accuracy(row, r) for row, r in zip(numbers, ranks, strict=True)]
    assert found["accuracies"] == pytest.approx([-1 if a is None else a for a in accuracies], rel=1e-12)
    assert found["margins"] == pytest.approx([row[0] - sum(row[1:]) / (len(row) - 1) for row in numbers], rel=1e-12)


def test_a_response_without_tokens_has_a_mean_of_0() -> None:
    given = batch([Group([0.0, -3.0], [0, 2], [0, 1], [0.0] * 2, [0.0] * 2, [0.0] * 2)])
    means = Ranked.of(given).mean_logps
    assert means.tolist() == [[0, -3 / 2]]
    assert gradient_of(means, given.sum_logps) == [1, 1 / 2]


def test_metrics_carry_no_gradient() -> None:
    samples = ranked(*LISTS)
    scores: Tensor = samples.mean_logps
    assert scores.requires_grad
    assert not any(metric.values.requires_grad for metric in samples.ranking_metrics(scores).values())
