"""A training step, forward and backward, against the host's and TRL's: time, and memory above model and gradients.

    python -m benchmarks.training_step --data FOLDER --write

1. PoFT against the host's plain SFT and TRL's SFT with `chunked_nll`, on the same packed batch, with a head of 32,768
   and of 128,256 tokens.
2. `deft_dpo` against the host's `rl: dpo`, with its reference model and with precomputed references, on the same 8
   pairs; both without a distribution reward, so that all three compute the same loss.
3. The distribution reward: `deft_dpo` with omega against omega 0, and with the literal form of Eq. 16 and 17.

Before anything is timed, contestants that compute the same thing are held to the same losses and gradients.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import common, trainers
from poft_plugin.trainers.step import SequenceBatch, StepOutput

VOCABULARIES = (32_768, 128_256)
SMALL_VOCABULARIES = (2_048, 4_096)
PARTS = ("poft", "dpo", "reward")
OMEGA = 2.5e-6
ADDED, HEAD_REPEATS = 0.02, 15
CHECKED_OMEGA = 1.0
SAME = {torch.float32: 2e-4, torch.bfloat16: 0.05}
"""Of the largest gradient: float32 sums in another order, over some thousand tokens and a whole vocabulary."""

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Way:
    """One contestant: a step, and the model whose gradients it leaves."""

    name: str
    model: nn.Module
    loss: Step

    def run(self) -> None:
        """Forward and backward."""
        self.loss().backward()

    def prepare(self) -> None:
        """Gradients stay allocated, at 0."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()


@dataclass(frozen=True)
class Target:
    """How much of a peer's time and peak memory is allowed."""

    peer: str
    short: str
    time: float
    memory: float | None = None


@dataclass(frozen=True)
class Measured:
    """Seconds of the step that counts, the spread, and peak MiB."""

    seconds: float
    spread: str
    peak: float


def main() -> None:
    """Prints, and with `--write` keeps, the tables of each part."""
    parser = common.arguments(__doc__, data=trainers.DATA_HELP)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="Which tables (default: all).")
    trainers.add_model_options(parser)
    parser.add_argument("--pairs", type=int, help="Pairs of the preference parts (default: 8).")
    options = common.settle(parser.parse_args(), repeats=5)
    small, large = SMALL_VOCABULARIES if options.small else VOCABULARIES
    for part in options.parts:
        make, vocabularies = {
            "poft": (poft_report, (small, large)),
            "dpo": (dpo_report, (small,)),
            "reward": (reward_report, (small, large)),
        }[part]
        reports = [make(vocabulary, options) for vocabulary in vocabularies]
        common.publish(f"training_step {part}", reports, options)


def poft_report(vocabulary: int, options: argparse.Namespace) -> common.Report:
    """PoFT, the host's SFT and TRL's on one packed batch."""
    samples, model = _alpaca(vocabulary, options)
    inputs = trainers.batch("poft", samples, reference_logp=lambda sample: -float(len(sample) % 7) - 5)
    tokens = {name: inputs[name] for name in ("input_ids", "labels", "position_ids")}
    _check_sft(model, inputs, tokens)
    host, trl, poft = (
        trainers.host_sft_trainer(deepcopy(model)),
        trainers.trl_sft_trainer(deepcopy(model)),
        trainers.plugin_trainer(deepcopy(model), "poft"),
    )
    packed = trainers.plugin_trainer(deepcopy(model), "poft", packed=True)
    ways = [
        _way("host, SFT", host, tokens),
        _way("TRL, SFT chunked_nll", trl, tokens),
        _way("poft, attention as theirs", poft, inputs),
        _way("poft", packed, inputs),
    ]
    counted = int((inputs["labels"] != -100).sum())
    large = vocabulary > VOCABULARIES[0]
    targets = [Target("host, SFT", "host", 0.75, 0.3)] if large else [Target("host, SFT", "host", 1.0, 1.0)]
    targets += [] if large else [Target("TRL, SFT chunked_nll", "TRL", 1.03, 1.03)]
    title = f"PoFT, head of {vocabulary:,}: one pack of {inputs['input_ids'].numel():,} tokens, {counted:,} counted"
    return _report(title, ways, targets, options)


def dpo_report(vocabulary: int, options: argparse.Namespace) -> common.Report:
    """`deft_dpo` and the host's DPO on the same pairs."""
    pairs, model = _pairs(vocabulary, options)
    theirs = _trl_batch(pairs)
    start = deepcopy(model)
    with_reference = trainers.host_dpo_trainer(deepcopy(model), start, precomputed=False)
    chosen, rejected = with_reference.compute_ref_log_probs(start, trainers.on_device(with_reference, theirs))
    known = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    precomputed = trainers.host_dpo_trainer(deepcopy(model), None, precomputed=True)
    plugin = trainers.plugin_trainer(deepcopy(model), "deft_dpo", omega=0.0, sft_weight=0.0)
    ways = [
        _way("host, rl: dpo", with_reference, theirs),
        _way("host, rl: dpo precomputed", precomputed, {**theirs, **known}),
        _way("deft_dpo", plugin, _ranked(pairs, torch.stack([chosen, rejected], 1))),
    ]
    _check_same(ways)
    targets = [Target("host, rl: dpo", "host", 0.25, 0.3), Target("host, rl: dpo precomputed", "precomputed", 0.4)]
    return _report(f"DPO, head of {vocabulary:,}: {_size(pairs)}", ways, targets, options)


def reward_report(vocabulary: int, options: argparse.Namespace) -> common.Report:
    """`deft_dpo` with the distribution reward, without, and with its literal form."""
    pairs, model = _pairs(vocabulary, options)
    inputs = _ranked(pairs, torch.full((len(pairs), 2), -300.0))
    discrepancy = _discrepancy(vocabulary)

    def ways(omega: float) -> list[Way]:
        def settings(value: float) -> dict[str, Any]:
            given = {"omega": value, "sft_weight": 0.0}
            return {**given, "discrepancy": discrepancy} if value else given

        plain, ours, literal = (
            trainers.plugin_trainer(deepcopy(model), "deft_dpo", **settings(value)) for value in (0.0, omega, omega)
        )
        literal.step_output = _literal(literal, torch.from_numpy(discrepancy))  # type: ignore[method-assign]
        return [
            _way("omega 0", plain, inputs), _way("omega above 0", ours, inputs),
            _way("omega above 0, Eq. 16 and 17 as written", literal, inputs),
        ]  # fmt: skip

    _check_same(ways(CHECKED_OMEGA)[1:])
    title = f"The distribution reward in deft_dpo, head of {vocabulary:,}: {_size(pairs)}"
    raced = ways(OMEGA)
    report = _report(title, raced, [Target("omega 0", "omega 0", 1 + ADDED)], options, ours=raced[1].name)
    return replace(report, notes=[_added(raced, inputs, options, step=float(report.rows[0][1]))])


def _added(ways: Sequence[Way], inputs: Mapping[str, Any], options: argparse.Namespace, *, step: float) -> str:
    """What the reward adds to a step: a whole step's time varies by more, so the head is timed by itself."""
    from poft_plugin.losses import response_positions

    device = next(ways[0].model.parameters()).device
    _, targets, _ = response_positions(inputs["labels"].to(device), inputs["sequence_ids"].to(device))
    heads: list[Any] = [way.model.lm_head for way in ways[:2]]
    hidden = torch.randn(len(targets), heads[0].in_features, device=device, dtype=heads[0].weight.dtype)

    def run(head: Any) -> None:
        answer = head(hidden.clone().requires_grad_(), response_targets=targets)
        sum(part.sum() for part in (answer if isinstance(answer, tuple) else (answer,))).backward()

    contestants = [
        common.Contestant(way.name, partial(run, head), prepare=way.prepare)
        for way, head in zip(ways, heads, strict=False)
    ]
    repeats = 1 if options.small else HEAD_REPEATS
    without, with_reward = common.race(contestants, repeats, clock=options.clock, take="best").values()
    share = (with_reward.figure - without.figure) / step
    verdict = "met" if share <= ADDED else "missed"
    return (
        f"The reward by itself: forward and backward of the head take {with_reward.figure:.3g} s with it and "
        f"{without.figure:.3g} s without (best of {repeats} rounds), {share:+.1%} of a step "
        f"(target {ADDED:.0%}: {verdict})"
    )


def _alpaca(vocabulary: int, options: argparse.Namespace) -> tuple[list[list[trainers.Sample]], nn.Module]:
    tokens = 256 if options.small else 1024
    rows = trainers.alpaca(options.data, 64, vocabulary=min(vocabulary, VOCABULARIES[0]))
    pack: list[trainers.Sample] = []
    for row in rows:
        pack += [row] if sum(map(len, pack)) + len(row) <= tokens else []
    return [pack], trainers.model_of(vocabulary, options)


def _pairs(vocabulary: int, options: argparse.Namespace) -> tuple[list[trainers.Sample], nn.Module]:
    ids = min(vocabulary, VOCABULARIES[0])
    pairs = trainers.hh_pairs(options.data, options.pairs or (2 if options.small else 8), vocabulary=ids)
    return pairs, trainers.model_of(vocabulary, options)


def _size(pairs: Sequence[trainers.Sample]) -> str:
    counted = sum(len(response) for pair in pairs for response in pair.responses)
    return f"{len(pairs)} pairs, {sum(map(len, pairs)):,} tokens, {counted:,} counted"


def _discrepancy(vocabulary: int) -> np.ndarray:
    """A difference of two distributions."""
    chosen, rejected = np.random.default_rng(common.SEED).dirichlet(np.full(vocabulary, 0.1), 2)
    difference: np.ndarray = chosen - rejected
    return difference


def _ranked(pairs: Sequence[trainers.Sample], reference: Tensor) -> dict[str, Any]:
    numbers = {id(pair): row for pair, row in zip(pairs, reference.tolist(), strict=True)}
    return trainers.batch(
        "deft_dpo", pairs, ranks=lambda _: [0.0, 1.0], reference_sum_logps=lambda pair: numbers[id(pair)]
    )


def _trl_batch(pairs: Sequence[trainers.Sample]) -> dict[str, Any]:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, (pair.prompt, *pair.responses), strict=True)) for pair in pairs]
    batch: dict[str, Any] = DataCollatorForPreference(pad_token_id=trainers.PAD)(rows)
    return batch


def _way(name: str, trainer: Any, inputs: Mapping[str, Any]) -> Way:
    return Way(name, trainer.model, lambda: trainer.compute_loss(trainer.model, trainers.on_device(trainer, inputs)))


def _literal(trainer: Any, discrepancy: Tensor) -> Callable[..., StepOutput]:
    """The same step with `sum_i q_i mean_t log p_i` from all log-probabilities of all counted tokens."""
    from poft_plugin.losses import mean_logps, response_positions, sum_logps

    def step_output(model: Any, inputs: Mapping[str, Any]) -> StepOutput:
        positions, targets, numbers = response_positions(inputs["labels"], inputs["sequence_ids"])
        hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)[0]
        logps = model.lm_head(hidden.flatten(0, 1)[positions]).log_softmax(-1)
        own = logps.gather(-1, targets[:, None])[:, 0]
        groups = inputs["group_ids"]
        sums, counts = sum_logps(own, numbers, len(groups))
        rewards = mean_logps(logps @ discrepancy.to(logps.dtype), numbers, len(groups))[0]
        columns = {name: inputs[name] for name in trainer.method_run.method.columns}
        output: StepOutput = trainer.step(SequenceBatch(sums, counts, groups, columns, rewards))
        return output

    return step_output


def _check_sft(model: nn.Module, inputs: Mapping[str, Any], tokens: Mapping[str, Any]) -> None:
    """The host's SFT, TRL's, and the token mean of the plugin's log-probabilities."""
    plugin = trainers.plugin_trainer(deepcopy(model), "poft", packed=True)
    plugin.step = _token_mean
    _check_same(
        [
            _way("host, SFT", trainers.host_sft_trainer(deepcopy(model)), tokens),
            _way("TRL, SFT chunked_nll", trainers.trl_sft_trainer(deepcopy(model)), tokens),
            _way("plugin, mean over tokens", plugin, inputs),
        ]
    )


def _token_mean(batch: SequenceBatch) -> StepOutput:
    return StepOutput((-batch.sum_logps.sum() / batch.num_tokens.sum())[None])


def _check_same(ways: Sequence[Way]) -> None:
    """Raises where a loss or a gradient differs from the first contestant's."""
    expected: dict[str, Tensor] = {}
    for way in ways:
        budget = SAME[next(way.model.parameters()).dtype]
        loss = way.loss()
        loss.backward()
        found = {name: p.grad for name, p in way.model.named_parameters() if p.grad is not None}
        found["loss"] = loss.detach()
        expected = expected or {name: value.clone() for name, value in found.items()}
        assert found.keys() == expected.keys(), way.name
        for name, value in found.items():
            torch.testing.assert_close(
                value, expected[name], rtol=0, atol=budget * float(expected[name].abs().max()) + 1e-9,
                msg=lambda text, way=way, name=name: f"{way.name}, {name}: {text}",
            )  # fmt: skip
        way.prepare()


def _report(
    title: str, ways: Sequence[Way], targets: Sequence[Target], options: argparse.Namespace, *, ours: str = ""
) -> common.Report:
    """Measures the contestants; each row shows its ratios to each peer that has a target."""
    runs = [common.Contestant(way.name, way.run, prepare=way.prepare) for way in ways]
    timings = common.race(runs, options.repeats, clock=options.clock, take=options.take)
    measured = {}
    for way in ways:
        way.prepare()
        timing = timings[way.name]
        measured[way.name] = Measured(timing.figure, timing.spread, common.peak_mib(way.run))
    headings = ["step", "CPU seconds" if options.clock == "cpu" else "seconds", "fastest to slowest", "peak MiB"]
    headings += [f"{kind} / {target.short}" for target in targets for kind in ("time", "peak")]
    rows = [
        [
            name,
            f"{one.seconds:.3g}",
            one.spread,
            f"{one.peak:,.0f}",
            *_ratios(one, measured, targets),
        ]
        for name, one in measured.items()
    ]
    ours = ours or ways[-1].name
    notes = [_verdict(measured[ours], measured[target.peer], target, ours) for target in targets]
    return common.Report(title, headings, rows, notes)


def _ratios(one: Measured, measured: Mapping[str, Measured], targets: Sequence[Target]) -> list[str]:
    peers = [measured[target.peer] for target in targets]
    return [cell for peer in peers for cell in (f"{one.seconds / peer.seconds:.3f}", f"{one.peak / peer.peak:.3f}")]


def _verdict(one: Measured, peer: Measured, target: Target, name: str) -> str:
    parts = [("time", one.seconds / peer.seconds, target.time)]
    parts += [] if target.memory is None else [("peak memory", one.peak / peer.peak, target.memory)]
    said = [
        f"{ratio:.3f} of the {what} (target {limit}: {'met' if ratio <= limit else 'missed'})"
        for what, ratio, limit in parts
    ]
    return f"{name} takes {' and '.join(said)} of {target.peer}"


if __name__ == "__main__":
    main()
