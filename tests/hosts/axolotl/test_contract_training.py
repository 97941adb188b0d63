"""The host contract, part 6: the SFT builder and the trainer. See `test_contract.py`."""

from __future__ import annotations

from contract_support import (
    SINCE_0_20,
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.core.builders import HFCausalTrainerBuilder
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.monkeypatch.data import batch_dataset_fetcher
from axolotl.utils.collators import V2BatchSamplerDataCollatorForSeq2Seq
from contract_trainers import KnowsTheTrainer, NotingCollator, Ours, RowCountLoss, TrainingPlugin
from datasets import Dataset

PLUGIN, TRAINER = "hosts/axolotl/plugin.py", "hosts/axolotl/trainer.py"
BUILDER = "axolotl/core/builders/causal.py HFCausalTrainerBuilder"
Build = Callable[..., AxolotlTrainer]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """A function that builds a trainer the way `axolotl train` does, with one plugin."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    pack_without_garbage_collection(monkeypatch)
    batch_dataset_fetcher.apply_multipack_dataloader_patch()  # as the host's model loader does when packing

    def make(
        trainer_cls: type | None = None,
        collator: tuple[type, dict] | None = None,
        training_args: dict | None = None,
        **changes: Any,
    ) -> AxolotlTrainer:
        settings = {"output_dir": str(tmp_path), "plugins": ["ours"], "eval_batch_size": 2, "save_strategy": "no"}
        with only_plugins(TrainingPlugin(trainer_cls, collator, training_args)):
            builder = HFCausalTrainerBuilder(valid_config(**settings, **changes), tiny_llama(), tiny_tokenizer())
            builder.train_dataset = Dataset.from_list([token_row(7, 8, 9, 10, score=0.5)] * 8)
            builder.eval_dataset = builder.train_dataset.select(range(3))
            return builder.build(total_num_steps=2)

    yield make
    batch_dataset_fetcher.remove_multipack_dataloader_patch()


def first_batch(trainer: AxolotlTrainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


@host_fact(
    "the builder takes the plugin's trainer class, and its training args last: they override the config's",
    breaks=f"{PLUGIN} get_trainer_cls, get_training_args: remove_unused_columns and dataloader_drop_last",
    look=f"{BUILDER}.build, _get_trainer_cls",
)
def test_plugin_training_args_come_last(build: Build) -> None:
    chosen = {"remove_unused_columns": False, "dataloader_drop_last": False}
    trainer = build(Ours, None, chosen, remove_unused_columns=True, dataloader_drop_last=True)
    assert type(trainer) is Ours
    assert (trainer.args.remove_unused_columns, trainer.args.dataloader_drop_last) == (False, False)
    assert trainer.axolotl_cfg.remove_unused_columns is True


@host_fact(
    "the builder sets max_steps to the estimated number of steps, unless a plugin's training args say otherwise",
    breaks=f"{PLUGIN} get_training_args: a low estimate would end training inside the last epoch",
    look="axolotl/core/builders/base.py _set_base_training_args",
)
def test_max_steps_is_an_estimate(build: Build) -> None:
    assert build().args.max_steps == 2
    assert build(None, None, {"max_steps": -1}).args.max_steps == -1


@host_fact(
    "add_callbacks_post_trainer is asked when the trainer exists, and its callbacks are added",
    breaks=f"{PLUGIN} add_callbacks_post_trainer: our checks and reports during training would not run",
    look="axolotl/core/builders/base.py get_post_trainer_create_callbacks",
)
def test_callbacks_are_added_to_the_trainer(build: Build) -> None:
    trainer = build()
    added = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, KnowsTheTrainer)]
    assert [callback.trainer for callback in added] == [trainer]


@host_fact(
    "sample_packing with eval_sample_packing: false sets dataloader_drop_last, which also drops eval rows",
    breaks=f"{PLUGIN} get_training_args and {TRAINER} _get_dataloader set it back: metrics are means over every row",
    look=f"{BUILDER}.build; axolotl/core/trainers/base.py _get_dataloader",
)
def test_packing_without_eval_packing_drops_last(build: Build) -> None:
    assert build().args.dataloader_drop_last is False
    trainer = build(RowCountLoss, sample_packing=True, eval_sample_packing=False)
    assert trainer.args.dataloader_drop_last is True
    assert len(trainer.get_eval_dataloader()) == 1  # three rows, two to a batch


@host_fact(
    "collators get (tokenizer, padding=..., pad_to_multiple_of=..., return_tensors='pt', **ours), train and eval",
    breaks="hosts/axolotl/collators.py HostCollator.__init__",
    look=f"{BUILDER}.build_collator",
)
def test_collator_arguments(build: Build) -> None:
    trainer = build(None, (NotingCollator, {"ours": 1}), pad_to_sequence_len=True)
    expected = {"padding": True, "pad_to_multiple_of": 64, "ours": 1, "return_tensors": "pt"}
    for collator, is_eval in ((trainer.data_collator, False), (trainer.eval_data_collator, True)):
        assert [type(argument).__name__ for argument in collator.args] == [type(tiny_tokenizer()).__name__]
        assert collator.kwargs == {**expected, "is_eval": is_eval}


@pytest.mark.parametrize(
    ("changes", "training_args", "arrives"),
    [
        ({}, None, False),
        ({}, {"remove_unused_columns": False}, True),
        ({"sample_packing": True}, None, True),
    ],
)
@host_fact(
    "unpacked, columns that forward does not name are removed before the collator, unless "
    "remove_unused_columns is False; packed, they arrive",
    breaks=f"{PLUGIN} get_training_args: our columns would not reach the collator, silently",
    look="axolotl/core/trainers/base.py _get_dataloader; transformers Trainer._remove_unused_columns",
)
def test_our_columns_need_remove_unused_columns_off(
    changes: dict[str, Any], training_args: dict | None, arrives: bool, build: Build
) -> None:
    trainer = build(None, (NotingCollator, {}), training_args, **changes)
    first_batch(trainer)
    assert ("score" in trainer.data_collator.columns) is arrives
    assert "input_ids" in trainer.data_collator.columns
    assert "length" not in trainer.data_collator.columns


@host_fact(
    "packed batches of a Llama under sdpa carry restarting position_ids and no attention mask",
    breaks="hosts/axolotl/collators.py and the block-diagonal attention of every packed batch",
    look=f"axolotl/core/trainers/base.py _get_dataloader (sample_packing_drop_attention_mask); {BUILDER}.build",
)
def test_packed_batches_have_no_attention_mask(build: Build) -> None:
    trainer = build(sample_packing=True)
    trainer.train_dataset = trainer.train_dataset.remove_columns("score")
    assert type(trainer.data_collator) is V2BatchSamplerDataCollatorForSeq2Seq
    batch = first_batch(trainer)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"][0, :12].tolist() == [0, 1, 2, 3] * 3


@host_fact(
    "AxolotlTrainer averages nothing over devices, and counts no items: before 0.20 it sets model_accepts_loss_kwargs "
    "to False for every model; since then it stays True where the model's loss takes the number, Llama's for one",
    breaks=f"{TRAINER} sets it to True after super().__init__() and normalises by samples itself",
    look="axolotl/core/trainers/base.py AxolotlTrainer.__init__; core/builders/base.py average_tokens_across_devices",
)
def test_host_does_not_count_items(build: Build) -> None:
    trainer = build()
    assert trainer.model_accepts_loss_kwargs is SINCE_0_20
    assert trainer.args.average_tokens_across_devices is False
    counted = trainer._get_num_items_in_batch([first_batch(trainer)], trainer.args.device)
    assert counted == (3 if SINCE_0_20 else None)


@pytest.mark.parametrize(("accepts", "num_items", "divisor"), [(False, 7, 4), (True, None, 4), (True, 7, 1)])
@host_fact(
    "training_step divides by the accumulation count, unless the model accepts loss kwargs and items are counted",
    breaks=f"{TRAINER}: the loss of a step would be divided twice, or be a mean of micro-batch means",
    look="transformers Trainer.training_step",
)
def test_training_step_divides_unless_items_are_counted(
    accepts: bool, num_items: int | None, divisor: int, build: Build
) -> None:
    trainer = build(RowCountLoss)
    trainer.model_accepts_loss_kwargs = accepts
    trainer.current_gradient_accumulation_steps = 4
    batch = {"labels": torch.zeros(8, 2)}
    assert trainer.training_step(trainer.model, batch, num_items).item() == 8 / divisor
    assert trainer.num_items == num_items


@host_fact(
    "get_batch_samples asks _get_num_items_in_batch(batch_samples, device) about all micro-batches of a step; "
    "evaluation asks it about each batch alone",
    breaks=f"{TRAINER} _get_num_items_in_batch: the samples of a step would not be counted",
    look="transformers Trainer.get_batch_samples, prediction_step",
)
def test_items_are_counted_over_a_step(build: Build) -> None:
    trainer = build(Ours)
    batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 3, trainer.args.device)
    assert (len(batches), num_items) == (3, 42)
    assert trainer.reached == [("num_items", [1, 1, 1])]
    evaluating = build(RowCountLoss)
    evaluating.prediction_step(evaluating.model, batches[0], prediction_loss_only=True)
    assert evaluating.num_items == 100


@host_fact(
    "evaluate repeats each batch loss eval_batch_size times and averages what is left after cutting to the rows",
    breaks=f"{TRAINER} computes eval metrics from sums and counts; eval_loss is a sample mean only when batch "
    "losses are means over their rows",
    look="transformers Trainer.evaluation_loop",
)
def test_eval_loss_weighs_batches_by_rows(build: Build) -> None:
    trainer = build(RowCountLoss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx((2 + 2 + 1) / 3)


@pytest.mark.parametrize(("key", "added"), [("loss", "ppl"), ("eval_loss", "eval_ppl")])
@host_fact(
    "log adds ppl = exp(loss) to the logs before the next class in the MRO gets them",
    breaks=f"{TRAINER} takes it out there: meaningless for our losses",
    look="axolotl/core/trainers/base.py AxolotlTrainer.log",
)
def test_log_adds_perplexity_first(key: str, added: str, build: Build) -> None:
    trainer = build(Ours)
    trainer.log({key: 1.0})
    [(name, logs)] = trainer.reached
    assert name == "log"
    assert logs[added] == pytest.approx(torch.e, abs=1e-4)


@host_fact(
    "compute_loss counts tokens, then hands on to the next class in the MRO with its keywords; the counts are in the "
    "state once something is logged",
    breaks=f"{TRAINER}: our loss would not be called, or tokens per second be lost",
    look="axolotl/core/trainers/base.py AxolotlTrainer.compute_loss",
)
def test_compute_loss_counts_and_hands_on(build: Build) -> None:
    trainer = build(Ours)
    trainer.model.train()
    labels = torch.tensor([[-100, 8, 9, 10]])
    assert trainer.compute_loss(trainer.model, {"labels": labels}, num_items_in_batch=7).item() == 8.0
    assert trainer.reached == [("compute_loss", {"return_outputs": False, "num_items_in_batch": 7})]
    trainer.log({"loss": 8.0})
    assert trainer.state.tokens["trainable"].item() == 3
    assert trainer.state.tokens["total"].item() == 4


@host_fact(
    "evaluate calls evaluation_loop(metric_key_prefix=...) and reports its metrics; it and prediction_step reach "
    "the class between AxolotlTrainer and Trainer",
    breaks=f"{TRAINER}: our evaluation would not run; look for a mixin that does not call super()",
    look="axolotl/core/trainers/base.py AxolotlTrainer, core/trainers/mixins",
)
def test_evaluation_reaches_our_class(build: Build) -> None:
    trainer = build(Ours)
    trainer.prediction_step(trainer.model, {}, True)
    assert trainer.evaluate(metric_key_prefix="held_out")["ours"] == 8.0
    assert trainer.reached[:2] == [("prediction_step", (True,)), ("evaluation_loop", "held_out")]
