"""The one trainer: Axolotl's, with a method's step where the cross entropy was.

`SampleMeanTrainer` sits between `AxolotlTrainer` and transformers' `Trainer` in the method resolution order. So
Axolotl's own `compute_loss` still counts tokens, and its `log` still adds what it adds, before ours have the last word.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from torch import Tensor, nn

from poft_plugin.attention.packed import use_packed_attention
from poft_plugin.config import DeftConfig
from poft_plugin.data.columns import ROW_INDEX
from poft_plugin.hosts.axolotl.evaluation import evaluation_sets
from poft_plugin.hosts.axolotl.run import MethodRun
from poft_plugin.hosts.dropout import disable_dropout
from poft_plugin.hosts.sample_mean import SampleMeanTrainer
from poft_plugin.preprocessors.grades import DISCREPANCY, load_discrepancy


class MethodTrainer(AxolotlTrainer, SampleMeanTrainer):
    """Axolotl's trainer for one run of one method. `method_run`, `cfg` and `tensors` are set by `trainer_class`."""

    method_run: MethodRun
    cfg: DictDefault
    tensors: Mapping[str, np.ndarray]
    args: Any

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        run = self.method_run
        self.set_up(
            model,
            step=run.step(),
            columns=run.method.columns,
            discrepancy=self._discrepancy(),
            share_prompts=run.share_prompts,
            without_dropout=run.scores_start_policy,
        )
        if self.cfg.sample_packing and not run.share_prompts and not torch.accelerator.is_available():
            use_packed_attention(model)  # a model that is still on its way to a GPU keeps what was asked for
        if run.scores_start_policy:
            disable_dropout(model)
        self._evaluation_sets: dict[str, Dataset] = {}
        super().__init__(*args, model=model, **kwargs)
        self.model_accepts_loss_kwargs = True  # the host looks at the model's own forward and takes it back

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """Evaluation never drops its last rows, and every rank gets as many batches as the others.

        The host turns `even_batches` off for good when it builds a packed training loader; the ranks would then run
        the evaluation loop different numbers of times. Rows that are repeated to even them out count once.
        """
        if is_training:
            loader = super()._get_dataloader(dataset, *args, **{**kwargs, "is_training": True})
            if len(loader) == 0:
                raise ValueError(
                    f"nothing to train on: {len(dataset)} rows, packed into batches of micro_batch_size "
                    f"{self.args.per_device_train_batch_size} x sequence_len {self.args.max_seq_length}, are fewer "
                    f"batches than the {self.args.world_size} processes. Lower one of them"
                )
            return loader
        drop_last, even = self.args.dataloader_drop_last, self.accelerator.even_batches
        self.args.dataloader_drop_last, self.accelerator.even_batches = False, True
        try:
            return super()._get_dataloader(dataset, *args, **{**kwargs, "is_training": False})
        finally:
            self.args.dataloader_drop_last, self.accelerator.even_batches = drop_last, even

    def _create_multipack_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Keeps the last packs of an epoch where they do not fill a batch; the host would drop them.

        With several ranks the host's way stays: every rank has to see the same number of batches.
        """
        sampler = super()._create_multipack_sampler(*args, **kwargs)
        if self.args.world_size == 1:
            sampler.drop_last, sampler._batches, sampler._len_across_ranks = False, None, None
            len(sampler)
        return sampler

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates; data sets without the method's columns (`axolotl evaluate`) give way to the training run's."""
        if eval_dataset is not None and ROW_INDEX not in eval_dataset.column_names:
            if not self._evaluation_sets:
                self._evaluation_sets = evaluation_sets(self.cfg, self.method_run)
            eval_dataset = self._evaluation_sets[kwargs["metric_key_prefix"]]
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _discrepancy(self) -> Tensor | None:
        """DEFT's discrepancy distribution: this run's, or (`axolotl evaluate`) the training run's."""
        settings = self.method_run.settings
        if not isinstance(settings, DeftConfig) or not settings.omega:
            return None
        found = self.tensors.get(DISCREPANCY)
        return torch.from_numpy(load_discrepancy(Path(self.cfg.output_dir)) if found is None else found)


def trainer_class(run: MethodRun, cfg: DictDefault, tensors: Mapping[str, np.ndarray]) -> type[MethodTrainer]:
    """The trainer of a run, as a class: the host builds it itself and hands it nothing of ours."""
    return type("MethodTrainer", (MethodTrainer,), {"method_run": run, "cfg": cfg, "tensors": tensors})
