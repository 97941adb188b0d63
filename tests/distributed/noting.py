"""Plugins of the tests that write down what trains, from inside `axolotl train`."""

import json
import os
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback


class LogsPlugin(BasePlugin):  # type: ignore[misc]
    """Writes down what each process logged, and of how many it is one."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        class Note(TrainerCallback):
            def on_train_end(self, *_: Any, **__: Any) -> None:
                found = {"world_size": trainer.args.world_size, "logs": trainer.state.log_history}
                Path(cfg.output_dir, f"logs-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))

        return [Note()]


class NotingPlugin(BasePlugin):  # type: ignore[misc]
    """Writes down which engine trains, from inside `axolotl train`."""

    def post_train(self, cfg: Any, model: Any) -> None:
        engine = getattr(self, "engine", "none")
        Path(cfg.output_dir, f"engine-{os.environ['RANK']}.txt").write_text(engine)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        plugin = self

        class Note(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                plugin.engine = (
                    f"{type(trainer.model_wrapped).__name__} {trainer.model_wrapped.zero_optimization_stage()}"
                )

        return [Note()]
