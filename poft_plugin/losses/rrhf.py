"""RRHF: rank responses by how likely the policy finds them, with a hinge on every pair in the wrong order.

Axes: G samples (groups), C responses of a sample (candidates), padded. Log-probabilities are natural logs (nats),
averaged over the response tokens.
Papers: Yuan et al., "RRHF: Rank Responses to Align Language Models with Human Feedback" (arXiv:2304.05302); equation
numbers are those of the DEFT paper, which restates it.
"""

import torch
from torch import Tensor


def rrhf_loss(mean_logps: Tensor, mask: Tensor, *, ranks: Tensor | None = None) -> Tensor:
    r"""Ranking loss per sample, `sum over pairs of max(0, s_worse - s_better)` (Eq. 8, `s` from Eq. 7).

    Args:
        mean_logps: `(G, C)`, nats per token: `s`, best response first, padded. Carries the gradient.
        mask: `(G, C)` booleans, True where there is a response. What stands elsewhere has no influence.
        ranks: `(G, C)`, 0 for the best; equal numbers are ties. By default the position.

    Returns:
        `(G,)`, nats per token, not reduced. A sample without a pair gets 0.

    Raises:
        ValueError: if shapes differ or the mask is not boolean.

    Examples:
        >>> rrhf_loss(torch.tensor([[-2.0, -1.0, -4.0]]), torch.ones(1, 3, dtype=torch.bool)).tolist()
        [1.0]

    The paper leaves ties open: here tied responses form no pair. The SFT term (Eq. 9) is not part of it.
    """
    pairs = better_and_worse(mean_logps, mask, ranks)
    known = mean_logps.masked_fill(~mask, 0)
    excess = torch.relu(known[:, None, :] - known[:, :, None])
    return excess.masked_fill(~pairs, 0).sum((1, 2))


def better_and_worse(mean_logps: Tensor, mask: Tensor, ranks: Tensor | None = None) -> Tensor:
    r"""Which pairs of a sample's responses are in order: `[g, k, i]` is True where i is ranked strictly below k.

    Args:
        mean_logps: `(G, C)`; only its shape counts.
        mask: `(G, C)` booleans, True where there is a response.
        ranks: `(G, C)`, 0 for the best; equal numbers are ties. By default the position.

    Returns:
        `(G, C, C)` booleans.

    Raises:
        ValueError: if shapes differ or the mask is not boolean.

    Examples:
        >>> mask = torch.tensor([[True, True, False]])
        >>> better_and_worse(torch.zeros(1, 3), mask).nonzero().tolist()
        [[0, 0, 1]]
    """
    if mean_logps.ndim != 2 or mask.shape != mean_logps.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mean_logps {tuple(mean_logps.shape)}, mask {tuple(mask.shape)} of {mask.dtype}: expected (G, C) both, "
            "and a mask of torch.bool"
        )
    if ranks is None:
        ranks = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    if ranks.shape != mask.shape:
        raise ValueError(f"ranks {tuple(ranks.shape)}: expected the shape of mean_logps, {tuple(mask.shape)}")
    there = mask[:, :, None] & mask[:, None, :]
    return there & (ranks[:, None, :] > ranks[:, :, None])
