"""How well scores of captions agree with people."""
