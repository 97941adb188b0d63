"""Direct preference optimization (DPO) and its relatives: the chosen response against the rejected one.

Axes: G samples (groups), 2 responses of a sample: chosen, rejected. Log-probabilities are natural logs (nats), summed
over the response tokens.
Papers: Rafailov et al., "Direct Preference Optimization" (NeurIPS 2023, arXiv:2305.18290), equation numbers as in the
DEFT paper, which restates it. Hinge: Zhao et al., SLiC-HF (arXiv:2305.10425). IPO: Azar et al. (arXiv:2310.12036).
Robust DPO: Chowdhury et al. (arXiv:2403.00409).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust")


def dpo_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_types: Sequence[str] = ("sigmoid",),
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    num_tokens: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    r"""Weighted sum of losses of `d = log(pi / pi_ref)(chosen) - log(pi / pi_ref)(rejected)` (Eq. 5, 6).

    - `sigmoid`: `-log sigmoid(beta d)`, DPO itself (Eq. 5)
    - `hinge`: `max(0, 1 - beta d)`
    - `ipo`: `(d' - 1 / (2 beta))^2`, d' the same difference of log-ratios *per token* of each response
    - `robust`: `(-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e)`, e the label smoothing

    A pair of equal ranks prefers neither: its d is 0, whatever the policy says, and it has no gradient.

    Args:
        policy_logps: `(G, 2)`, nats: the policy's log-probabilities of the chosen and the rejected response, sums over
            their tokens. Carries the gradient.
        reference_logps: `(G, 2)`, nats: the same of the reference model. Treated as a constant.
        beta: how dear it is to leave the reference; above 0.
        loss_types: one or more of the above.
        loss_weights: a factor for each; by default 1 each.
        label_smoothing: `robust`'s share of pairs that are labelled the wrong way round, in `[0, 0.5)`.
        num_tokens: `(G, 2)` response tokens, for `ipo`; a response without any counts as one.
        ranks: `(G, 2)`, 0 for the better response; equal numbers are a tie. None where no pair is one.

    Returns:
        `(G,)`, dimensionless, not reduced.

    Raises:
        ValueError: if a shape does not fit, a setting is out of its range, or one would have no effect.

    Examples:
        >>> logps = torch.tensor([[-9.0, -7.0]])
        >>> bool(torch.isclose(dpo_loss(logps, logps), torch.tensor(2.0).log()).all())
        True

        >>> bool(torch.isclose(dpo_loss(2 * logps, logps, ranks=torch.zeros(1, 2)), torch.tensor(2.0).log()).all())
        True

    Departs from the DPO paper in nothing at the defaults, which has no ties.
    """
    weights = [1.0] * len(loss_types) if loss_weights is None else list(loss_weights)
    _check_settings(beta, loss_types, weights, label_smoothing)
    log_ratios = _log_ratios(policy_logps, reference_logps.detach())
    losses = torch.zeros_like(log_ratios[:, 0])
    for name, weight in zip(loss_types, weights, strict=True):
        scores = _per_token(log_ratios, num_tokens) if name == "ipo" else log_ratios
        margins = _without_ties(scores[:, 0] - scores[:, 1], ranks)
        losses = losses + weight * _loss(name, margins, beta, label_smoothing)
    return losses


def dpo_rewards(policy_logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    r"""DPO's implicit rewards, `beta * log(pi / pi_ref)` of each response, for the log: Eq. 6 is their difference.

    Args:
        policy_logps: `(G, 2)`, nats: sums over the tokens of the chosen and the rejected response. No gradient flows.
        reference_logps: `(G, 2)`, nats: the same of the reference model.
        beta: as in `dpo_loss`.

    Returns:
        `(G, 2)`, dimensionless, detached: chosen, rejected.

    Raises:
        ValueError: if a shape does not fit.

    Examples:
        >>> dpo_rewards(torch.tensor([[-4.0, -9.0]]), torch.tensor([[-6.0, -8.0]]), beta=0.5).tolist()
        [[1.0, -0.5]]
    """
    return beta * _log_ratios(policy_logps, reference_logps).detach()


def _log_ratios(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    if policy_logps.shape != reference_logps.shape or policy_logps.shape[1:] != (2,):
        raise ValueError(
            f"policy_logps {tuple(policy_logps.shape)} and reference_logps {tuple(reference_logps.shape)}: expected "
            "(G, 2) both: chosen, rejected"
        )
    return policy_logps - reference_logps


def _without_ties(margins: Tensor, ranks: Tensor | None) -> Tensor:
    if ranks is None:
        return margins
    if ranks.shape != (len(margins), 2):
        raise ValueError(f"ranks: {tuple(ranks.shape)}; expected (G, 2) = {(len(margins), 2)}")
    return margins.masked_fill(ranks[:, 0] == ranks[:, 1], 0.0)


def _per_token(log_ratios: Tensor, num_tokens: Tensor | None) -> Tensor:
    if num_tokens is None or num_tokens.shape != log_ratios.shape:
        shape = None if num_tokens is None else tuple(num_tokens.shape)
        raise ValueError(
            f"num_tokens: {shape}; the loss type ipo needs (G, 2) = {tuple(log_ratios.shape)} token counts"
        )
    return log_ratios / num_tokens.clamp(min=1)


def _loss(name: str, margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    if name == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    if name == "hinge":
        return torch.relu(1 - beta * margin)
    if name == "sigmoid":
        return -logsigmoid(beta * margin)
    assert name == "robust"
    right, wrong = logsigmoid(beta * margin), logsigmoid(-beta * margin)
    return (label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)


def _check_settings(
    beta: float, loss_types: Sequence[str], loss_weights: Sequence[float], label_smoothing: float
) -> None:
    if not beta > 0:
        raise ValueError(f"beta: {beta}; above 0")
    unknown = [name for name in loss_types if name not in LOSS_TYPES]
    if unknown or not loss_types:
        raise ValueError(f"loss_types: {unknown or list(loss_types)}; one or more of {', '.join(LOSS_TYPES)}")
    if len(loss_weights) != len(loss_types):
        raise ValueError(
            f"loss_weights: {list(loss_weights)}; one number for each of the loss types {', '.join(loss_types)}"
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: {label_smoothing}; at least 0 and below 0.5")
    if label_smoothing and "robust" not in loss_types:
        raise ValueError(
            f"label_smoothing: {label_smoothing}; only the loss type robust uses it, {', '.join(loss_types)} would "
            "ignore it. Add robust, or set it to 0"
        )
