"""Clips in the place of images: MSR-VTT, Kinetics, your own, those of shards, and moving built-in scenes."""
