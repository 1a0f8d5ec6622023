"""A web page to try a model by hand: `answers` asks the model, `page` shows the answers, `serve` serves the page."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
