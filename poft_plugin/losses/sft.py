"""The SFT loss of DEFT's baselines: the best response's log-probability, summed over its tokens.

Axes: G samples. Log-probabilities are natural logs (nats).
Paper: DEFT, Eq. 9.
"""

from torch import Tensor


def sft_loss(sum_logps: Tensor) -> Tensor:
    r"""Per-sample SFT loss, `L_sft = - sum_t log p(y_1,t | x, y_1,<t)` (Eq. 9): a sum over tokens, not a mean.

    Args:
        sum_logps: `(G,)`, nats: the log-probability of each sample's best response, summed. Carries the gradient.

    Returns:
        `(G,)`, nats, not reduced.

    Examples:
        >>> import torch
        >>> sft_loss(torch.tensor([-3.0])).tolist()
        [3.0]
    """
    return -sum_logps
