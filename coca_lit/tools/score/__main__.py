"""`python -m coca_lit.tools.score`: as `coca-score`."""

from coca_lit.tools.score.command import score

if __name__ == "__main__":  # and not in the processes that it starts
    score()
