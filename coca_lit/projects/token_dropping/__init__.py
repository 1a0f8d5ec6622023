"""In training the decoder sees a drawn share of the image tokens (OpenVision 2)."""
