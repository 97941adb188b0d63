"""`sample_packing: true` against unpacked training for preference methods: samples a second, at equal tokens per batch.

    python -m benchmarks.packing --data FOLDER --write

The same samples are trained on, forward and backward, in four ways: unpacked (each response a padded row), packed with
transformers' own mask of the whole pack, packed with the plugin's attention for packs on a CPU, a call per sequence,
and packed with `share_prompt: true`, each prompt once for its responses. A batch is of as many samples as fill, padding
included, the tokens of a pack. The losses of all samples are compared first. The head projects response tokens only, in
all four.
"""

import argparse
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import common, trainers

PACKED, SHARED = "packed, a call per sequence", "packed, prompts shared"
METHODS = ("deft_dpo", "deft_pro", "deft_rrhf", "pro", "rrhf")
TARGET = 1.5
SAME = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Relative: sums over a sequence in another order."""

Batch = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way of training on the samples.

    Args:
        name: in the table.
        trainer: of one method.
        batches: all samples.
    """

    name: str
    trainer: Any
    batches: Sequence[Batch]

    def run(self) -> None:
        """Forward and backward over all samples."""
        for inputs in self.batches:
            self.trainer.compute_loss(self.trainer.model, trainers.on_device(self.trainer, inputs)).backward()

    def prepare(self) -> None:
        """Gradients stay allocated, at 0."""
        for parameter in self.trainer.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def losses(self) -> torch.Tensor:
        """Of all samples, smallest first."""
        batches = [trainers.on_device(self.trainer, inputs) for inputs in self.batches]
        with torch.no_grad():
            parts = [self.trainer.step_output(self.trainer.model, inputs).losses for inputs in batches]
        return torch.cat(parts).sort().values


def main() -> None:
    """Prints, and with `--write` keeps, the table."""
    parser = common.arguments(__doc__, data=trainers.DATA_HELP)
    parser.add_argument("--samples", type=int, help="Pairs in all (default: 24).")
    parser.add_argument("--pack", type=int, default=2048, help="Tokens of a pack (default: 2048).")
    trainers.add_model_options(parser)
    parser.add_argument("--layers", type=int, default=12, help="Layers of a toy (default: 12).")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="Which (default: all).")
    options = common.settle(parser.parse_args(), repeats=3)
    count = options.samples or (4 if options.small else 24)
    vocabulary = 2048 if options.small else 32_768
    samples = trainers.hh_pairs(options.data, count, vocabulary=vocabulary)
    model = trainers.model_of(vocabulary, options, layers=options.layers)
    common.publish("packing", [report(samples, model, options)], options)


def report(samples: Sequence[trainers.Sample], model: Any, options: argparse.Namespace) -> common.Report:
    """All methods, all ways."""
    packs, shared = ([[pack] for pack in trainers.packs(samples, options.pack, shared=once)] for once in (False, True))
    size, unpacked = _batches(samples, options.pack)
    rows, worst = [], float("inf")
    for method in options.methods:
        ways = _ways(method, model, unpacked=unpacked, packs=packs, shared=shared)
        _check_losses(ways)
        contestants = [common.Contestant(way.name, way.run, len(samples), way.prepare) for way in ways]
        timings = common.race(contestants, options.repeats, clock=options.clock, take=options.take, warm_up=False)
        plain = timings["unpacked"].figure
        worst = min(worst, plain / timings[PACKED].figure)
        for way in ways:
            peak = common.peak_mib(lambda way=way: Way("", way.trainer, way.batches[:1]).run())
            seconds = timings[way.name].figure
            label = f"{method}, {way.name}"
            rows.append([label, f"{len(samples) / seconds:.3g}", f"{peak:,.0f}", f"{plain / seconds:.2f} x"])
    config = model.config
    title = (
        f"Packed preference training: {len(samples)} pairs in packs of {options.pack:,} tokens or batches of {size}, "
        f"{config.num_hidden_layers} layers of {config.hidden_size}, head of {config.vocab_size:,}"
    )
    headings = [
        "method",
        "samples a CPU second" if options.clock == "cpu" else "samples a second",
        "peak MiB, first batch",
        "to unpacked",
    ]
    notes = [_filling(packs, unpacked, options.pack), _sharing(samples, shared), _verdict(worst)]
    return common.Report(title, headings, rows, notes)


def _ways(
    method: str,
    model: Any,
    *,
    unpacked: Sequence[list[trainers.Sample]],
    packs: Sequence[Sequence[list[trainers.Sample]]],
    shared: Sequence[Sequence[list[trainers.Sample]]],
) -> list[Way]:
    def trainer(**settings: Any) -> Any:
        return trainers.plugin_trainer(deepcopy(model), method, **_settings(method), **settings)

    padded, packed = [_batch(method, part) for part in unpacked], [_batch(method, pack) for pack in packs]
    ways = [Way("unpacked", trainer(), padded), Way(PACKED, trainer(packed=True), packed)]
    if not torch.accelerator.is_available():  # there PACKED is what the attention that was asked for makes of packs
        ways.insert(1, Way("packed, mask of the whole pack", trainer(), packed))
    if model.config._attn_implementation == "sdpa":
        sharing = trainer(packed=True, share_prompt=True)
        ways.append(Way(SHARED, sharing, [_batch(method, pack, shared=True) for pack in shared]))
    return ways


def _settings(method: str) -> dict[str, Any]:
    return {"omega": 0.0} if method.startswith("deft_") else {}


def _batch(method: str, samples: Any, *, shared: bool = False) -> Batch:
    columns: dict[str, Any] = {"ranks": lambda sample: [float(number) for number in range(len(sample.responses))]}
    if method == "deft_dpo":
        # about what a policy that has learnt nothing gives
        columns["reference_sum_logps"] = lambda sample: [-10.4 * len(response) for response in sample.responses]
    return trainers.batch(method, samples, shared=shared, **columns)


def _batches(samples: Sequence[trainers.Sample], tokens: int) -> tuple[int, list[list[trainers.Sample]]]:
    """Samples in random order, as many in a batch as make its tokens, padding included, closest to a pack's."""
    shuffled = random.Random(common.SEED).sample(list(samples), len(samples))

    def cut(size: int) -> list[list[trainers.Sample]]:
        return [shuffled[start : start + size] for start in range(0, len(shuffled), size)]

    def distance(size: int) -> float:
        full = [part for part in cut(size) if len(part) == size]
        return abs(sum(map(_slots, full)) / len(full) - tokens)

    size = min(range(1, len(samples) + 1), key=distance)
    return size, cut(size)


def _slots(samples: Sequence[trainers.Sample]) -> int:
    """Tokens of an unpacked batch, padding included."""
    lengths = [len(sample.prompt) + len(response) for sample in samples for response in sample.responses]
    return len(lengths) * -(-max(lengths) // trainers.MULTIPLE) * trainers.MULTIPLE


def _filling(packs: Sequence[Any], unpacked: Sequence[list[trainers.Sample]], tokens: int) -> str:
    used = sum(len(sample) for part in unpacked for sample in part)
    slots = sum(map(_slots, unpacked))
    padded = sum(-(-sum(map(len, pack[0])) // trainers.MULTIPLE) * trainers.MULTIPLE for pack in packs)
    return (
        f"{used:,} tokens; unpacked {len(unpacked)} batches of {slots / len(unpacked):,.0f} tokens on average, "
        f"{used / slots:.0%} of them real; {len(packs)} packs of at most {tokens:,}, {used / padded:.0%} real"
    )


def _sharing(samples: Sequence[trainers.Sample], packs: Sequence[Any]) -> str:
    whole, once = sum(map(len, samples)), sum(sample.shared for sample in samples)
    return f"prompts shared: {once:,} tokens ({1 - once / whole:.0%} fewer) in {len(packs)} packs"


def _verdict(worst: float) -> str:
    said = "met" if worst >= TARGET else "missed"
    return f"{PACKED}, at least {worst:.2f} x the unpacked samples a second (target {TARGET}: {said})"


def _check_losses(ways: Sequence[Way]) -> None:
    expected, budget = ways[0].losses(), SAME[next(ways[0].trainer.model.parameters()).dtype]
    for way in ways[1:]:
        found = way.losses()
        torch.testing.assert_close(found, expected, rtol=budget, atol=budget * float(expected.abs().max()))


if __name__ == "__main__":
    main()
