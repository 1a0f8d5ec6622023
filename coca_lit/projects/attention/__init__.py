"""Where the decoder looked as it wrote each word of a caption."""
