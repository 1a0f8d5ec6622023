"""Self-critical training: captions that the model samples become more likely if a reward prefers them."""
