"""What a GPU computes, beside the CPU."""
