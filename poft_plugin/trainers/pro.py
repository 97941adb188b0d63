"""The step of `rl: pro`, and of the method inside `rl: deft_pro`."""

from dataclasses import dataclass

from poft_plugin.config import RankingConfig
from poft_plugin.data.columns import RANKS, SCORES
from poft_plugin.trainers.ranked import Ranked
from poft_plugin.trainers.step import LossFunction, Metric, SequenceBatch, StepOutput, StepSetup


@dataclass(frozen=True)
class ProStep:
    """PRO on one micro-batch (DEFT's Eq. 11 and 12).

    Args:
        loss: per-sample loss of `(mean_logps, mask, *, ranks, rewards)`.
        sft_weight: factor of the best response's summed SFT loss.
        by_reward: PRO's released form: temperatures from score differences, and the SFT weight times `(C - 1)^2`.
    """

    loss: LossFunction
    sft_weight: float
    by_reward: bool = False

    def __call__(self, batch: SequenceBatch) -> StepOutput:
        """Losses `(G,)`, and what the log shows."""
        ranked = Ranked.of(batch)
        rewards = ranked.column(SCORES) if self.by_reward else None
        losses = self.loss(ranked.mean_logps, ranked.mask, ranks=ranked.column(RANKS), rewards=rewards)
        sft = ranked.sft_losses
        factor = (ranked.mask.sum(1).to(sft.dtype) - 1) ** 2 if self.by_reward else 1
        metrics = {"pro/loss": Metric(losses.detach()), "sft/loss": Metric(sft.detach())}
        return StepOutput(losses + self.sft_weight * factor * sft, metrics | ranked.ranking_metrics(ranked.mean_logps))


def pro_step(setup: StepSetup) -> ProStep:
    """The step of a run, from its `deft:` block."""
    settings = setup.settings
    assert isinstance(settings, RankingConfig)
    assert settings.sft_weight is not None
    return ProStep(setup.loss, settings.sft_weight, by_reward=settings.pro_temperature == "reward")
