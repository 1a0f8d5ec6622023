"""A web page to try a model by hand: what it does is in `answers.py`, how it looks in `page.py`."""
