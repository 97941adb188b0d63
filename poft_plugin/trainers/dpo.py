"""The step of the method inside `rl: deft_dpo`."""

from dataclasses import dataclass
from functools import partial

from poft_plugin.config import DpoKeys, RankingConfig
from poft_plugin.data.columns import RANKS, REFERENCE_SUM_LOGPS
from poft_plugin.losses import dpo_rewards
from poft_plugin.trainers.ranked import Ranked
from poft_plugin.trainers.step import LossFunction, Metric, SequenceBatch, StepOutput, StepSetup


@dataclass(frozen=True)
class DpoStep:
    """DPO on one micro-batch of pairs (DEFT's Eq. 5 and 6). No reference model: its numbers are a column.

    Args:
        loss: per-sample loss of `(policy_logps, reference_logps, *, num_tokens, ranks)`, its settings bound.
        beta: the host's `rl_beta`, for the logged rewards.
        sft_weight: factor of the chosen response's summed SFT loss.
    """

    loss: LossFunction
    beta: float
    sft_weight: float

    def __call__(self, batch: SequenceBatch) -> StepOutput:
        """Losses `(G,)`, and what the log shows."""
        ranked = Ranked.of(batch)
        policy, reference = ranked.sum_logps, ranked.column(REFERENCE_SUM_LOGPS)
        tokens, ranks = ranked.pad(batch.num_tokens), ranked.column(RANKS)
        losses, sft = self.loss(policy, reference, num_tokens=tokens, ranks=ranks), ranked.sft_losses
        rewards = dpo_rewards(policy, reference, beta=self.beta)
        metrics = {
            "dpo/loss": Metric(losses.detach()),
            "sft/loss": Metric(sft.detach()),
            "rewards/chosen": Metric(rewards[:, 0]),
            "rewards/rejected": Metric(rewards[:, 1]),
        }
        return StepOutput(losses + self.sft_weight * sft, metrics | ranked.ranking_metrics(rewards))


def dpo_step(setup: StepSetup) -> DpoStep:
    """The step of a run, from its `deft:` block and the host's DPO keys."""
    settings, keys = setup.settings, setup.keys
    assert isinstance(settings, RankingConfig)
    assert settings.sft_weight is not None
    assert isinstance(keys, DpoKeys)
    loss = partial(
        setup.loss,
        beta=keys.rl_beta,
        loss_types=keys.dpo_loss_type,
        loss_weights=keys.dpo_loss_weights,
        label_smoothing=keys.dpo_label_smoothing,
    )
    return DpoStep(loss, keys.rl_beta, settings.sft_weight)
