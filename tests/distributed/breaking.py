"""A plugin of the tests that lets the last rank compute what is not a number, from the second optimizer step on."""

import os
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from torch import Tensor, nn
from transformers import TrainerCallback


class BreakingPlugin(BasePlugin):  # type: ignore[misc]
    """Spoils the hidden states of the last rank."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [_Break()]


class _Break(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 1 and os.environ["RANK"] == "1":
            norm = next(part for name, part in model.named_modules() if name.endswith("model.norm"))
            norm.register_forward_hook(_spoil)


def _spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * torch.nan
