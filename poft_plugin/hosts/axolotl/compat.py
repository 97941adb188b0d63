"""Workarounds for the host, each with its fact, the versions it holds for, and when it can go."""

import os
from typing import Any

import torch
from axolotl.utils import environment

from poft_plugin.hosts.axolotl.args import NAME

TESTED_VERSIONS = ("0.19.0", "0.21.0")


def ask_no_absent_gpu() -> None:
    """Several ranks on a machine without an accelerator, under a CUDA build of torch: no question to its driver.

    Fact (axolotl 0.19.0, 0.21.0): while it loads the config, the host asks whether the ranks' GPUs reach each other. It
    expects the error of a CPU build of torch, not that of a missing driver. Delete when it asks for a GPU first.
    """
    if not torch.accelerator.is_available():
        environment.check_cuda_p2p_support = lambda: True


def prepare_cpu_ranks(cfg: Any) -> None:
    """Several ranks on a machine without an accelerator: no device map.

    Fact (axolotl 0.19.0, 0.21.0): with WORLD_SIZE above 1 the host sets `device_map: {"": LOCAL_RANK}`, an accelerator
    index, and loading the policy fails where there is none. Delete when the host asks for an accelerator first.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        cfg.device_map = None


def name_plugin(cfg: Any) -> None:
    """A config that was taken over names the plugin.

    Fact (axolotl 0.21): a plugin of an installed package needs no line under `plugins:`, but where it cannot be loaded
    that way, the host goes on without it. With `rl` off, whoever loads the config again (a worker of Ray's, a saved
    config) would then train plain SFT; a plugin under `plugins:` must load. Delete when the host stops in either case.
    """
    plugins = list(cfg.get("plugins") or [])
    if NAME not in [str(name).replace(":", ".") for name in plugins]:
        cfg["plugins"] = [*plugins, NAME]
