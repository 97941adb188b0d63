"""Axolotl inside the test's own process: one configuration after the other, with the trainer kept for inspection."""

import gc
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.integrations.base import BasePlugin, PluginManager
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback, set_seed

CAPABILITIES = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "compute_capability": None}


@dataclass
class Recording:
    """What a training run did."""

    trainer: Any = None
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    initial: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def logs(self) -> list[dict[str, float]]:
        """The log of each logged step."""
        return [entry for entry in self.trainer.state.log_history if "loss" in entry]

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """The log of each evaluation."""
        return [entry for entry in self.trainer.state.log_history if "eval_loss" in entry]


class RecorderPlugin(BasePlugin):
    """An Axolotl plugin of the tests: keeps the trainer and the gradients of every optimizer step."""

    recording = Recording()

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Keeps the trainer. An adapter begins at random: from the seed, whatever was drawn before it was made."""
        set_seed(cfg.seed)
        for module in trainer.model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", init_lora_weights=True)
        type(self).recording = Recording(trainer)
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        type(self).recording.initial = weights

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Keeps gradients."""
        return [_Gradients(type(self))]


class _Gradients(TrainerCallback):
    def __init__(self, owner: type[RecorderPlugin]) -> None:
        self._owner = owner

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        named = model.named_parameters()
        gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
        self._owner.recording.gradients.append(gradients)


def forget_plugins() -> None:
    """Starts from no plugins: the host keeps those of an earlier config, and its modules keep the manager."""
    PluginManager.get_instance().plugins.clear()


def load_config(path: Path, **overrides: Any) -> Any:
    """The host's own loading of a config file, with fresh plugins."""
    from axolotl.cli.config import load_cfg

    forget_plugins()
    return load_cfg(str(path), **overrides)


def train(path: Path, **overrides: Any) -> Recording:
    """`axolotl train` on a config, in this process."""
    from axolotl.cli.train import do_train

    cfg = load_config(path, **overrides)
    # the host collects garbage at every packing (half a second over all that tests have imported): let it find little
    gc.collect()
    gc.freeze()
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        do_train(cfg, TrainerCliArgs())
    finally:  # an interrupt of the tests would make the host's handler write this model into `./out`, wherever that is
        signal.signal(signal.SIGINT, interrupt)
    return RecorderPlugin.recording


def preprocess(path: Path, monkeypatch: Any) -> None:
    """`axolotl preprocess` on a config, in this process."""
    from axolotl.cli.preprocess import do_cli

    forget_plugins()
    monkeypatch.setenv("AXOLOTL_IS_PREPROCESS", "1")
    do_cli(str(path))
    monkeypatch.delenv("AXOLOTL_IS_PREPROCESS")


def counting(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """A function that notes the arguments of each call."""
    calls: list[Any] = []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    return wrapper, calls
