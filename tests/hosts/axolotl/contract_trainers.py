"""Stand-ins for our trainer, collator and plugin, which note what the host hands them."""

from __future__ import annotations

from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput


class NotingCollator:
    """Takes the host's arguments and notes which columns its features have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.columns: set[str] = set()

    def __call__(self, features: list[Any]) -> dict[str, torch.Tensor]:
        first = features[0]
        self.columns = set((first[0] if isinstance(first, list) else first).keys())
        rows = len(features)
        return {"input_ids": torch.zeros(rows, 1, dtype=torch.long), "labels": torch.zeros(rows, 1, dtype=torch.long)}


class Below(Trainer):
    """Stands between AxolotlTrainer and Trainer in the MRO; notes what reaches it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.reached: list[tuple[str, Any]] = []
        super().__init__(*args, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.reached.append(("log", dict(logs)))

    def compute_loss(self, model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
        self.reached.append(("compute_loss", options))
        return torch.tensor(8.0, requires_grad=True)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> tuple[Any, None, None]:
        self.reached.append(("prediction_step", args))
        return torch.tensor(8.0), None, None

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        self.reached.append(("evaluation_loop", options["metric_key_prefix"]))
        return EvalLoopOutput(None, None, {"ours": 8.0}, 3)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        self.reached.append(("num_items", [len(batch["labels"]) for batch in batch_samples]))
        return 42


class Ours(AxolotlTrainer, Below):
    """The MRO that our trainer has."""


class RowCountLoss(AxolotlTrainer):
    """A loss that is the number of rows of the batch."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        self.num_items = options["num_items_in_batch"]
        loss = torch.tensor(float(len(inputs["labels"])), requires_grad=True)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        return 100 * len(batch_samples)


class KnowsTheTrainer(TrainerCallback):
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer


class TrainingPlugin(BasePlugin):
    """A plugin with a fixed answer to each hook of the builder."""

    def __init__(
        self, trainer_cls: type | None, collator: tuple[type, dict] | None, training_args: dict | None
    ) -> None:
        super().__init__()
        self.trainer_cls, self.collator, self.training_args = trainer_cls, collator, training_args

    def get_trainer_cls(self, cfg: DictDefault) -> type | None:
        return self.trainer_cls

    def get_collator_cls_and_kwargs(self, cfg: DictDefault, is_eval: bool = False) -> tuple[type, dict] | None:
        return None if self.collator is None else (self.collator[0], {**self.collator[1], "is_eval": is_eval})

    def get_training_args(self, cfg: DictDefault) -> dict | None:
        return self.training_args

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        return [KnowsTheTrainer(trainer)]
