"""Callbacks of the host's trainer."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback


class LogOnce(TrainerCallback):
    """Logs numbers when training begins.

    Args:
        trainer: whose log they go to.
        numbers: what to log.
    """

    def __init__(self, trainer: Any, numbers: Mapping[str, float]) -> None:
        self._trainer, self._numbers = trainer, dict(numbers)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Logs, once."""
        if self._numbers:
            self._trainer.log(self._numbers)
            self._numbers = {}
