"""A kind of input: several pages that become one picture."""
