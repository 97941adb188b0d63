"""Trains several configs one after the other on the ranks of one torchrun, and writes down what each run did.

    torchrun --nproc_per_node=2 stage.py JOBS.json

A job has a name, a config file, and maybe a DeepSpeed config, a checkpoint to resume from, and the word that it stops;
the results go beside it, rank 0's as `JOBS.results.json`.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(jobs: Path) -> None:
    """Runs every job."""
    job_list = json.loads(jobs.read_text())
    if any(job["deepspeed"] for job in job_list):
        import cpu_deepspeed

        cpu_deepspeed.mend()
    import axolotl.train
    import axolotl.utils.distributed
    import hosting
    import torch
    import transformers.integrations.deepspeed
    import transformers.modeling_utils

    axolotl.train.cleanup_distributed = lambda: None  # the process group stays for the next job
    asking = (transformers.modeling_utils, transformers.integrations.deepspeed)
    is_zero3 = [module.is_deepspeed_zero3_enabled for module in asking]
    results = {}
    for job in job_list:
        axolotl.utils.distributed.distributed_state = None
        for module, asked in zip(asking, is_zero3, strict=True):
            module.is_deepspeed_zero3_enabled = asked  # under ZeRO-3 the host answers yes from its first model on
        overrides = {name: job[name] for name in ("deepspeed", "resume_from_checkpoint") if job.get(name)}
        results[job["name"]] = _stopped(job, overrides) if job.get("stops") else _result(_train(job, overrides))
        if int(os.environ["RANK"]) == 0:
            jobs.with_suffix(".results.json").write_text(json.dumps(results))
        hosting.RecorderPlugin.recording.trainer = None
    torch.distributed.barrier()


def _train(job: dict[str, Any], overrides: dict[str, Any]) -> Any:
    import hosting

    return hosting.train(Path(job["config"]), **overrides)


def _stopped(job: dict[str, Any], overrides: dict[str, Any]) -> list[Any]:
    """Of a run that has to end in an error: on each rank, what it said, and after which step."""
    import hosting
    from accelerate.utils import gather_object

    try:
        _train(job, overrides)
    except ValueError as error:
        found = [str(error), hosting.RecorderPlugin.recording.trainer.state.global_step]
    else:
        found = ["", -1]
    everywhere: list[Any] = gather_object([found])
    return everywhere


def _result(recording: Any) -> dict[str, Any]:
    from transformers import PreTrainedModel

    trainer = recording.trainer
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    gc.collect()
    found = [m for m in gc.get_objects() if isinstance(m, PreTrainedModel)]
    parts = {id(part) for model in found for part in model.modules() if part is not model}
    models = [model for model in found if id(model) not in parts]
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "zero": getattr(trainer.model_wrapped, "zero_optimization_stage", int)(),
        "local": sum(p.numel() for p in weights),
        "stored": sum(getattr(p, "ds_tensor", p).numel() for p in weights),
        "whole": sum(getattr(p, "ds_numel", p.numel()) for p in weights),
        "optimizer": _optimizer_numbers(trainer),
        "logs": trainer.state.log_history,
        "models": len(models),
        "elements": sum(p.numel() for model in models for p in model.parameters()),
        "frozen": sum(p.numel() for p in frozen),
        "steps": trainer.state.global_step,
    }


def _optimizer_numbers(trainer: Any) -> int:
    """Elements of Adam's first moments that this rank keeps."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return sum(int(state["exp_avg"].numel()) for state in optimizer.state.values() if "exp_avg" in state)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
