"""`python -m coca_lit.tools.demo`: as `coca-demo`."""

from coca_lit.tools.demo.command import demo

if __name__ == "__main__":  # and not in the processes that it starts
    demo()
