"""The step of `rl: rrhf`, and of the method inside `rl: deft_rrhf`."""

from dataclasses import dataclass

from poft_plugin.config import RankingConfig
from poft_plugin.data.columns import RANKS
from poft_plugin.trainers.ranked import Ranked
from poft_plugin.trainers.step import LossFunction, Metric, SequenceBatch, StepOutput, StepSetup


@dataclass(frozen=True)
class RrhfStep:
    """RRHF on one micro-batch (DEFT's Eq. 8 to 10).

    Args:
        loss: per-sample loss of `(mean_logps, mask, *, ranks)`.
        sft_weight: factor of the best response's summed SFT loss.
    """

    loss: LossFunction
    sft_weight: float

    def __call__(self, batch: SequenceBatch) -> StepOutput:
        """Losses `(G,)`, and what the log shows."""
        ranked = Ranked.of(batch)
        losses, sft = self.loss(ranked.mean_logps, ranked.mask, ranks=ranked.column(RANKS)), ranked.sft_losses
        metrics = {"rrhf/loss": Metric(losses.detach()), "sft/loss": Metric(sft.detach())}
        return StepOutput(losses + self.sft_weight * sft, metrics | ranked.ranking_metrics(ranked.mean_logps))


def rrhf_step(setup: StepSetup) -> RrhfStep:
    """The step of a run, from its `deft:` block."""
    assert isinstance(setup.settings, RankingConfig)
    assert setup.settings.sft_weight is not None
    return RrhfStep(setup.loss, setup.settings.sft_weight)
