"""A text side, with its names in OpenCLIP's files."""
