"""Training stops before the optimizer moves where a loss or a gradient is not finite, on every rank at once.

A loss is looked at before the last backward pass of an optimizer step, since DeepSpeed's engine moves the weights from
within that pass. A gradient is looked at when the optimizer is about to move. Where a loss scaler (fp16) finds that
gradients overflow, it leaves the step out by itself: that is no error.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

NAMED = 10
"""Rows that a message names."""


class FiniteSteps:
    """Watches over the losses and gradients of one optimizer step after the other.

    Args:
        accelerator: of the trainer.
        name_row: from a row index to `data set row number (key ...)`.
    """

    def __init__(self, accelerator: Accelerator, name_row: Callable[[int], str]) -> None:
        self._accelerator, self._name_row = accelerator, name_row
        self._losses: list[Tensor] = []
        self._rows: list[int] = []
        self._closed = True

    def add(self, losses: Tensor, rows: Sequence[int]) -> None:
        """Notes a micro-batch: `(G,)` losses and the row of each. The first of a step forgets the step before."""
        if self._closed:
            self._losses, self._rows, self._closed = [], [], False
        self._losses.append(losses.detach())
        self._rows += rows

    def check_losses(self, step: int) -> None:
        """Closes the step; every rank calls it before the step's last backward pass.

        Args:
            step: of the optimizer, for the message.

        Raises:
            ValueError: on every rank, naming the rows, if a loss of any rank is not finite.
        """
        self._closed = True
        losses = torch.cat(self._losses)
        if self._finite_everywhere(losses):
            return
        values = zip(self._rows, losses.tolist(), strict=True)
        found = [f"{self._name_row(row)}: {value}" for row, value in values if not math.isfinite(value)]
        self._stop(step, "a loss is not finite", "Rows with such a loss", found)

    def check_gradients(self, step: int, gradients: Sequence[Tensor]) -> None:
        """Looks at what the optimizer is about to apply; every rank calls it equally often.

        Args:
            step: of the optimizer, for the message.
            gradients: of this rank, or their norm.

        Raises:
            ValueError: on every rank, naming the rows of the step, if a gradient of any rank is not finite.
        """
        if not self._finite_everywhere(get_total_norm(gradients, norm_type=math.inf)):
            self._stop(step, "a gradient is not finite", "Rows of the step", list(map(self._name_row, self._rows)))

    def _finite_everywhere(self, values: Tensor) -> bool:
        bad = (~values.isfinite()).any().float().to(self._accelerator.device)
        if self._accelerator.num_processes > 1:
            bad = self._accelerator.reduce(bad, reduction="sum")
        return not bad.item()

    def _stop(self, step: int, what: str, whose: str, named: Sequence[str]) -> None:
        everywhere = gather_object(list(named)) if self._accelerator.num_processes > 1 else named
        rows = list(dict.fromkeys(everywhere))
        more = f"; and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        raise ValueError(
            f"step {step}: {what}; training stops before the optimizer moves, and saves nothing. {whose}: "
            f"{'; '.join(rows[:NAMED])}{more}. If they look right, lower `learning_rate`, or train in bf16 or float32 "
            "instead of fp16. Checkpoints of earlier steps are untouched"
        )


class BeforeOptimizer(TrainerCallback):
    """Calls a function before the optimizer moves, whatever stands between it and the trainer.

    DeepSpeed's engine may ask it several times a step, for a part of the parameters each.

    Args:
        call: gets the optimizer at the bottom of all wrappers.
    """

    def __init__(self, call: Callable[[torch.optim.Optimizer], None]) -> None:
        self._call = call

    def on_train_begin(self, *_: Any, **known: Any) -> None:
        """Registers the function; by now there is an optimizer."""
        optimizer = known["optimizer"]
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        optimizer.register_step_pre_hook(lambda inner, *_: self._call(inner))
