"""Writing and checking shards."""
