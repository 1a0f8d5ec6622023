"""A web page to try a model by hand: what it does is in `answers.py`, how it looks in the other files."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing is reported to anybody
