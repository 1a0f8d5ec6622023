"""`python -m coca_lit.tools.new_project`: as `coca-new`."""

from coca_lit.tools.new_project.command import new_project

if __name__ == "__main__":  # and not in the processes that it starts
    new_project()
