"""Clips in the place of images: MSR-VTT, Kinetics, your own, clips in shards, and moving built-in scenes."""
