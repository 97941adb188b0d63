"""Where the counted tokens of a batch are predicted: the shift and the mask, in one place.

Axes: R rows and L tokens of a batch, N predicted tokens.
"""

import torch
from torch import Tensor

from poft_plugin.losses.logps import IGNORED


def response_positions(
    labels: Tensor, sequence_ids: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Where the counted tokens of a batch are predicted.

    A counted token at position t of its sequence is predicted by the hidden state at t - 1 of the *same* sequence; the
    first token of a sequence is predicted by nothing and never counts.

    With position ids, sequences may share a prompt that lies in the batch once: a sequence whose first token has
    position P > 0 goes on from the first P tokens of the last sequence before it that begins at position 0. Its first
    token is then predicted by the last of those, and counts as its label says.

    Args:
        labels: `(R, L)` token ids, -100 where a token does not count.
        sequence_ids: `(R, L)` number of the sequence that each token belongs to, -1 on padding. A shared prompt bears
            the number of the sequence that it lies in.
        position_ids: `(R, L)` position of each token in its sequence, or None where every sequence is whole.

    Returns:
        `(N,)` positions in the flattened `(R * L)` hidden states, `(N,)` target ids, `(N,)` sequence numbers.

    Examples:
        >>> labels, sequences = torch.tensor([[-100, 7, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
        >>> [t.tolist() for t in response_positions(labels, sequences)]
        [[0, 2], [7, 6], [0, 1]]
        >>> [t.tolist() for t in response_positions(labels, sequences, torch.tensor([[0, 1, 1, 2]]))]
        [[0, 0, 2], [7, 5, 6], [0, 1, 1]]
    """
    begins = torch.ones_like(sequence_ids, dtype=torch.bool)
    begins[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    here = torch.arange(labels.numel(), device=labels.device).view_as(labels)
    before, predicted = here - 1, ~begins
    if position_ids is not None:
        whole = torch.where(begins & (position_ids == 0), here, 0).flatten().cummax(0).values.view_as(here)
        goes_on = begins & (position_ids > 0)
        before, predicted = torch.where(goes_on, whole + position_ids - 1, before), predicted | goes_on
    counted = (labels != IGNORED) & (sequence_ids >= 0) & predicted
    return before[counted], labels[counted], sequence_ids[counted]
