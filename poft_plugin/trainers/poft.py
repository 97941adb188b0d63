"""The step of `rl: poft`."""

from dataclasses import dataclass

from poft_plugin.config import PoftConfig
from poft_plugin.data.columns import REFERENCE_LOGP
from poft_plugin.losses import poft_coefficient
from poft_plugin.trainers.step import LossFunction, Metric, SequenceBatch, StepOutput, StepSetup


@dataclass(frozen=True)
class PoftStep:
    """PoFT on one micro-batch (Eq. 6): each sample is one sequence.

    Args:
        loss: per-sample loss of `(policy_logp, reference_logp, *, beta, gamma)`.
        beta: the config's `poft.beta`.
        gamma: the config's `poft.gamma`.
    """

    loss: LossFunction
    beta: float = 1.0
    gamma: float = 0.0

    def __call__(self, batch: SequenceBatch) -> StepOutput:
        """Losses `(G,)`, and what the log shows."""
        policy = batch.mean_logps
        reference = batch.columns[REFERENCE_LOGP].to(policy.dtype)
        detached = policy.detach()
        coefficient = poft_coefficient(detached, reference, beta=self.beta, gamma=self.gamma)
        return StepOutput(
            losses=self.loss(policy, reference, beta=self.beta, gamma=self.gamma),
            metrics={
                "poft/policy_reward": Metric(detached),
                "poft/reference_reward": Metric(reference),
                "poft/coefficient": Metric(coefficient, with_std=True),
                "poft/win_rate": Metric((detached > reference).to(policy.dtype)),
                "poft/ce_loss": Metric(-detached, weights=batch.num_tokens),
            },
        )


def poft_step(setup: StepSetup) -> PoftStep:
    """The step of a run, from its `poft:` block."""
    assert isinstance(setup.settings, PoftConfig)
    return PoftStep(setup.loss, beta=setup.settings.beta, gamma=setup.settings.gamma)
