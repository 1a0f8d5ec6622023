"""Scores whose reference implementation is written in Java."""
