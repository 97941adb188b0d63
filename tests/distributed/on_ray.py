"""`axolotl train CONFIG --use-ray` on a cluster of this process's own, without a GPU.

    python on_ray.py CONFIG NUM_WORKERS

The host always asks Ray for GPUs, and Ray then takes NCCL, which CPUs have not.
"""

import sys
from typing import Any

import ray
import ray.train
from axolotl.cli.main import cli


class OnCPUs(ray.train.ScalingConfig):  # type: ignore[misc]
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "use_gpu": False, "resources_per_worker": {"CPU": 1}})


if __name__ == "__main__":
    ray.train.ScalingConfig = OnCPUs
    ray.init(num_cpus=2, include_dashboard=False)
    cli(["train", sys.argv[1], "--use-ray", "--ray-num-workers", sys.argv[2]])
