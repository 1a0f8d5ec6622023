"""`coca-new NAME` writes a project of your own: an objective, an evaluation, an experiment, a page and tests."""
