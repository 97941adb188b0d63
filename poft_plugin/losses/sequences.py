"""Sums and means of token log-probabilities over the sequences that they belong to.

Axes: N tokens, B sequences. Log-probabilities are natural logs (nats).
"""

import torch
from torch import Tensor


def sum_logps(logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    r"""Per-sequence log-probability `sum_t logp_t` and token count `T` from flat token values.

    Args:
        logps: `(N,)`, nats. Carries gradient.
        sequence_ids: `(N,)`, the sequence (0 .. num_sequences - 1) that each token belongs to.
        num_sequences: B.

    Returns:
        `(B,)` sums in nats, and `(B,)` counts (same dtype). A sequence without tokens gets 0 and 0.

    Examples:
        >>> sums, counts = sum_logps(torch.tensor([-1.0, -3.0, -5.0]), torch.tensor([0, 0, 1]), 2)
        >>> sums.tolist(), counts.tolist()
        ([-4.0, -5.0], [2.0, 1.0])
    """
    sums = logps.new_zeros(num_sequences).index_add(0, sequence_ids, logps)
    return sums, logps.new_zeros(num_sequences).index_add(0, sequence_ids, torch.ones_like(logps))


def mean_logps(logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    r"""Per-sequence mean log-probability `(1 / T) * sum_t logp_t` and token count `T` from flat token values.

    Args:
        logps: `(N,)`, nats. Carries gradient.
        sequence_ids: `(N,)`, the sequence (0 .. num_sequences - 1) that each token belongs to.
        num_sequences: B.

    Returns:
        `(B,)` means in nats per token, and `(B,)` counts (same dtype). A sequence without tokens gets mean 0, count 0.

    Examples:
        >>> means, counts = mean_logps(torch.tensor([-1.0, -3.0, -5.0]), torch.tensor([0, 0, 1]), 2)
        >>> means.tolist(), counts.tolist()
        ([-2.0, -5.0], [2.0, 1.0])
    """
    sums, counts = sum_logps(logps, sequence_ids, num_sequences)
    return sums / counts.clamp(min=1), counts
