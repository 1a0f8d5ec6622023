"""`python -m coca_lit.tools.search`: as `coca-search`."""

from coca_lit.tools.search.command import search

if __name__ == "__main__":  # and not in the processes that it starts
    search()
