"""`python -m coca_lit.tools.prepare`: as `coca-data`."""

from coca_lit.tools.prepare.command import data

if __name__ == "__main__":  # and not in the processes that it starts
    data()
