"""The block `deft:`, and the host's top-level keys that `deft_dpo` reads."""

from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from poft_plugin.config.blocks import Block
from poft_plugin.config.poft import MOST_BETA
from poft_plugin.config.scoring import ScoringBlock

DpoLossType = Literal["sigmoid", "hinge", "ipo", "robust"]


class RewardModelConfig(Block):
    """The reward model that grades responses: a sequence-classification head with one label."""

    model: str = Field(description="Hub id or local folder of the reward model.")
    revision: str | None = Field(None, description="Hub revision; resolved to a commit before anything is keyed by it.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights' dtype; `auto`: as the checkpoint says."
    )
    attn_implementation: str | None = Field(
        None, description="transformers' attention implementation; null: its own choice, or `eager` for a soft-cap."
    )
    chat_template: str | None = Field(
        None, description="null: the tokenizer's own; a file, Jinja text, or a template name of the host's."
    )
    system_turns: Literal["keep", "merge", "drop"] = Field(
        "keep", description="keep | merge (into the first user turn) | drop: some templates refuse system turns."
    )
    max_length: int | None = Field(
        None, ge=8, description="Tokens of a row; a longer prompt is cut on its left. null: the model's context."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the checkpoint.")

    @property
    def label(self) -> str:
        """The name in tables."""
        return PurePosixPath(self.model).name or self.model

    @property
    def source(self) -> str:
        """The string that stands for it in exported files."""
        return self.model


class RankingConfig(ScoringBlock):
    """What plain `rl: pro` and `rl: rrhf` read of the block `deft:`."""

    sft_weight: float | None = Field(
        None, ge=0, description="Factor of the best response's token-summed SFT loss; null: the method's own."
    )
    pro_temperature: Literal["reward"] | None = Field(
        None, description="null: the paper's PRO (Eq. 11); reward: temperatures from score differences (PRO's code)."
    )
    rank_by: Literal["label", "reward"] = Field(
        "label", description="Order of a row's responses: label (as the data say) | reward (the reward model's)."
    )
    share_prompt: bool = Field(
        False, description="In a pack, read a row's prompt once for all its responses; needs packing with `sdpa`."
    )
    reward_model: RewardModelConfig | None = Field(
        None, description="The model that scores responses; null where the data carry scores, or none are needed."
    )

    @field_validator("reward_model", mode="before")
    @classmethod
    def _named_alone(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class DeftConfig(RankingConfig):
    """The block `deft:`, read by every `rl: deft_<method>`."""

    top_percent: float = Field(3.73, gt=0, le=100, description="Level A: share of each group's training rows, percent.")
    bottom_percent: float = Field(
        12.5, ge=0, le=100, description="Level C: share of each group's training rows, percent."
    )
    grade_within: str = Field("dataset", description="Rank rows within: dataset | none | <column>.")
    train_on: Literal["A", "A+B", "all"] = Field("A", description="Levels that are trained on: A | A+B | all.")
    omega: float | None = Field(
        None, ge=0, description="Factor of the distribution reward; null: the method's own; 0 turns it off."
    )
    reward_over: Literal["best", "all"] = Field(
        "best", description="Responses that the distribution reward is taken over: best | all (their mean)."
    )

    @model_validator(mode="after")
    def _percentages(self) -> "DeftConfig":
        if self.top_percent + self.bottom_percent > 100:
            raise ValueError(
                f"top_percent {self.top_percent} + bottom_percent {self.bottom_percent} is more than 100; levels A and "
                "C would overlap"
            )
        return self

    @property
    def grades(self) -> bool:
        """Whether anything depends on levels: a choice of rows, or the distribution reward."""
        return self.train_on != "all" or self.omega != 0


class DpoKeys(Block):
    """The host's top-level keys that keep their meaning under `rl: deft_dpo`."""

    rl_beta: float = Field(0.1, gt=0, le=MOST_BETA, description="DPO's beta (the host's default: 0.1).")
    dpo_loss_type: tuple[DpoLossType, ...] = Field(
        ("sigmoid",), min_length=1, description="sigmoid | hinge | ipo | robust, or a list of them."
    )
    dpo_loss_weights: tuple[float, ...] | None = Field(
        None, min_length=1, description="One weight per loss type; null: 1 each."
    )
    dpo_label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of labels taken to be wrong; read by `robust` alone."
    )
    precompute_ref_log_probs: Literal[True] | None = Field(
        None, description="Always so here: the reference's log-probabilities come from the score cache."
    )

    @field_validator("dpo_loss_type", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _weights_fit(self) -> "DpoKeys":
        if self.dpo_loss_weights is not None and len(self.dpo_loss_weights) != len(self.dpo_loss_type):
            raise ValueError(
                f"dpo_loss_weights has {len(self.dpo_loss_weights)} numbers for {len(self.dpo_loss_type)} loss types"
            )
        if self.dpo_label_smoothing and "robust" not in self.dpo_loss_type:
            raise ValueError(
                f"dpo_label_smoothing: {self.dpo_label_smoothing} does nothing with dpo_loss_type "
                f"{', '.join(self.dpo_loss_type)}; remove it"
            )
        return self
