"""Losses: tensors in, tensors out. This room imports torch and nothing else.

Axes: B sequences of a batch, N tokens that are predicted and counted, D hidden size, V vocabulary, M references, G
samples (groups), C responses of a sample (candidates).
"""

from poft_plugin.losses.distribution import distribution_reward, distribution_scores
from poft_plugin.losses.dpo import dpo_loss, dpo_rewards
from poft_plugin.losses.head import LanguageModel, install_response_forward, language_model
from poft_plugin.losses.logps import (
    LogitTransform,
    plain_token_logps,
    token_logps,
)
from poft_plugin.losses.poft import poft_coefficient, poft_loss
from poft_plugin.losses.positions import response_positions
from poft_plugin.losses.pro import pro_loss
from poft_plugin.losses.rrhf import rrhf_loss
from poft_plugin.losses.sequences import mean_logps, sum_logps
from poft_plugin.losses.sft import sft_loss

__all__ = [
    "LanguageModel",
    "LogitTransform",
    "distribution_reward",
    "distribution_scores",
    "dpo_loss",
    "dpo_rewards",
    "install_response_forward",
    "language_model",
    "mean_logps",
    "plain_token_logps",
    "poft_coefficient",
    "poft_loss",
    "pro_loss",
    "response_positions",
    "rrhf_loss",
    "sft_loss",
    "sum_logps",
    "token_logps",
]
