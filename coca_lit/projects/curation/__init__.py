"""Choosing among the samples of shards by their scores, without copying them."""
