"""The trainer of sample means: transformers', with a method's step where the cross entropy was.

Nothing here knows Axolotl. A host's own trainer goes before it in the method resolution order.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from poft_plugin.attention.shared import check_shared_prompts, use_shared_attention
from poft_plugin.data.collate import GROUP_IDS, SEQUENCE_IDS
from poft_plugin.data.columns import ROW_INDEX, ROW_KEY, ROW_NUMBER, SCORES, SOURCE
from poft_plugin.hosts.dropout import check_no_chance
from poft_plugin.hosts.finite import BeforeOptimizer, FiniteSteps
from poft_plugin.losses import LanguageModel, install_response_forward, mean_logps, response_positions, sum_logps
from poft_plugin.losses.head import check_head
from poft_plugin.trainers.metrics import MetricSums, merged
from poft_plugin.trainers.step import Metric, SequenceBatch, Step, StepOutput

LOG = get_logger("axolotl.poft_plugin")  # Axolotl shows messages of its own namespace only

PERPLEXITIES = ("ppl", "eval_ppl")
"""exp(loss), which Axolotl logs: no perplexity, where the loss is no cross entropy."""

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")

STARVED = 0.05
STARVED_LOGS = 5


class SampleMeanTrainer(Trainer):
    """Trains with the mean of per-sample losses over the whole optimizer step.

    All micro-batches of a step and all ranks are one mean: it does not matter how samples fall into packs,
    micro-batches, accumulation windows or processes. `set_up` is called before the constructor's own work begins.
    """

    step: Step
    columns: tuple[str, ...]
    parts: LanguageModel

    def set_up(
        self,
        model: nn.Module,
        *,
        step: Step,
        columns: tuple[str, ...],
        discrepancy: Tensor | None = None,
        share_prompts: bool = False,
        without_dropout: bool = False,
    ) -> None:
        """Teaches the model to answer with log-probabilities and takes the method's step.

        Args:
            model: the policy, not yet wrapped for training.
            step: of the method.
            columns: names of the numbers that a batch carries for each sequence.
            discrepancy: `(V,)`, where the step wants distribution rewards.
            share_prompts: whether packs hold the prompt of a sample once, for all of its responses.
            without_dropout: whether dropout was taken out of the model: checked before the first step.
        """
        self.step, self.columns, self.share_prompts = step, columns, share_prompts
        if share_prompts:
            use_shared_attention(model)
        self.parts = install_response_forward(model, discrepancy)
        self.training_sums = MetricSums()
        self.without_dropout, self.head_checked, self.starved = without_dropout, False, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finite = FiniteSteps(self.accelerator, self._name_row)
        self.add_callback(BeforeOptimizer(self._check_gradients))
        # our loss is already divided by the samples of the step: it must not be divided by the accumulation too
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's part of the step's mean: `sum of its losses / samples of the step * processes`.

        Gradients are averaged over processes afterwards, which takes the last factor out again.
        """
        output = self.step_output(model, inputs)
        self.training_sums.add(output.metrics)
        self.finite.add(output.losses, _sample_indices(inputs))
        if self.accelerator.sync_gradients:
            self.finite.check_losses(self.state.global_step + 1)
        if num_items_in_batch is None:
            return (output.losses.mean(), {}) if return_outputs else output.losses.mean()
        loss = output.losses.sum() * self.accelerator.num_processes / num_items_in_batch
        return (loss, {}) if return_outputs else loss

    def step_output(self, model: nn.Module, inputs: Mapping[str, Any]) -> StepOutput:
        """Per-sample losses and metrics of a batch: one forward, the head on response tokens only."""
        missing = [name for name in (SEQUENCE_IDS, *self.columns) if name not in inputs]
        if missing:
            raise ValueError(f"a batch without {', '.join(missing)}: the data set did not come through the plugin")
        self._check_head_once(model, inputs["input_ids"].device)
        positions, targets, numbers = response_positions(
            inputs["labels"], inputs[SEQUENCE_IDS], inputs.get("position_ids") if self.share_prompts else None
        )
        given = {name: inputs[name] for name in MODEL_INPUTS if inputs.get(name) is not None}
        answer = model(**given, use_cache=False, response_positions=positions, response_targets=targets)
        logps, scores = answer if isinstance(answer, tuple) else (answer, None)
        groups, numbers = inputs[GROUP_IDS], numbers.to(logps.device)
        sums, counts = sum_logps(logps, numbers, len(groups))
        rewards = None if scores is None else mean_logps(scores, numbers, len(groups))[0]
        columns = {name: inputs[name] for name in (*self.columns, SCORES) if name in inputs}
        return self.step(SequenceBatch(sums, counts, groups, columns, rewards))

    def _check_head_once(self, model: nn.Module, device: torch.device) -> None:
        if not self.head_checked:
            policy: Any = self.model
            vocabulary = int(policy.config.get_text_config().vocab_size)
            check_head(model, self.parts.transform, vocabulary, device)
            if self.share_prompts:
                check_shared_prompts(model, vocabulary, device)
            if self.without_dropout:
                check_no_chance(model, vocabulary, device)
            self.head_checked = True

    def _check_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if self.accelerator.scaler is not None:
            return  # it leaves out the step itself
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # not its norm: DeepSpeed writes -1 for one that is not finite
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            gradients = [p.grad for p in parameters if p.grad is not None]
        else:
            gradients = [torch.as_tensor(self._norm)]
        self.finite.check_gradients(self.state.global_step + 1, gradients)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        return self._norm

    def _name_row(self, index: int) -> str:
        rows: Any = self.train_dataset
        row = rows[list(rows[ROW_INDEX]).index(index)]
        return f"{row[SOURCE]} row {row[ROW_NUMBER]} (key {row[ROW_KEY]})"

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Any]], device: torch.device) -> Tensor:
        """Samples in all micro-batches of the optimizer step, over all ranks."""
        samples = sum(int(batch[GROUP_IDS].max()) + 1 for batch in batch_samples)
        count = torch.tensor(samples, dtype=torch.int64, device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Keeps every sample's loss and metrics under its row index; the mean is taken at the end."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = self.step_output(model, inputs)
        values = {"loss": Metric(output.losses), **output.metrics}
        for sample, index in enumerate(_sample_indices(inputs)):
            self.evaluated.append((index, {name: _one(metric, sample) for name, metric in values.items()}))
        return output.losses.mean(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Means over every evaluation row, each once, whatever the launcher repeats to even out ranks."""
        self.evaluated: list[tuple[int, dict[str, Metric]]] = []
        kwargs["metric_key_prefix"] = metric_key_prefix
        output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        everywhere = gather_object(self.evaluated) if self.args.world_size > 1 else self.evaluated
        sums = MetricSums()
        sums.add(merged(everywhere))
        averages = sums.pop(lambda tensor: tensor)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in averages.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the method's averages over the logged steps and all ranks; takes perplexities out."""
        for name in PERPLEXITIES:
            logs.pop(name, None)
        if "loss" in logs:
            averages = self.training_sums.pop(lambda tensor: self.accelerator.reduce(tensor, reduction="sum"))
            logs |= averages
            self._warn_if_starved(averages)
        super().log(logs, *args, **kwargs)

    def _warn_if_starved(self, averages: Mapping[str, float]) -> None:
        coefficient = averages.get("poft/coefficient")
        self.starved = self.starved + 1 if coefficient is not None and coefficient < STARVED else 0
        if self.starved == STARVED_LOGS:
            LOG.warning(
                f"the mean coefficient has stayed below {STARVED} for {STARVED_LOGS} logs: rows hardly train. The "
                "policy beats its references by far (compare poft/policy_reward with poft/reference_reward); a wrong "
                "chat template of a reference looks like that, too: `axolotl poft score CONFIG --show 3`"
            )


def _sample_indices(inputs: Mapping[str, Any]) -> list[int]:
    first = torch.unique_consecutive(inputs[GROUP_IDS], return_counts=True)[1].cumsum(0).roll(1)
    first[0] = 0
    return [int(index) for index in inputs[ROW_INDEX][first].tolist()]


def _one(metric: Metric, sample: int) -> Metric:
    part = slice(sample, sample + 1)
    weights = None if metric.weights is None else metric.weights[part].cpu()
    return Metric(metric.values[part].detach().cpu(), weights, metric.with_std)
