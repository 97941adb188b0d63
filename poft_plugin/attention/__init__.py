"""Attention over packs of sequences, for training and for scoring: on transformers alone."""
