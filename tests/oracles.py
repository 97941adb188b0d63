"""The papers' equations as plain loops in float64: what tests compare with. Imports nothing of the project.

Nothing here is fast, chunked or stable for large numbers; it is meant to be read beside the paper.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

Logits = Callable[[Tensor], Tensor]


def mean_logp(token_probabilities: Sequence[float]) -> float:
    """PoFT's reward: `(1 / T) * log p(y | x)`, the likelihood being the product over the T tokens (Eq. 6)."""
    return math.log(math.prod(token_probabilities)) / len(token_probabilities)


def poft_loss(policy: float, references: Sequence[float], beta: float = 1.0, gamma: float = 0.0) -> float:
    """Eq. 5's third line, `-log(exp(r) / (exp(r) + exp(r_LLMs)))`, the expectation over the references a plain mean.

    `beta` scales both rewards and `gamma` is added to the policy's.
    """
    ours = math.exp(beta * policy + gamma)
    theirs = math.exp(beta * sum(references) / len(references))
    return -math.log(ours / (ours + theirs))


def poft_tau(policy_probabilities: Sequence[float], reference_probabilities: Sequence[Sequence[float]]) -> float:
    """Eq. 8 from token probabilities: the references' geometric mean against itself plus the policy's."""
    policy = math.prod(policy_probabilities) ** (1 / len(policy_probabilities))
    product = 1.0
    for tokens in reference_probabilities:
        product *= math.prod(tokens) ** (1 / len(tokens))
    reference = product ** (1 / len(reference_probabilities))
    return reference / (reference + policy)


def transform(scale: float = 1.0, soft_cap: float | None = None) -> Logits:
    """What a model does to its logits after the head: a factor, then Gemma's `cap * tanh(logits / cap)`."""

    def apply(logits: Tensor) -> Tensor:
        logits = logits * scale
        return logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap

    return apply


IDENTITY = transform()


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, after: Logits = IDENTITY
) -> Tensor:
    """One token after the other in float64: `z - log(sum_v exp(z_v))` of the target's logit `z`. Differentiable."""
    hidden, weight = hidden.double(), weight.double()
    values = []
    for row, target in zip(hidden, targets.tolist(), strict=True):
        logits = after(weight @ row if bias is None else weight @ row + bias.double())
        values.append(logits[target] - logits.exp().sum().log())
    return torch.stack(values) if values else hidden.new_zeros(0)


def plain_token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, after: Logits = IDENTITY
) -> Tensor:
    """What transformers computes in the same precision: all logits at once, cast to float32, cross-entropy."""
    logits = linear(hidden, weight, bias)
    logits = after(logits if logits.dtype == torch.float64 else logits.float())
    return -cross_entropy(logits, targets, reduction="none")


def model_token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token but the first, from the logits `(L, V)` of one unpadded sequence `(L,)`."""
    values = [logits[t - 1].double().log_softmax(-1)[ids[t]] for t in range(1, len(ids))]
    return torch.stack(values)


def response_positions(labels: Sequence[Sequence[int]], sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """`[position in the flattened batch, target, sequence]` of each counted token, sequence by sequence, row by row."""
    length, found = len(labels[0]), []
    for number, (row, members) in enumerate(zip(labels, sequences, strict=True)):
        for sequence in dict.fromkeys(members):
            tokens = [t for t in range(length) if members[t] == sequence]
            for t in tokens[1:]:
                if sequence >= 0 and row[t] != -100:
                    found.append([number * length + t - 1, row[t], sequence])
    return found


def ceil_percent(percent: float, total: int) -> int:
    """The smallest count that is at least `percent` % of `total`, the percentage taken as it is written."""
    exact, count = Decimal(repr(percent)) * total, 0
    while 100 * count < exact:
        count += 1
    return count


@dataclass(frozen=True)
class Moments:
    """Weighted mean and population standard deviation."""

    mean: float
    std: float


def moments(values: Iterable[float], weights: Iterable[float] | None = None) -> Moments:
    """In two passes."""
    values = list(values)
    weights = [1.0] * len(values) if weights is None else list(weights)
    total = math.fsum(weights)
    mean = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / total
    variance = math.fsum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)) / total
    return Moments(mean, math.sqrt(variance))


VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
OTHERS = [byte for byte in range(256) if byte not in VISIBLE]
ALPHABET = {chr(byte): byte for byte in VISIBLE} | {chr(256 + n): byte for n, byte in enumerate(OTHERS)}
"""GPT-2's alphabet, which gives each byte a visible character."""


def token_bytes(token: str) -> bytes:
    """Bytes of a byte-level BPE token."""
    return bytes(ALPHABET[character] for character in token)


def counted_by_bytes(tokens: Iterable[bytes], text: str, spans: Iterable[tuple[int, int]]) -> list[bool]:
    """Whether each token holds a byte of a span of characters; the tokens' bytes, end to end, are the text's."""
    edges = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
    counted, position = [], 0
    for token in tokens:
        inside = range(position, position + len(token))
        counted.append(any(start <= byte < end for byte in inside for start, end in edges))
        position += len(token)
    assert position == len(text.encode())
    return counted
