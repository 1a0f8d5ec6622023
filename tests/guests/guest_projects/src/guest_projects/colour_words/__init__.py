"""An evaluation with its config and its score."""
