"""A tour of the plugin in a few minutes on a CPU: `python -m quickstart.run` from the project root."""

import logging
import time

STARTED = time.perf_counter()  # before the heavy imports, so that the seconds reported are those that a user waits

# Importing torch and transformers on a CPU makes them warn about kernels for GPUs that are not there.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
