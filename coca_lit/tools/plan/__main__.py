"""`python -m coca_lit.tools.plan`: as `coca-plan`."""

from coca_lit.tools.plan.command import plan

if __name__ == "__main__":  # and not in the processes that it starts
    plan()
