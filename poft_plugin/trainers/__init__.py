"""Steps: batch -> forward -> loss -> per-sample losses and metrics. No host, no maths of their own."""
