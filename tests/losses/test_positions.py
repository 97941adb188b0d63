"""The shift and the mask: where counted tokens are predicted, with whole sequences and with shared prompts."""

from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poft_plugin.losses import response_positions

X = -100


@pytest.mark.parametrize(
    ("labels", "sequences", "expected"),
    [
        pytest.param([[X, X, 7, 8]], [[0, 0, 0, 0]], ([1, 2], [7, 8], [0, 0]), id="one-sequence"),
        pytest.param([[5, 6, X, 8]], [[0, 0, 0, 0]], ([0, 2], [6, 8], [0, 0]), id="label-on-the-first-token"),
        pytest.param([[X, 4, 5, 6, X]], [[0, 0, 1, 1, 1]], ([0, 2], [4, 6], [0, 1]), id="packed"),
        pytest.param([[X, 4, X, X], [X, 5, 6, 7]], [[0, 0, -1, -1], [1, 1, 1, 1]],
                     ([0, 4, 5, 6], [4, 5, 6, 7], [0, 1, 1, 1]), id="padded-right"),
        pytest.param([[X, X, 3, 4], [X, 5, 6, 7]], [[-1, -1, 0, 0], [1, 1, 1, 1]],
                     ([2, 4, 5, 6], [4, 5, 6, 7], [0, 1, 1, 1]), id="padded-left"),
        pytest.param([[4, 9, 9, 9]], [[0, -1, -1, -1]], ([], [], []), id="labels-on-padding"),
        pytest.param([[X, X]], [[0, 0]], ([], [], []), id="nothing-counts"),
        pytest.param([[1], [2]], [[0], [1]], ([], [], []), id="one-token-a-row"),
    ],
)  # fmt: skip
def test_response_positions_by_hand(labels: Any, sequences: Any, expected: Any) -> None:
    found = response_positions(torch.tensor(labels), torch.tensor(sequences))
    assert tuple(t.tolist() for t in found) == expected


@settings(deadline=None)
@given(st.data())
def test_response_positions_equal_the_loop(data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    label = st.sampled_from([-100, 3, 4])
    labels = [data.draw(st.lists(label, min_size=length, max_size=length)) for _ in range(rows)]
    sequences, number = [], 0
    for _ in range(rows):
        lengths = data.draw(st.lists(st.integers(1, 4), max_size=4).filter(lambda n: sum(n) <= length))
        members = [i for i, n in enumerate(lengths, start=number) for _ in range(n)]
        padding = [-1] * (length - len(members))
        sequences.append(padding + members if data.draw(st.booleans()) else members + padding)
        number += len(lengths)
    found = response_positions(torch.tensor(labels), torch.tensor(sequences))
    expected = oracles.response_positions(labels, sequences)
    assert torch.stack(found, -1).tolist() == expected


@pytest.mark.parametrize(
    ("labels", "sequences", "positions", "expected"),
    [
        pytest.param([[X, X, 7, 8, 5, 6, X, 4]], [[0, 0, 0, 0, 1, 1, 2, 2]], [[0, 1, 2, 3, 2, 3, 2, 3]],
                     ([1, 2, 1, 4, 6], [7, 8, 5, 6, 4], [0, 0, 1, 1, 2]), id="three-responses"),
        pytest.param([[X, 7, 5, X, 6, 8]], [[0, 0, 1, 2, 2, 3]], [[0, 1, 1, 0, 1, 1]],
                     ([0, 0, 3, 3], [7, 5, 6, 8], [0, 1, 2, 3]), id="two-groups-prompts-of-one"),
        pytest.param([[X, 4, 3, 9], [X, 5, 6, 7]], [[0, 0, 1, -1], [2, 2, 2, 3]], [[0, 1, 1, 0], [0, 1, 2, 1]],
                     ([0, 0, 4, 5, 4], [4, 3, 5, 6, 7], [0, 1, 2, 2, 3]), id="rows-padded-right"),
        pytest.param([[9, 9, X, 4, 3]], [[-1, -1, 0, 0, 1]], [[0, 1, 0, 1, 1]],
                     ([2, 2], [4, 3], [0, 1]), id="padded-left"),
        pytest.param([[5, 6, 5, 6]], [[0, 0, 1, 1]], [[0, 1, 0, 1]], ([0, 2], [6, 6], [0, 1]), id="nothing-shared"),
    ],
)  # fmt: skip
def test_shared_prompts_by_hand(labels: Any, sequences: Any, positions: Any, expected: Any) -> None:
    found = response_positions(torch.tensor(labels), torch.tensor(sequences), torch.tensor(positions))
    assert tuple(t.tolist() for t in found) == expected


@settings(deadline=None)
@given(st.data())
def test_shared_prompts_equal_the_loop(data: st.DataObject) -> None:
    """Targets are those of whole sequences, and each is predicted where the token before it lies."""
    whole: list[tuple[list[int], list[int]]] = []  # the places of a sequence's tokens, and their labels
    labels, sequences, positions = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        prompt, begin = data.draw(st.integers(1, 3)), len(labels)
        for response in range(data.draw(st.integers(1, 4))):
            own = data.draw(st.lists(st.sampled_from([X, 3, 4]), min_size=1, max_size=3))
            before = prompt if response == 0 else 0
            places = [*range(begin, begin + prompt), *range(len(labels) + before, len(labels) + before + len(own))]
            labels += [X] * before + own
            positions += list(range(prompt - before, prompt + len(own)))
            sequences += [len(whole)] * (before + len(own))
            whole.append((places, [X] * prompt + own))
    found = response_positions(torch.tensor([labels]), torch.tensor([sequences]), torch.tensor([positions]))
    expected = [
        [places[t - 1], counted[t], number]
        for number, (places, counted) in enumerate(whole)
        for t in range(1, len(places))
        if counted[t] != X
    ]
    assert torch.stack(found, -1).tolist() == expected
