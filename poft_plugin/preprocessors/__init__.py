"""What methods name to prepare their rows: which models are to score them, and how scores become columns."""
