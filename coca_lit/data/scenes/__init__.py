"""The built-in data set: rendered scenes of coloured shapes."""
