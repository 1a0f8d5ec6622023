"""The idea in one sentence."""
