"""`coca-score`: captions from any model against references, and scores of captions against people's judgements."""
