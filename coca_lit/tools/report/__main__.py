"""`python -m coca_lit.tools.report`: as `coca-report`."""

from coca_lit.tools.report.command import report

if __name__ == "__main__":  # and not in the processes that it starts
    report()
