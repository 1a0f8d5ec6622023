"""A language model, GPT-2, in the decoder."""
