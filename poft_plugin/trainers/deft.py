"""The step of every `rl: deft_<method>`: the method's own, minus omega times the distribution reward."""

from dataclasses import dataclass

from poft_plugin.config import DeftConfig
from poft_plugin.trainers.ranked import Ranked
from poft_plugin.trainers.step import Metric, SequenceBatch, Step, StepOutput, StepSetup


@dataclass(frozen=True)
class DeftStep:
    """`L_m - omega * R_dis` on one micro-batch (Eq. 18).

    Args:
        base: the step of the method m.
        omega: factor of the distribution reward; at 0 the step is the method's own.
        over_all: take the reward's mean over all of a sample's responses, not the best one's.
    """

    base: Step
    omega: float
    over_all: bool = False

    def __call__(self, batch: SequenceBatch) -> StepOutput:
        """Losses `(G,)`, and what the log shows: the reward apart from the base loss, and weighted."""
        output = self.base(batch)
        if self.omega == 0:
            return output
        assert batch.distribution_rewards is not None, "the head was set up without a discrepancy distribution"
        ranked = Ranked.of(batch)
        values = batch.distribution_rewards.to(output.losses.dtype)
        rewards = ranked.average(values) if self.over_all else ranked.best(values)
        metrics = {
            "deft/distribution_reward": Metric(rewards.detach()),
            "deft/weighted_distribution_reward": Metric(self.omega * rewards.detach()),
        }
        return StepOutput(output.losses - self.omega * rewards, {**output.metrics, **metrics})


def deft_step(setup: StepSetup) -> DeftStep:
    """The step of a run, from its `deft:` block."""
    settings = setup.settings
    assert isinstance(settings, DeftConfig)
    assert settings.omega is not None
    assert setup.base is not None
    return DeftStep(setup.base, settings.omega, over_all=settings.reward_over == "all")
