"""Reasoning about images: answers to questions, and labels of texts beside one or two images."""
