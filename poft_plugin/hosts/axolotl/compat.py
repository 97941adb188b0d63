"""Workarounds for the host, each with its fact, the versions it holds for, and when it can go."""

import os
from typing import Any

import torch

TESTED_VERSIONS = ("0.19.0",)


def prepare_cpu_ranks(cfg: Any) -> None:
    """Several ranks on a machine without an accelerator: no device map.

    Fact (axolotl 0.19.0): with WORLD_SIZE above 1 the host sets `device_map: {"": LOCAL_RANK}`, an accelerator index,
    and loading the policy fails where there is none. Delete when the host asks for an accelerator first.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        cfg.device_map = None
