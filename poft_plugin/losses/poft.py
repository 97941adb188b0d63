"""Preference-oriented supervised fine-tuning (PoFT): the loss and the weight that it gives to a row.

Axes: B sequences. All log-probabilities are natural logs (nats), averaged over the response tokens of their own model.
Paper: Fan et al., "Preference-Oriented Supervised Fine-Tuning: Favoring Target Model Over Aligned Large Language
Models" (AAAI 2025, arXiv:2412.12865).
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def poft_loss(policy_logp: Tensor, reference_logp: Tensor, *, beta: float = 1.0, gamma: float = 0.0) -> Tensor:
    r"""Per-sample PoFT loss, `-log sigmoid(beta * (policy_logp - reference_logp) + gamma)` (Eq. 6, from Eq. 5).

    Args:
        policy_logp: `(B,)`, nats per token: the policy's mean log-probability of each response. Carries the gradient.
        reference_logp: `(B,)`, nats per token: the mean over the M references of the same quantity, each under its
            own tokenizer and chat template. Treated as a constant.
        beta: scale of the difference, dimensionless; the paper's form is 1.
        gamma: margin in logits; a negative one asks the policy to win by more. The paper's form is 0.

    Returns:
        `(B,)`, dimensionless, not reduced.

    Raises:
        ValueError: if the two shapes differ.

    Examples:
        >>> poft_loss(torch.tensor([-1.0]), torch.tensor([-1.0])).item() == torch.tensor(2.0).log().item()
        True

    Departs from the paper in nothing at the defaults; `beta` and `gamma` generalise it.
    """
    return -logsigmoid(_margin(policy_logp, reference_logp, beta, gamma))


def poft_coefficient(policy_logp: Tensor, reference_logp: Tensor, *, beta: float = 1.0, gamma: float = 0.0) -> Tensor:
    r"""How much of the SFT gradient a row contributes, `beta * sigmoid(-(beta * (policy - reference) + gamma))`.

    The gradient of `poft_loss` is the gradient of the length-normalised SFT loss times this number. At `beta = 1`,
    `gamma = 0` it is Eq. 8's `tau = exp(reference) / (exp(reference) + exp(policy))`.

    Args:
        policy_logp: `(B,)`, nats per token. No gradient flows from the result.
        reference_logp: `(B,)`, nats per token.
        beta: as in `poft_loss`.
        gamma: as in `poft_loss`.

    Returns:
        `(B,)`, between 0 and `beta`.

    Raises:
        ValueError: if the two shapes differ.

    Examples:
        >>> poft_coefficient(torch.tensor([-1.0]), torch.tensor([-1.0])).item()
        0.5
    """
    return beta * torch.sigmoid(-_margin(policy_logp, reference_logp, beta, gamma)).detach()


def _margin(policy_logp: Tensor, reference_logp: Tensor, beta: float, gamma: float) -> Tensor:
    if policy_logp.shape != reference_logp.shape:
        raise ValueError(
            f"policy_logp {tuple(policy_logp.shape)} and reference_logp {tuple(reference_logp.shape)} must have the "
            "same shape: one number per sequence"
        )
    return beta * (policy_logp - reference_logp.detach()) + gamma
