"""Losses: tensors in, tensors out. This room imports torch and nothing else.

Axes: B sequences of a batch, N tokens that are predicted and counted, D hidden size, V vocabulary, M references.
"""

from poft_plugin.losses.head import LanguageModel, install_response_forward, language_model
from poft_plugin.losses.logps import (
    LogitTransform,
    mean_logps,
    plain_token_logps,
    response_positions,
    token_logps,
)
from poft_plugin.losses.poft import poft_coefficient, poft_loss

__all__ = [
    "LanguageModel",
    "LogitTransform",
    "install_response_forward",
    "language_model",
    "mean_logps",
    "plain_token_logps",
    "poft_coefficient",
    "poft_loss",
    "response_positions",
    "token_logps",
]
