"""What is faster than PyTorch's default on some processor."""
