"""Models that turn rows into numbers: causal LMs, reward models, the policy's start weights."""
