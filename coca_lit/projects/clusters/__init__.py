"""Launchers, a sweeper and engines: where the jobs of a sweep run, and where shards are worked on."""
