"""Preference ranking optimization (PRO): each response, best first, has to beat all that are ranked below it.

Axes: G samples (groups), C responses of a sample (candidates), padded. Log-probabilities are natural logs (nats),
averaged over the response tokens.
Papers: Song et al., "Preference Ranking Optimization for Human Alignment" (AAAI 2024, arXiv:2306.17492); equation
numbers are those of the DEFT paper, which restates it.
"""

from math import inf

import torch
from torch import Tensor
from torch.nn.functional import pad

from poft_plugin.losses.rrhf import better_and_worse


def pro_loss(mean_logps: Tensor, mask: Tensor, *, ranks: Tensor | None = None, rewards: Tensor | None = None) -> Tensor:
    r"""PRO's loss per sample, `-sum_k log( exp(s_k) / sum_{i >= k} exp(s_i) )`, best response first (Eq. 11).

    With `rewards` it is the form that PRO's authors released, where a rival counts the more the further it is below:
    `-sum_k log( e^{s_k T_k} / (e^{s_k T_k} + sum_i e^{s_i (r_k - r_i)}) )`, `T_k` the largest `r_k - r_i`, i over the
    rivals of k.

    Args:
        mean_logps: `(G, C)`, nats per token: `s`, padded. Carries the gradient.
        mask: `(G, C)` booleans, True where there is a response. What stands elsewhere has no influence.
        ranks: `(G, C)`, 0 for the best; equal numbers are ties. By default the position.
        rewards: `(G, C)`, the reward model's scores `r`, or None for Eq. 11. Treated as constants.

    Returns:
        `(G,)`, dimensionless, not reduced. A sample with one response or none gets 0.

    Raises:
        ValueError: if shapes differ or the mask is not boolean.

    Examples:
        >>> loss = pro_loss(torch.full((1, 3), -2.0), torch.ones(1, 3, dtype=torch.bool))
        >>> bool(torch.isclose(loss, torch.tensor(3.0 * 2.0).log()).all())
        True

    The papers leave ties open. Here the rivals of a response are those ranked strictly below it, and with `rewards`
    also rewarded strictly less: a negative temperature would reward the response for being unlikely. A round without
    rivals gives 0. The SFT term (Eq. 12) is not part of it.
    """
    rivals = better_and_worse(mean_logps, mask, ranks)
    known = mean_logps.masked_fill(~mask, 0)
    own, others = known, known[:, None, :]
    if rewards is not None:
        gaps = _reward_gaps(rewards, mask)
        rivals = rivals & (gaps > 0)
        gaps = gaps.masked_fill(~rivals, 0).to(known.dtype)
        own, others = known * pad(gaps, (0, 1)).amax(-1), others * gaps
    behind = (others - own[:, :, None]).masked_fill(~rivals, -inf)
    # the padding is the response itself, 0 behind: no row is without a finite number, so no gradient is nan
    return torch.logsumexp(pad(behind, (0, 1)), -1).sum(-1)


def _reward_gaps(rewards: Tensor, mask: Tensor) -> Tensor:
    """`[g, k, i]`: by how much the reward of k is above that of i."""
    if rewards.shape != mask.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)}: expected the shape of mean_logps, {tuple(mask.shape)}")
    known = rewards.detach().masked_fill(~mask, 0)
    return known[:, :, None] - known[:, None, :]
