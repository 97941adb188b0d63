"""The plugin class that `plugins: [poft_plugin.PoftPlugin]` names.

Nothing of `axolotl.core` is imported at the top: Axolotl's training arguments freeze on their first import.
"""

from collections.abc import Mapping
from typing import Any

import axolotl
import numpy as np
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

# the host finds the strategy by name, and takes a ModuleNotFoundError in it for an unknown dataset type
import poft_plugin.hosts.axolotl.strategy  # noqa: F401
from poft_plugin import __version__
from poft_plugin.data.preparation import Purpose
from poft_plugin.hosts.axolotl.args import NAME, TAKEN_OVER
from poft_plugin.hosts.axolotl.compat import TESTED_VERSIONS, ask_no_absent_gpu, prepare_cpu_ranks
from poft_plugin.hosts.axolotl.errors import install_hook, one_message
from poft_plugin.hosts.axolotl.on_ray import check_one_training
from poft_plugin.hosts.axolotl.run import MethodRun, nothing_asked, take_over

LOG = get_logger("axolotl.poft_plugin")  # the host shows messages of its own namespace only

LOG.info(f"poft_plugin {__version__}, tested with axolotl {', '.join(TESTED_VERSIONS)}")
if axolotl.__version__ not in TESTED_VERSIONS:
    LOG.warning(
        f"poft_plugin {__version__} was not tested with axolotl {axolotl.__version__} (but with "
        f"{', '.join(TESTED_VERSIONS)}); its tests/hosts/axolotl/test_contract.py says what has to hold"
    )


DEFAULT_SEED = 42
"""What transformers' trainer takes where none is set."""


class PoftPlugin(BasePlugin):
    """Adds the rl types of the method table to Axolotl. Every hook does nothing where `rl:` is not one of them."""

    def __init__(self) -> None:
        super().__init__()
        install_hook()
        self.method_run: MethodRun | None = None
        self._statistics: Mapping[str, float] = {}
        self._tensors: Mapping[str, np.ndarray] = {}
        self._prepared = False

    @one_message()
    def register(self, cfg: DictDefault) -> None:
        """Validates our blocks, takes `rl` off the raw config, rewrites its dataset entries."""
        self.method_run = take_over(cfg)
        self._statistics, self._tensors, self._prepared = {}, {}, False
        if self.method_run is None:
            if NAME in (cfg.get("plugins") or []):  # the host may load it unasked, too
                LOG.warning(f"poft_plugin does nothing in this run: {nothing_asked(cfg)}")
        else:
            ask_no_absent_gpu()
            if cfg.get("seed") is None:
                cfg["seed"] = DEFAULT_SEED
                LOG.info(f"seed: {DEFAULT_SEED} (not set: the host would shuffle, and shard, anew in every process)")
            method = self.method_run.method
            keys = "" if self.method_run.keys is None else f"; {self.method_run.keys!r}"
            LOG.info(f"rl: {method.name} ({method.paper}); {method.block}: {self.method_run.settings!r}{keys}")
            for doubt in self.method_run.doubts():
                LOG.warning(doubt)

    def get_input_args(self) -> str:
        """Our keys in the host's schema."""
        return "poft_plugin.hosts.axolotl.args.PoftPluginArgs"

    @one_message()
    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> Any:
        """The host's rows, scored, joined and filtered."""
        run = self._run(cfg)
        if run is None:
            return None
        from poft_plugin.hosts.axolotl.datasets import prepare
        from poft_plugin.hosts.axolotl.policy import check_policy_weights

        prepare_cpu_ranks(cfg)
        check_one_training(cfg)
        check_policy_weights(cfg, train=not preprocess)
        purpose: Purpose = "preprocess" if preprocess else "train"
        meta, self._statistics, self._tensors = prepare(cfg, run, purpose)
        self._prepared = True
        return meta

    @one_message()
    def pre_model_load(self, cfg: DictDefault) -> None:
        """`axolotl evaluate` is told what it may evaluate before the model is loaded.

        It is known by this: the host has read data and counted their tokens, and did not ask us for them.
        """
        run = self._run(cfg)
        if run is not None and not self._prepared and cfg.total_num_tokens:
            from poft_plugin.hosts.axolotl.evaluation import check_evaluation

            check_evaluation(cfg, run)

    @one_message()
    def get_training_args(self, cfg: DictDefault) -> dict[str, Any] | None:
        """Keeps our columns, the last batch of a data set unless its loss was asked for, and whole epochs.

        The host would stop at its own estimate of the number of steps, which can fall inside the last epoch.
        """
        if self._run(cfg) is None:
            return None
        return {
            "remove_unused_columns": False,
            "dataloader_drop_last": bool(cfg.dataloader_drop_last),
            "max_steps": cfg.max_steps or -1,
        }

    @one_message()
    def get_collator_cls_and_kwargs(self, cfg: DictDefault, is_eval: bool = False) -> Any:
        """Our batch layout around the host's own collator."""
        run = self._run(cfg)
        if run is None:
            return None
        from poft_plugin.hosts.axolotl.collators import host_collator
        from poft_plugin.hosts.axolotl.rotary import varies

        return host_collator(cfg, run.method, is_eval=is_eval, frequencies_vary=varies(cfg)), {}

    @one_message()
    def get_trainer_cls(self, cfg: DictDefault) -> Any:
        """The trainer class of this run."""
        run = self._run(cfg)
        if run is None:
            return None
        from poft_plugin.hosts.axolotl.trainer import trainer_class

        return trainer_class(run, cfg, self._tensors)

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Any) -> list[Any]:
        """Records the run in its folder, and logs the references' statistics once, to every tracker of the host."""
        run = self._run(cfg)
        if run is None:
            return []
        from poft_plugin.hosts.axolotl.callbacks import LogOnce
        from poft_plugin.hosts.axolotl.record import RecordRun

        return [RecordRun(cfg, run, trainer), LogOnce(trainer, self._statistics)]

    def _run(self, cfg: DictDefault) -> MethodRun | None:
        """The run that a config asks for: after ours, the host asks this plugin about later configs in the process."""
        return self.method_run if cfg.get(TAKEN_OVER) else None
