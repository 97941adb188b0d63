"""Scoring: reference models over rows, a content-addressed cache of scores, shards and resumption."""
