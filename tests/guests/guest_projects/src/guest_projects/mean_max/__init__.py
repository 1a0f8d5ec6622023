"""A pooler."""
