"""`python -m coca_lit.tools.export`: as `coca-export`."""

from coca_lit.tools.export.command import export

if __name__ == "__main__":  # and not in the processes that it starts
    export()
