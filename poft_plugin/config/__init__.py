"""The config blocks that users write: validated once, frozen, unknown keys refused by name."""

from poft_plugin.config.blocks import Block, RowFilterConfig, entries_of, parse_block, settings_model
from poft_plugin.config.deft import DeftConfig, DpoKeys, RankingConfig, RewardModelConfig
from poft_plugin.config.poft import PoftConfig, ReferenceConfig
from poft_plugin.config.scoring import ScoringBlock

__all__ = [
    "Block",
    "DeftConfig",
    "DpoKeys",
    "PoftConfig",
    "RankingConfig",
    "ReferenceConfig",
    "RewardModelConfig",
    "RowFilterConfig",
    "ScoringBlock",
    "entries_of",
    "parse_block",
    "settings_model",
]
