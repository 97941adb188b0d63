"""The host contract, part 5: packing, step counts, packed attention. See `test_contract.py`."""

from __future__ import annotations

from contract_support import (
    WORDS,
    host_fact,
    only_plugins,
    pack_without_garbage_collection,
    tiny_llama,
    tiny_tokenizer,
    token_row,
    valid_config,
)

# isort: split
# (the line above sets the environment, before Axolotl is imported)
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.integrations.base import BasePlugin
from axolotl.integrations.config import merge_training_args
from axolotl.utils.collators import DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq
from axolotl.utils.samplers import MultipackBatchSampler, get_dataset_lengths
from axolotl.utils.trainer import add_position_ids, calculate_total_num_steps, process_datasets_for_packing
from datasets import Dataset

COLLATE = "data/collate.py, hosts/axolotl/collators.py"
DATASETS = "hosts/axolotl/datasets.py"


@pytest.fixture(autouse=True)
def quick_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    pack_without_garbage_collection(monkeypatch)


@dataclass
class LateMixin:
    late_value: int = 0


class LatePlugin(BasePlugin):
    """Brings a training argument, registered after the import of `axolotl.core.training_args`."""

    def get_training_args_mixin(self) -> str:
        return f"{__name__}.LateMixin"


@host_fact(
    "a packed batch reaches the collator as a list (bins) of lists (rows); every column is concatenated",
    breaks=f"{COLLATE}: features would have another nesting than ours takes apart",
    look="axolotl/utils/collators/batching.py V2BatchSamplerDataCollatorForSeq2Seq",
)
def test_packed_collator_concatenates_each_column() -> None:
    rows = [token_row(7, 8), token_row(9, 10, 11), token_row(12, 13)]
    for row in rows:
        del row["attention_mask"]
    collate = V2BatchSamplerDataCollatorForSeq2Seq(tiny_tokenizer(), pad_to_multiple_of=6)
    batch = collate([[rows[0], rows[1]], [rows[2]]])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[7, 8, 9, 10, 11, 3], [12, 13, 3, 3, 3, 3]]
    assert batch["labels"].tolist() == [[7, 8, 9, 10, 11, -100], [12, 13, -100, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3]]


@pytest.mark.parametrize("value", [0.5, "key"])
@host_fact(
    "a scalar column breaks the packed collator, a string column too",
    breaks=f"{COLLATE}: ours are taken out first; if the host copes now, check what it makes of them",
    look="axolotl/utils/collators/batching.py V2BatchSamplerDataCollatorForSeq2Seq",
)
def test_packed_collator_refuses_scalar_columns(value: float | str) -> None:
    collate = V2BatchSamplerDataCollatorForSeq2Seq(tiny_tokenizer())
    with pytest.raises(ValueError, match="zero-dimensional arrays cannot be concatenated"):
        collate([[token_row(7, 8, score=value), token_row(9, 10, score=value)]])


@host_fact(
    "the unpacked collator pads labels and position_ids, and turns a scalar column into a (B,) tensor",
    breaks=f"{COLLATE}: the unpacked path hands the host's columns on to it",
    look="axolotl/utils/collators/batching.py DataCollatorForSeq2Seq",
)
def test_unpacked_collator_pads() -> None:
    rows = [{"input_ids": [7, 8], "labels": [-100, 8], "score": 0.5}, {"input_ids": [9], "labels": [9], "score": 1.5}]
    batch = DataCollatorForSeq2Seq(tiny_tokenizer(), pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[7, 8, 3, 3], [9, 3, 3, 3]]
    assert batch["labels"].tolist() == [[-100, 8, -100, -100], [9, -100, -100, -100]]
    assert batch["score"].tolist() == [0.5, 1.5]


@pytest.mark.parametrize("batched", [False, True])
@host_fact(
    "add_position_ids overwrites position ids that restart inside a row",
    breaks=f"{DATASETS}: rows that hold a group of sequences get position_ids and length after the host's "
    "preparation; if the host keeps them now, that order no longer matters",
    look="axolotl/utils/trainer.py add_position_ids",
)
def test_add_position_ids_overwrites_restarts(batched: bool) -> None:
    ids, positions = [5, 6, 7, 8, 9], [0, 1, 2, 0, 1]
    sample = {"input_ids": [ids], "position_ids": [positions]} if batched else {"input_ids": ids}
    added = add_position_ids({"position_ids": positions, **sample})
    assert added["position_ids"] == ([[0, 1, 2, 3, 4]] if batched else [0, 1, 2, 3, 4])
    assert added["length"] == ([5] if batched else 5)


@host_fact(
    "a row's length is its `length` column; without one it is the last position id + 1, wrong for a group",
    breaks=f"{DATASETS}: rows that hold a group of sequences need a `length` beside their position_ids",
    look="axolotl/utils/samplers/utils.py get_dataset_lengths",
)
def test_lengths_come_from_the_length_column() -> None:
    group = {"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 2, 0, 1]}
    assert get_dataset_lengths(Dataset.from_list([group])).tolist() == [2]
    assert get_dataset_lengths(Dataset.from_list([{**group, "length": 5}])).tolist() == [5]


@host_fact(
    "the preparation for packing keeps extra columns, scalar ones too",
    breaks=f"{DATASETS}: row keys and scores travel as columns",
    look="axolotl/utils/trainer.py process_datasets_for_packing",
)
def test_packing_preparation_keeps_columns() -> None:
    rows = [{"input_ids": [7, 8], "labels": [7, 8], "row_key": "key", "score": 0.5}]
    packed, _ = process_datasets_for_packing(valid_config(sample_packing=True), Dataset.from_list(rows), None)
    assert set(packed.column_names) == {"input_ids", "labels", "row_key", "score", "position_ids", "length"}


@host_fact(
    "calculate_total_num_steps reuses total_num_tokens and sample_packing_eff_est from the config",
    breaks=f"{DATASETS} _count_steps resets them, and total_supervised_tokens, after the filters",
    look="axolotl/utils/trainer.py calculate_total_num_steps",
)
def test_step_count_leans_on_cached_totals() -> None:
    cfg = valid_config(sample_packing=True, sequence_len=8)
    rows = [token_row(7, 8, 9, 10)] * 40
    assert calculate_total_num_steps(cfg, Dataset.from_list(rows)) == 20  # two rows to a bin
    assert (cfg.total_num_tokens, cfg.total_supervised_tokens, cfg.sample_packing_eff_est) == (160, 160, 1.0)
    filtered = Dataset.from_list(rows[:10])
    assert calculate_total_num_steps(cfg, filtered) > 15
    cfg.total_num_tokens = cfg.total_supervised_tokens = cfg.sample_packing_eff_est = None
    assert calculate_total_num_steps(cfg, filtered) == 5


@pytest.mark.parametrize(("rows", "batches"), [(2, 0), (4, 1), (5, 1)])
@host_fact(
    "the multipack sampler gives batches of bins of row indices, and drops the last batch if it lacks a bin",
    breaks="hosts/axolotl/trainer.py _create_multipack_sampler keeps the last packs: with micro_batch_size 2 and rows "
    "that fit one bin there would be no batch at all",
    look="axolotl/utils/samplers/multipack.py MultipackBatchSampler; core/trainers/base.py drop_last=True",
)
def test_multipack_drops_the_last_incomplete_batch(rows: int, batches: int) -> None:
    sampler = MultipackBatchSampler(
        range(rows), batch_size=2, batch_max_len=8, lengths=np.array([4] * rows), bin_size=200, num_processes=1
    )
    drawn = list(sampler)
    assert len(drawn) == batches
    assert all(len(bins) == 2 for bins in drawn)
    sampler.drop_last, sampler._batches, sampler._len_across_ranks = False, None, None
    assert len(sampler) == math.ceil(rows / 4)  # what our trainer makes of it
    assert len({row for bins in drawn for bin_ in bins for row in bin_}) == min(rows, 4 * batches)


@pytest.mark.parametrize(
    ("attention", "apart"),
    [("sdpa", True), ("eager", True), ("flash_attention_2", True), ("flex_attention", True), (None, False)],
)
@host_fact(
    "cfg.attn_decontaminates_packing says whether the sequences of a pack are kept apart",
    breaks="hosts/axolotl/checks.py check_packing: a run whose sequences see each other would start",
    look="axolotl/utils/schemas/config.py attn_decontaminates_packing",
)
def test_config_says_whether_packs_are_isolated(attention: str | None, apart: bool) -> None:
    assert valid_config(sample_packing=True, attn_implementation=attention).attn_decontaminates_packing is apart


@host_fact(
    "training-args mixins are merged once, when axolotl.core.training_args is imported",
    breaks="hosts/axolotl/plugin.py imports nothing of axolotl.core at the top: another plugin's mixin, "
    "registered after ours, would be left out",
    look="axolotl/core/training_args.py AxolotlTrainingMixins; integrations/config.py merge_training_args",
)
def test_training_args_freeze_on_import() -> None:
    with only_plugins(LatePlugin()):
        assert issubclass(merge_training_args(), LateMixin)
        assert not issubclass(AxolotlTrainingArguments, LateMixin)


def restarting(*sizes: int) -> torch.Tensor:
    """Position ids (1, T) that restart with every segment."""
    return torch.cat([torch.arange(size) for size in sizes]).unsqueeze(0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@host_fact(
    "Transformers finds packed sequences by restarting position ids when there is no attention mask",
    breaks="every packed batch of ours: the sequences of a pack, and of a group, would see each other",
    look="transformers/masking_utils.py find_packed_sequence_indices, create_causal_mask",
)
def test_packed_logits_equal_separate_forwards(attention: str) -> None:
    model = tiny_llama()
    model.set_attn_implementation(attention)
    first, second = torch.tensor([[7, 8, 9]]), torch.tensor([[10, 11, 12, 13]])
    packed = torch.cat([first, second], dim=1)
    with torch.no_grad():
        separate = torch.cat([model(input_ids=ids).logits for ids in (first, second)], dim=1)
        together = model(input_ids=packed, position_ids=restarting(3, 4), use_cache=False).logits
        leaking = model(input_ids=packed, position_ids=restarting(7), use_cache=False).logits
    torch.testing.assert_close(together, separate)
    assert not torch.allclose(leaking, separate, atol=1e-4)


@host_fact(
    "a causal model's forward takes logits_to_keep, a number or an index tensor",
    breaks="losses/head.py: logits of few positions could not be had through the wrapped model",
    look="transformers models/llama/modeling_llama.py LlamaForCausalLM.forward",
)
def test_forward_takes_logits_to_keep() -> None:
    model, ids = tiny_llama(), torch.tensor([[7, 8, 9, 10]])
    keep = torch.tensor([1, 3])
    with torch.no_grad():
        full = model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=keep).logits, full[:, keep])
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=2).logits, full[:, -2:])
    assert full.shape == (1, 4, len(WORDS))
