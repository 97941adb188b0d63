"""Where a causal language model keeps its decoder and head, and a forward that stops at the response tokens.

Nothing here imports transformers: a model is anything with `get_decoder()`, `get_output_embeddings()` and `config`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, ismethod, signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad

from poft_plugin.losses.distribution import distribution_scores
from poft_plugin.losses.logps import LogitTransform, token_logps, token_logps_with_direction

PROBE_TOKENS = 8
"""Tokens of the check that our head gives what the model's own forward gives."""

PROBE_TOLERANCE = 0.05
"""Nats. A forgotten scale or soft-cap is off by whole nats; rounding in bfloat16 by some thousandths."""

ROUNDED_SUM = 1e-6
"""How far from 0 a discrepancy may sum: its numbers' sizes add up to 2 at most, and float32 rounds each by 6e-8."""


@dataclass(frozen=True)
class LanguageModel:
    """The parts of a causal language model.

    Args:
        decoder: maps token ids to the hidden states that enter the head (final norm included).
        head: the linear output layer.
        transform: what the model does to logits after the head.
    """

    decoder: nn.Module
    head: nn.Linear
    transform: LogitTransform


def language_model(model: nn.Module) -> LanguageModel:
    """Finds decoder, head and logit transform of a causal language model, below any PEFT wrapper.

    Args:
        model: a transformers model, or a PEFT model around one.

    Raises:
        ValueError: if the head is not a plain linear layer (a LoRA-wrapped head, say), with the remedy.
    """
    inner = unwrapped(model)
    config = inner.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = float(getattr(text_config, "logit_scale", None) or 1.0)
    divisor = float(getattr(text_config, "logits_scaling", None) or 1.0)
    soft_cap = getattr(text_config, "final_logit_softcapping", None)
    transform = LogitTransform(scale / divisor, None if soft_cap is None else float(soft_cap))
    return LanguageModel(inner.get_decoder(), _linear_head(inner), transform)


def install_response_forward(model: nn.Module, discrepancy: Tensor | None = None) -> LanguageModel:
    """Teaches a model to answer `model(..., response_positions=, response_targets=)` with token log-probabilities.

    With a discrepancy it answers with the pair `(token log-probabilities, distribution scores)`, `(N,)` each.

    The call goes through the model as it is wrapped later (DDP, DeepSpeed, PEFT), and through the head *module* once,
    so that gradient synchronisation and ZeRO-3's gathering of the head's weight happen as for any forward. Without
    `response_targets` the model answers as before.

    Args:
        model: the model, not yet wrapped for training.
        discrepancy: `(V,)`, a number for each token of the tokenizer, summing to 0 (see `distribution_scores`). Tokens
            that only the head knows get 0.

    Returns:
        Its parts.

    Raises:
        ValueError: as `language_model`; with a discrepancy also if it has more tokens than the head, or the model
            soft-caps its logits.
    """
    parts, inner = language_model(model), unwrapped(model)
    kept: Any = parts.head
    # neither parameter nor buffer: it is not saved, not synchronised and not cast to the model's precision
    kept.discrepancy = None if discrepancy is None else _for_head(discrepancy, parts, type(inner).__name__)
    _replace_forward(inner, _response_forward)
    _replace_forward(parts.head, lambda original: _head_forward(original, parts.transform))
    return parts


def check_head(model: nn.Module, transform: LogitTransform, vocabulary: int, device: torch.device) -> None:
    """Compares our log-probabilities with the model's own logits on a few tokens.

    Args:
        model: a model on which `install_response_forward` was called, wrapped or not.
        transform: the transform that was found, for the message.
        vocabulary: ids are drawn below it.
        device: where the model's inputs go.

    Raises:
        ValueError: if they differ: the model does something to its logits that this project does not know.
    """
    ids = torch.arange(1, PROBE_TOKENS + 1, device=device)[None] % vocabulary
    was_training = model.training
    model.eval()
    with torch.no_grad():
        positions = torch.arange(PROBE_TOKENS - 1, device=device)
        answer = model(input_ids=ids, response_positions=positions, response_targets=ids[0, 1:], use_cache=False)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    model.train(was_training)
    ours = answer[0] if isinstance(answer, tuple) else answer
    plain = log_softmax(logits, -1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    worst = float((ours - plain).abs().max())
    if not worst <= PROBE_TOLERANCE * max(1.0, float(plain.abs().max()) / 10):
        raise ValueError(
            f"{type(unwrapped(model)).__name__}: log-probabilities from its hidden states differ from its own logits "
            f"by {worst:.3g} nats; it does something after its head that is not known here (known: {transform}). "
            "This architecture cannot be used"
        )


def unwrapped(model: Any) -> Any:
    """The model below its wrappers: DDP's and DeepSpeed's, then PEFT's."""
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _linear_head(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):
        head = head.modules_to_save[head.active_adapters[0]]
    if not isinstance(head, nn.Linear):
        name = next((name for name, module in model.named_modules() if module is head), "lm_head")
        kind = f"{type(head).__module__.partition('.')[0]}.{type(head).__name__}"
        raise ValueError(
            f"{type(model).__name__}: its output head {name!r} is a {kind}, not a plain linear layer. If LoRA wraps "
            f"it, list `lora_target_modules:` without {name!r} (instead of `lora_target_linear: true`, which takes in "
            "some heads: GPT-NeoX's), or put it under `lora_modules_to_save:`"
        )
    return head


def _for_head(discrepancy: Tensor, parts: LanguageModel, name: str) -> Tensor:
    """The discrepancy with a 0 for each token that only the head knows, in the precision of its sums."""
    if parts.transform.soft_cap is not None:
        raise ValueError(
            f"{name}: it soft-caps its logits (at {parts.transform.soft_cap}), and the distribution reward needs "
            "logits that are linear in the hidden states. Set `omega: 0`, or take another model"
        )
    # not the weight's rows: ZeRO-3 may have taken them away
    tokens, known = parts.head.out_features, discrepancy.numel()
    if discrepancy.ndim != 1 or known > tokens:
        raise ValueError(
            f"{name}: a discrepancy of shape {tuple(discrepancy.shape)} for a head of {tokens} tokens. Count it again "
            "with this model's tokenizer, or set `omega: 0`"
        )
    assert abs(float(discrepancy.double().sum())) <= ROUNDED_SUM, "the discrepancy must sum to 0"
    dtype = torch.float64 if parts.head.weight.dtype == torch.float64 else torch.float32
    return pad(discrepancy.detach().to(dtype), (0, tokens - known))


def _replace_forward(module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Gives the module another forward that is, as the class's own, a bound method of the same signature.

    A deep copy (PEFT makes one of a saved head) then runs on its own weights, and accelerate, which wraps the function
    below a bound method for mixed precision and follows `__wrapped__` to unwrap it, ends where it began: here.
    """
    forward: Any = module.forward
    own = ismethod(forward) and forward.__self__ is module
    replacement: Any = make(forward.__func__ if own else lambda _, *args, **kwargs: forward(*args, **kwargs))
    shown = signature(forward)
    itself = Parameter("self", Parameter.POSITIONAL_ONLY)
    replacement.__signature__ = shown.replace(parameters=[itself, *shown.parameters.values()])
    module.forward = MethodType(replacement, module)


def _response_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        model: Any,
        *args: Any,
        response_positions: Tensor | None = None,
        response_targets: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if response_targets is None or response_positions is None:
            return original(model, *args, **kwargs)
        inputs = {name: value for name, value in kwargs.items() if value is not None}
        hidden = model.get_decoder()(*args, **inputs)[0]
        picked = hidden.flatten(0, 1).index_select(0, response_positions.to(hidden.device))
        return model.get_output_embeddings()(picked, response_targets=response_targets)

    return forward


def _head_forward(original: Callable[..., Tensor], transform: LogitTransform) -> Callable[..., Any]:
    def forward(head: Any, hidden: Tensor, response_targets: Tensor | None = None) -> Any:
        if response_targets is None:
            return original(head, hidden)
        targets = response_targets.to(hidden.device)
        if head.discrepancy is None:
            return token_logps(hidden, head.weight, targets, head.bias, transform=transform)
        head.discrepancy = discrepancy = head.discrepancy.to(hidden.device)
        logps, direction = token_logps_with_direction(
            hidden, head.weight, targets, head.bias, discrepancy, transform=transform
        )
        scores = distribution_scores(
            hidden, head.weight, discrepancy, head.bias, transform=transform, direction=direction
        )
        return logps, scores

    return forward
