"""The step of the method inside `rl: deft_sft`: the best response alone."""

from dataclasses import dataclass

from poft_plugin.config import RankingConfig
from poft_plugin.trainers.ranked import Ranked
from poft_plugin.trainers.step import LossFunction, Metric, SequenceBatch, StepOutput, StepSetup


@dataclass(frozen=True)
class SftStep:
    """SFT on the best responses of one micro-batch (DEFT's Eq. 9).

    Args:
        loss: per-sample loss of `(best_sum_logps)`.
        sft_weight: its factor.
    """

    loss: LossFunction
    sft_weight: float

    def __call__(self, batch: SequenceBatch) -> StepOutput:
        """Losses `(G,)`, and what the log shows."""
        ranked = Ranked.of(batch)
        losses = self.loss(ranked.best(batch.sum_logps))
        metrics = {"sft/loss": Metric(losses.detach())}
        return StepOutput(self.sft_weight * losses, metrics | ranked.ranking_metrics(ranked.mean_logps))


def sft_step(setup: StepSetup) -> SftStep:
    """The step of a run, from its `deft:` block."""
    assert isinstance(setup.settings, RankingConfig)
    assert setup.settings.sft_weight is not None
    return SftStep(setup.loss, setup.settings.sft_weight)
