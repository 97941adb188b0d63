"""The papers' equations as plain loops in float64: what tests compare with. Imports nothing of the project.

Nothing here is fast, chunked or stable for large numbers; it is meant to be read beside the paper.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

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


def pro_loss(
    scores: Sequence[float], ranks: Sequence[float] | None = None, rewards: Sequence[float] | None = None
) -> float:
    """Eq. 11, round by round; with rewards PRO's released form. Nobody competes with an equal."""
    ranks = range(len(scores)) if ranks is None else ranks
    total = 0.0
    for k, score in enumerate(scores):
        rivals = [i for i in range(len(scores)) if ranks[i] > ranks[k]]
        if rewards is None:
            own, others = math.exp(score), [math.exp(scores[i]) for i in rivals]
        else:
            rivals = [i for i in rivals if rewards[i] < rewards[k]]
            temperature = max((rewards[k] - rewards[i] for i in rivals), default=0.0)
            own, others = (
                math.exp(score * temperature),
                [math.exp(scores[i] * (rewards[k] - rewards[i])) for i in rivals],
            )
        total -= math.log(own / (own + sum(others)))
    return total


def rrhf_loss(scores: Sequence[float], ranks: Sequence[float] | None = None) -> float:
    """Eq. 8 over ordered pairs: the paper's `r_k < r_j` says that k is the worse one."""
    worth = [-rank for rank in (range(len(scores)) if ranks is None else ranks)]
    everyone = range(len(scores))
    return sum(max(0.0, scores[k] - scores[j]) for k in everyone for j in everyone if worth[k] < worth[j])


def dpo_loss(
    kind: str,
    policy: Sequence[float],
    reference: Sequence[float],
    beta: float,
    smoothing: float = 0.0,
    tokens: Sequence[int] = (1, 1),
    ranks: Sequence[float] = (0, 1),
) -> float:
    """Losses of one pair, chosen then rejected, from sums of log-probabilities; probabilities are written out.

    A tied pair's loss is that of a policy that prefers neither.
    """
    chosen, rejected = (ours - theirs for ours, theirs in zip(policy, reference, strict=True))
    if ranks[0] == ranks[1]:
        chosen = rejected = 0.0
    if kind == "ipo":
        return (chosen / tokens[0] - rejected / tokens[1] - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return max(0.0, 1 - beta * (chosen - rejected))
    prefers = math.exp(beta * chosen) / (math.exp(beta * chosen) + math.exp(beta * rejected))
    errs = math.exp(beta * rejected) / (math.exp(beta * chosen) + math.exp(beta * rejected))
    if kind == "sigmoid":
        return -math.log(prefers)
    assert kind == "robust"
    return ((1 - smoothing) * -math.log(prefers) - smoothing * -math.log(errs)) / (1 - 2 * smoothing)


def ranking_accuracy(numbers: Sequence[float], ranks: Sequence[float]) -> float | None:
    """Share of untied pairs in which the better response has the higher number; None without such a pair."""
    everyone = range(len(numbers))
    right = [numbers[k] > numbers[j] for k in everyone for j in everyone if ranks[k] < ranks[j]]
    return sum(right) / len(right) if right else None


def distribution_reward(logits: Tensor, discrepancy: Tensor) -> Tensor:
    """Eq. 16 and 17 of one sequence, `(T, V)` logits that predict its response: log-softmax, mean, weighted sum."""
    average = logits.double().log_softmax(-1).sum(0) / len(logits)
    return (discrepancy.double() * average).sum()


def distribution_scores(
    hidden: Tensor, weight: Tensor, discrepancy: Tensor, bias: Tensor | None = None, after: Logits = IDENTITY
) -> Tensor:
    """The part of each token: the literal form with sequences of one token."""
    logits = after(linear(hidden.double(), weight.double(), None if bias is None else bias.double()))
    values = [distribution_reward(row[None], discrepancy) for row in logits]
    return torch.stack(values) if values else logits.new_zeros(0)


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


def grade_score(scores: Sequence[float]) -> float:
    """Section 3.1: the highest score of a sample, "the score of the positive response when l = 2"; best first."""
    return scores[0] if len(scores) == 2 else max(scores)


def deft_levels(scores: Sequence[float], keys: Sequence[str], top_percent: float, bottom_percent: float) -> list[str]:
    """DEFT's section 3.1 with counts rounded up: the level of each sample, worst ranks first taken from what A left."""
    ranking = sorted(zip([-score for score in scores], keys, range(len(scores)), strict=True))
    levels = ["B"] * len(scores)
    for _, _, sample in ranking[: ceil_percent(top_percent, len(scores))]:
        levels[sample] = "A"
    for _, _, sample in ranking[::-1][: ceil_percent(bottom_percent, len(scores))]:
        if levels[sample] != "A":
            levels[sample] = "C"
    return levels


@dataclass(frozen=True)
class DeftCounts:
    """Q+ and Q- by token, and the middle responses that went into neither."""

    positive: list[int]
    negative: list[int]
    uncounted: int
    contradictory: int


def deft_side(level: str, score: Fraction, scores: Sequence[Fraction]) -> str:
    """DEFT's Eq. 15 and three rules for a middle response: `+`, `-`, `0` (neither) or `!` (left out).

    By the scores' extremes, and by the label's as Eq. 15 is written; what they put on two sides of one half is left
    out, unless it was to go nowhere anyway.
    """
    if len(set(scores)) == 1:
        return "!"
    r = (score - min(scores)) / (max(scores) - min(scores))
    side = "0"
    if (level == "A" and r > Fraction(8, 10)) or (level == "B" and r > Fraction(9, 10)):
        side = "+"
    if (level == "B" and r < Fraction(1, 10)) or (level == "C" and r < Fraction(2, 10)):
        side = "-"
    if side == "0":
        return "0"
    if scores[0] == scores[-1]:
        return "!"
    literal, half = (score - scores[-1]) / (scores[0] - scores[-1]), Fraction(1, 2)
    return "!" if (r > half and literal < half) or (r < half and literal > half) else side


def deft_counts(
    samples: Iterable[tuple[str, Sequence[Sequence[int]], Sequence[float]]], vocab_size: int, special: Sequence[int]
) -> DeftCounts:
    """Tokens one by one; samples are (level, responses best to worst, scores)."""
    counts: dict[str, list[int]] = {"+": [0] * vocab_size, "-": [0] * vocab_size}
    left_out = {"0": 0, "!": 0}
    for level, responses, scores in samples:
        exact = [Fraction(score) for score in scores]
        for number, response in enumerate(responses):
            side = deft_side(level, exact[number], exact)
            side = "+" if number == 0 else "-" if number == len(responses) - 1 else side
            if side in left_out:
                left_out[side] += 1
                continue
            for token in response:
                if token not in special:
                    counts[side][token] += 1
    return DeftCounts(counts["+"], counts["-"], left_out["0"], left_out["!"])


def deft_discrepancy(positive: Sequence[int], negative: Sequence[int]) -> list[Fraction]:
    """Eq. 14, exact."""
    return [Fraction(p, sum(positive)) - Fraction(n, sum(negative)) for p, n in zip(positive, negative, strict=True)]
