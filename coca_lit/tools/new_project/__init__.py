"""`coca-new NAME` writes a project of your own: a package with an objective, an experiment, a page and a test."""
