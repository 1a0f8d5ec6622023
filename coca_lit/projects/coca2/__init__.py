"""CoCa2 of OpenCLIP 4: two poolers, and a text side with rotary positions, SwiGLU, RMSNorm and gates."""
