"""What the training benchmarks share: samples, a small Llama, batches, and trainers of the plugin and of its peers.

A trainer is built as the host builds it, but around a model and settings instead of a run: no data set, no optimizer.
"""

import argparse
import gzip
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.core.training_args import AxolotlTrainingArguments
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from benchmarks.common import SEED
from poft_plugin.config import DeftConfig, DpoKeys, PoftConfig, RankingConfig
from poft_plugin.hosts.axolotl.collators import host_collator
from poft_plugin.hosts.axolotl.run import MethodRun
from poft_plugin.hosts.axolotl.trainer import MethodTrainer, trainer_class
from poft_plugin.plugins import registry
from poft_plugin.preprocessors.grades import DISCREPANCY

PAD, EOS = 0, 2
ALPACA, HH_RLHF, TOKENIZER = "alpaca/alpaca.jsonl.gz", "hh_rlhf", "tokenizers/mistral-v3"
DATA_HELP = (
    f"Folder with {ALPACA}, {HH_RLHF}/*.jsonl.gz and {TOKENIZER}; without it, random tokens of like lengths are taken."
)
MULTIPLE = 64
"""What the host pads a batch's length to."""


@dataclass(frozen=True)
class Sample:
    """A prompt and its responses, best first, in tokens."""

    prompt: list[int]
    responses: list[list[int]]

    def __len__(self) -> int:
        """Tokens of all sequences."""
        return sum(len(self.prompt) + len(response) for response in self.responses)

    @property
    def shared(self) -> int:
        """Tokens where the prompt lies in a pack once."""
        return len(self.prompt) + sum(map(len, self.responses))


SIZES = {"tiny": (64, 2), "toy": (256, 4), "1b": (2048, 20)}
"""Hidden numbers and layers."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What the model is like: on a GPU, a real size in half precision."""
    parser.add_argument("--size", choices=["toy", "1b"], default="toy", help="toy for a CPU, 1b for a GPU.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="Weights.")
    parser.add_argument("--attention", default="sdpa", help="Its attn_implementation (default: sdpa).")


def model_of(vocabulary: int, options: argparse.Namespace, *, layers: int | None = None) -> LlamaForCausalLM:
    """The model that the options ask for, `layers` deep where it is a toy."""
    hidden, depth = SIZES["tiny" if options.small else options.size]
    depth = layers if layers is not None and options.size == "toy" and not options.small else depth
    model = llama(vocabulary, hidden=hidden, layers=depth, attention=options.attention)
    return model.to(getattr(torch, options.dtype)).to("cuda" if torch.cuda.is_available() else "cpu")


def on_device(trainer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a batch where the trainer's model is."""
    moved: dict[str, Any] = trainer._prepare_inputs(dict(inputs))
    return moved


def llama(vocabulary: int, *, hidden: int = 256, layers: int = 4, attention: str = "sdpa") -> LlamaForCausalLM:
    """A random Llama in float32, the same at each call."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attn_implementation=attention,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).train()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """What trainers want beside tokens: a padding token."""
    words = WordLevel({"<pad>": PAD, "<unk>": 1, "</s>": EOS}, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="</s>")


def alpaca(data: Path | None, count: int, *, vocabulary: int) -> list[Sample]:
    """Instructions with one answer each."""
    rng = random.Random(SEED)
    if data is None:
        return [_random_sample(rng, (12, 40), (10, 140), vocabulary, responses=1) for _ in range(count)]
    tokenizer = AutoTokenizer.from_pretrained(data / TOKENIZER)
    samples = []
    for row in rng.sample(_lines(data / ALPACA), count):
        prompt = f"[INST] {row['instruction']}\n{row['input']}".strip() + " [/INST]"
        answer = tokenizer.encode(row["output"], add_special_tokens=False)
        samples.append(Sample(tokenizer.encode(prompt), [[*answer, EOS]]))
    return samples


def hh_pairs(data: Path | None, count: int, *, vocabulary: int, longest: int = 768) -> list[Sample]:
    """Dialogues with a chosen and a rejected last turn, none longer than so many tokens."""
    rng = random.Random(SEED)
    if data is None:
        drawn = (_random_sample(rng, (20, 250), (10, 110), vocabulary, responses=2) for _ in range(count))
        return [sample for sample in drawn if _longest(sample) <= longest]
    tokenizer = AutoTokenizer.from_pretrained(data / TOKENIZER)
    rows = [row for path in sorted((data / HH_RLHF).glob("*.jsonl.gz")) for row in _lines(path)]
    samples: list[Sample] = []
    for row in rng.sample(rows, len(rows)):
        texts = [row[name].rpartition("\n\nAssistant:") for name in ("chosen", "rejected")]
        if texts[0][0] == texts[1][0] and texts[0][2] != texts[1][2]:
            answers = [[*tokenizer.encode(text[2], add_special_tokens=False), EOS] for text in texts]
            sample = Sample(tokenizer.encode(texts[0][0] + texts[0][1]), answers)
            samples += [sample] if _longest(sample) <= longest else []
        if len(samples) == count:
            break
    return samples


def packs(samples: Sequence[Sample], tokens: int, *, shared: bool = False) -> list[list[Sample]]:
    """First-fit packs of at most so many tokens, the last one too; with shared prompts, where they lie there once."""

    def length(sample: Sample) -> int:
        return sample.shared if shared else len(sample)

    bins: list[list[Sample]] = []
    free: list[int] = []
    for sample in sorted(samples, key=length, reverse=True):
        place = next((number for number, room in enumerate(free) if room >= length(sample)), None)
        if place is None:
            place = len(bins)
            bins.append([])
            free.append(tokens)
        bins[place].append(sample)
        free[place] -= length(sample)
    return bins


def batch(
    method: str, samples: Sequence[Sample] | Sequence[Sequence[Sample]], *, shared: bool = False, **columns: Any
) -> dict[str, Any]:
    """A micro-batch as the plugin's collator lays it out: of samples, or, packed, of packs of samples.

    Args:
        method: an rl type.
        samples: of the micro-batch.
        shared: whether each prompt lies in a pack once.
        columns: functions from a sample to its numbers, one per response.
    """
    packed = bool(samples) and not isinstance(samples[0], Sample)
    cfg = SimpleNamespace(sample_packing=packed)
    collator = host_collator(cfg, registry().methods[method], is_eval=False, frequencies_vary=False)
    collate = collator(tiny_tokenizer(), padding=True, pad_to_multiple_of=MULTIPLE, return_tensors="pt")
    numbered: list[Any] = [samples] if not packed else list(samples)
    rows = [[_row(sample, columns, shared=shared) for sample in pack] for pack in numbered]
    for row in [row for pack in rows for row in pack] if packed else []:
        del row["attention_mask"]  # as the host does: the model reads the packing off the position ids
    return collate(rows if packed else rows[0])


def _row(sample: Sample, columns: Mapping[str, Any], *, shared: bool) -> dict[str, Any]:
    prompt = len(sample.prompt)
    begins = [prompt if shared and place else 0 for place in range(len(sample.responses))]
    sequences = [sample.prompt[begin:] + own for begin, own in zip(begins, sample.responses, strict=True)]
    labels = [[-100] * (prompt - begin) + own for begin, own in zip(begins, sample.responses, strict=True)]
    positions = [range(begin, begin + len(ids)) for begin, ids in zip(begins, sequences, strict=True)]
    tokens = [token for sequence in sequences for token in sequence]
    return {
        "input_ids": tokens,
        "labels": [label for part in labels for label in part],
        "attention_mask": [1] * len(tokens),
        "position_ids": [position for part in positions for position in part],
        "sequence_lengths": [len(sequence) for sequence in sequences],
        "row_index": 0,
        **{name: values(sample) for name, values in columns.items()},
    }


def plugin_trainer(
    model: torch.nn.Module,
    method: str,
    *,
    packed: bool = False,
    discrepancy: np.ndarray | None = None,
    **settings: Any,
) -> MethodTrainer:
    """The plugin's trainer for an rl type, with settings of its config block and the defaults of the rest."""
    known = registry().methods[method]
    block: Any = {"poft": PoftConfig, "deft": DeftConfig}[known.block]
    if known.base is None and known.block == "deft":
        block = RankingConfig
    if block is PoftConfig:
        settings = {"references": [{"model": "none"}], **settings}
    filled = {**{name: value for name, value in known.defaults.items() if value is not None}, **settings}
    keys = None if known.keys is None else DpoKeys()
    run = MethodRun(known, block(**filled), (), keys)
    cfg: Any = SimpleNamespace(output_dir=tempfile.gettempdir(), sample_packing=packed)
    tensors = {} if discrepancy is None else {DISCREPANCY: discrepancy}
    trainer: MethodTrainer = trainer_class(run, cfg, tensors)(model, args=_arguments(AxolotlTrainingArguments))
    return trainer


def host_sft_trainer(model: torch.nn.Module) -> AxolotlTrainer:
    """The host's trainer of plain supervised fine-tuning."""
    return AxolotlTrainer(model=model, args=_arguments(AxolotlTrainingArguments))


def trl_sft_trainer(model: torch.nn.Module, loss_type: str = "chunked_nll") -> SFTTrainer:
    """TRL's supervised fine-tuning, which projects counted tokens only."""
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    args = _arguments(SFTConfig, loss_type=loss_type, max_length=None)
    return SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tiny_tokenizer())


def host_dpo_trainer(
    model: torch.nn.Module, reference: torch.nn.Module | None, *, precomputed: bool
) -> AxolotlDPOTrainer:
    """The host's `rl: dpo`, with a reference model beside the policy or with numbers computed before."""
    rows = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    args = _arguments(AxolotlDPOConfig, precompute_ref_log_probs=precomputed, max_length=None)
    return AxolotlDPOTrainer(
        model=model, ref_model=reference, args=args, train_dataset=rows, processing_class=tiny_tokenizer()
    )


def _arguments(kind: Any, **more: Any) -> Any:
    folder = tempfile.mkdtemp(prefix="benchmark-")
    quiet = {"report_to": [], "remove_unused_columns": False, "gradient_checkpointing": False, "bf16": False}
    return kind(output_dir=folder, use_cpu=not torch.cuda.is_available(), **quiet, **more)


def _random_sample(
    rng: random.Random, prompt: tuple[int, int], response: tuple[int, int], vocabulary: int, *, responses: int
) -> Sample:
    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(rng.randint(low, high))]

    return Sample(tokens(*prompt), [[*tokens(*response), EOS] for _ in range(responses)])


def _longest(sample: Sample) -> int:
    return len(sample.prompt) + max(len(response) for response in sample.responses)


def _lines(path: Path) -> list[Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
