"""An objective with parameters that is kept with the model."""
