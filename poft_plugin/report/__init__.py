"""Tables and warnings from scores and logs."""
