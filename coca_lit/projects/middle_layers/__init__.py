"""Image features from a middle layer of the encoder, and probes that say from which one (Perception Encoder)."""
