"""Attention over packs that hold what sequences begin with in common once: `[prompt response][response][response]...`.

Position ids alone say how a pack is made up. A run of ids that begins at 0 is a whole sequence. One that begins at
P > 0 goes on from the first P tokens of the sequence before it, of which some may in turn be those of an earlier one:
it sees those and itself. So each sequence gets what a forward of its own would give: hidden states of a prompt do not
depend on what comes after it.

Every run is one call of PyTorch's attention, on any device. No mask of a whole pack is written.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from poft_plugin.attention.packed import packed_mask, sequence_lengths
from poft_plugin.losses import response_positions
from poft_plugin.losses.head import PROBE_TOLERANCE, unwrapped
from poft_plugin.losses.logps import IGNORED

NAME = "poft_shared_sdpa"
"""What `attn_implementation` is called in transformers."""

PROBE_GROUPS = ((5, (3, 2, 4)), (1, (2, 3)))
"""Tokens of the prompts and of their responses in the check that the model can do it."""

REMEDY = "This architecture cannot share prompts: set `share_prompt: false`"


def use_shared_attention(model: nn.Module) -> None:
    """Gives a model that attends with `sdpa` the attention of this module.

    Args:
        model: a transformers model, or a PEFT model around one.

    Raises:
        ValueError: if it attends in another way.
    """
    inner = unwrapped(model)
    asked = attention_of(model)
    if asked not in ("sdpa", NAME):
        raise ValueError(f"share_prompt: true with attn_implementation: {asked!r}: set it to sdpa")
    AttentionInterface.register(NAME, shared_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
    inner.set_attn_implementation(NAME)


def attention_of(model: nn.Module) -> str | None:
    """The attention implementation that a model has."""
    found: str | None = unwrapped(model).config.get_text_config()._attn_implementation
    return found


def window_of(config: Any) -> int | None:
    """The tokens that a token sees at most, where that is bounded: a model's sliding window or chunk.

    Args:
        config: of the model's text part.
    """
    bounds = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((bound for bound in bounds if bound), default=None)


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence and to the prompt that it goes on from, `(R, T, heads, size)`.

    Args:
        module: the layer that asks.
        query: `(R, heads, T, size)`.
        key: `(R, key-value heads, T, size)`.
        value: `(R, key-value heads, T, size)`.
        attention_mask: what `packed_mask` returned: `(R, T)` starts of runs. With any other, this is `sdpa`.
        dropout: of attention weights.
        scaling: of the products; None for one over the square root of the size.
        position_ids: `(R, T)`, which transformers hands on from the model's inputs.
        **kwargs: what else `sdpa` is told.

    Raises:
        ValueError: if the architecture does not hand its position ids on, or masks more than a pack does.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        if module.training and position_ids is not None and _goes_on(position_ids):
            raise ValueError(f"{type(module).__name__}: it has a mask of its own. {REMEDY}")
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__}: it has a bias on positions. {REMEDY}")
    if position_ids is None or position_ids.ndim != 2:
        raise ValueError(f"{type(module).__name__}: it does not tell attention its position ids. {REMEDY}")
    settings = {"dropout_p": dropout, "scale": scaling}
    rows = []
    for row, starts in enumerate(attention_mask):
        first = position_ids[row if len(position_ids) > 1 else 0][starts].tolist()
        _check_window(kwargs.get("sliding_window"), first, sequence_lengths(starts))
        whole = tuple(tensor[row : row + 1] for tensor in (query, key, value))
        rows.append(_attend(whole, sequence_lengths(starts), first, **settings))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def _attend(whole: tuple[Tensor, ...], lengths: list[int], first: list[int], **settings: Any) -> Tensor:
    """`(1, heads, T, size)` of a row, from the tokens of each run and the position of its first one."""
    found, begin = [], 0
    for tokens, position, prompt in zip(lengths, first, prompts(lengths, first), strict=True):
        part = [tensor[:, :, begin : begin + tokens] for tensor in whole]
        if position == 0:
            found.append(_causal(*part, **settings))
        else:
            keys, values = (torch.cat([t[:, :, a:b] for a, b in prompt], dim=2) for t in whole[1:])
            found.append(_after(keys, values, *part, **settings))
        begin += tokens
    return torch.cat(found, dim=2)


def prompts(lengths: Sequence[int], first: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Where in a pack the tokens lie that each run goes on from: stretches `(begin, end)`, in order.

    Args:
        lengths: tokens of each run.
        first: position of each run's first token.

    Examples:
        >>> list(prompts([5, 2, 1], [0, 3, 4]))
        [[], [(0, 3)], [(0, 3), (5, 6)]]
    """
    path: list[tuple[int, int]] = []  # where the sequence before lies
    begin = 0
    for tokens, position in zip(lengths, first, strict=True):
        kept, left = [], position
        for start, end in path:
            if left > 0:
                kept.append((start, min(end, start + left)))
                left -= end - start
        assert left <= 0, "a sequence goes on from tokens that are not there"
        yield kept
        path = [*kept, (begin, begin + tokens)]
        begin += tokens


def _causal(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped, **settings)


def _after(keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """A run over the keys and values of what it goes on from, and over itself."""
    repeats = query.shape[1] // key.shape[1]
    key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
    if repeats != 1:  # with a mask, not every device groups heads by itself
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    tokens, seen = query.shape[2], key.shape[2]
    mask = torch.ones(tokens, seen, dtype=torch.bool, device=query.device).tril(seen - tokens)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)


def _check_window(window: int | None, first: list[int], lengths: list[int]) -> None:
    longest = max(position + length for position, length in zip(first, lengths, strict=True))
    if window is not None and longest > window:
        raise ValueError(f"a sequence of {longest} tokens, and a sliding window of {window}: set `share_prompt: false`")


def check_shared_prompts(model: nn.Module, vocabulary: int, device: torch.device) -> None:
    """Compares log-probabilities in a pack of shared prompts with separate forwards, on a few tokens.

    Args:
        model: a model that `install_response_forward` and `use_shared_attention` were called on, wrapped or not.
        vocabulary: ids are drawn below it.
        device: where the model's inputs go.

    Raises:
        ValueError: if they differ: something in the model goes from token to token past its attention.
    """
    generator = torch.Generator().manual_seed(0)
    groups = [
        (torch.randint(vocabulary, (prompt,), generator=generator), [
            torch.randint(vocabulary, (length,), generator=generator) for length in responses
        ])
        for prompt, responses in PROBE_GROUPS
    ]  # fmt: skip
    was_training = model.training
    model.eval()
    with torch.no_grad():
        together = _probe_logps(model, _shared_batch(groups), device)
        apart = [_probe_logps(model, _shared_batch([(p, [r])]), device) for p, responses in groups for r in responses]
    model.train(was_training)
    plain = torch.cat(apart)
    worst = float((together - plain).abs().max())
    if not worst <= PROBE_TOLERANCE * max(1.0, float(plain.abs().max()) / 10):
        raise ValueError(
            f"share_prompt: true: {type(unwrapped(model)).__name__} gives log-probabilities that differ by {worst:.3g} "
            f"nats from those of each response with a prompt of its own. {REMEDY}"
        )


def _goes_on(position_ids: Tensor) -> bool:
    """Whether any run of position ids but a row's first begins above 0."""
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return bool((begins & (position_ids[:, 1:] > 0)).any())


def _shared_batch(groups: list[tuple[Tensor, list[Tensor]]]) -> dict[str, Tensor]:
    """A pack of groups: each prompt once, then its responses."""
    ids, labels, positions, numbers, count = [], [], [], [], 0
    for prompt, responses in groups:
        for place, response in enumerate(responses):
            before = len(prompt) if place == 0 else 0
            ids.append(torch.cat([prompt[:before], response]))
            labels.append(torch.cat([torch.full((before,), IGNORED), response]))
            positions.append(torch.arange(len(prompt) - before, len(prompt) + len(response)))
            numbers.append(torch.full((before + len(response),), count))
            count += 1
    named = {"input_ids": ids, "labels": labels, "position_ids": positions, "sequence_ids": numbers}
    return {name: torch.cat(parts)[None] for name, parts in named.items()}


def _probe_logps(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """Log-probabilities of the batch's labels."""
    positions, targets, _ = response_positions(batch["labels"], batch["sequence_ids"], batch["position_ids"])
    given = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
    chosen = {"response_positions": positions.to(device), "response_targets": targets.to(device)}
    answer = model(**given, **chosen, use_cache=False)
    logps: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return logps
