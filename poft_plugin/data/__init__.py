"""Rows and batches: conversations, keys, renderings, packing. Knows no loss and no host."""
