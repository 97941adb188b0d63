"""Dropout off, wherever it is, and a model that answers the same way twice.

DPO's reference is scored without dropout. With it, policy and reference would differ before the first step, and a share
of the gradient would be noise. The model stays in training mode: gradient checkpointing and adapters look at that.
"""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel

from poft_plugin.losses.head import unwrapped

RANDOM = re.compile(r"drop|jitter")
"""Names of numbers that models hand to functions of chance: `attention_dropout`, `resid_pdrop`, `drop_path_rate`,
`layerdrop`, `jitter_noise`."""

PROBE_TOKENS = 24
NOISE = 32
"""Units of the last place that two runs of one kernel may differ by: sums may be taken in another order."""


def disable_dropout(model: nn.Module) -> None:
    """Sets every probability of leaving something out to 0: of modules, and of numbers that modules hand on.

    Layers that look into the config while they run (Persimmon's attention) get a copy of it: the model's own is saved
    with its weights, as it was. Whoever changes the attention implementation has to do so before.

    Args:
        model: the policy, with its adapters.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _set_to_zero(module)
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
            if id(config) not in copies:
                copies[id(config)] = copy.copy(config)
                _set_to_zero(copies[id(config)])
            module.config = copies[id(config)]


def check_no_chance(model: nn.Module, vocabulary: int, device: torch.device) -> None:
    """Compares what a model answers in training mode with what it answers in evaluation mode, on a few tokens.

    Every rank has to call it together where the model is sharded.

    Args:
        model: a model on which `install_response_forward` was called, wrapped or not.
        vocabulary: ids are drawn below it.
        device: where the model's inputs go.

    Raises:
        ValueError: if they differ: something is left to chance that `disable_dropout` does not know.
    """
    was_training = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        trained, expected = (_answer(model, vocabulary, device, training=mode) for mode in (True, False))
    model.train(was_training)
    worst, scale = float((trained - expected).abs().max()), max(1.0, float(expected.abs().max()))
    if not worst <= NOISE * torch.finfo(_dtype(model)).eps * scale:
        inner = unwrapped(model)
        raise ValueError(
            f"{type(inner).__name__}: in training its log-probabilities of the same tokens differ from those in "
            f"evaluation by {worst:.3g} nats, though every dropout that is known here is off. DPO's reference is "
            f"scored without it. {_suspects(inner)}"
        )


def _answer(model: nn.Module, vocabulary: int, device: torch.device, *, training: bool) -> Tensor:
    model.train(training)  # DeepSpeed's engine does not return itself
    ids = torch.arange(1, PROBE_TOKENS + 1, device=device)[None] % vocabulary
    positions = torch.arange(PROBE_TOKENS - 1, device=device)
    with torch.no_grad():
        answer = model(input_ids=ids, response_positions=positions, response_targets=ids[0, 1:], use_cache=False)
    logps: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return logps.float()


def _set_to_zero(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        if RANDOM.search(name) and isinstance(value, float) and 0 < value <= 1:
            setattr(holder, name, 0.0)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)


def _suspects(model: nn.Module) -> str:
    settings = model.config.get_text_config().to_dict()  # type: ignore[union-attr, operator]
    found = {k: v for k, v in settings.items() if RANDOM.search(k) and isinstance(v, float) and v > 0}
    if not found:
        return "Its config names no dropout: this architecture cannot be used with this method"
    named = ", ".join(f"{name}: {value}" for name, value in found.items())
    return f"Its config has {named}: name a checkpoint whose config.json has 0 there"
