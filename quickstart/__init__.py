"""A tour of the plugin in a few minutes on a CPU: `python -m quickstart.run` from the project root."""

import logging
import os
import time

STARTED = time.perf_counter()  # before the heavy imports, so that the seconds reported are those that a user waits

# Importing torch and transformers on a CPU makes them warn about kernels for GPUs that are not there.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

# Threads that spin while they wait for one another make training ten times slower as soon as anything else runs on a
# machine with two cores. Read once, when torch is loaded, here and in the processes that `run` starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
