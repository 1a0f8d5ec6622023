"""Scores as pure functions: captions, features or ids in, numbers out. Nothing else of coca_lit is imported here."""
