"""Tests only: DeepSpeed on two processes without an accelerator, over gloo.

Named first under `plugins:`, or called before anything of accelerate runs, it mends three things and leaves everything
else to the real DeepSpeed: accelerate finds no backend where there is no accelerator; DeepSpeed's gather of flat
buffers wants no gradient mode on gloo (torch 2.13); and one operation that nothing here uses would be compiled.
"""

import importlib
import os
from functools import wraps
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from axolotl.integrations.base import BasePlugin


class CpuDeepSpeedPlugin(BasePlugin):  # type: ignore[misc]
    """Does nothing but mend."""

    def __init__(self) -> None:
        super().__init__()
        mend()


def mend() -> None:
    """Applies the three changes, once."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with it ZeRO-2 would silently be plain DDP
    choose_backend = PartialState._prepare_backend
    if getattr(choose_backend, "mended", False):
        return

    @wraps(choose_backend)
    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend, kind = choose_backend(self, *args, **kwargs)
        if backend is None and "LOCAL_RANK" in os.environ:
            return "gloo", DistributedType.MULTI_CPU
        return backend, kind

    prepare_backend.mended = True  # type: ignore[attr-defined]
    PartialState._prepare_backend = prepare_backend
    # `from deepspeed.comm import torch` would be the real torch
    backend_module = importlib.import_module("deepspeed.comm.torch")
    gather = backend_module.TorchBackend.all_gather_into_tensor
    backend_module.TorchBackend.all_gather_into_tensor = torch.no_grad()(gather)
    backend_module.build_shm_op = lambda: None
