"""`python -m coca_lit.tools.caption`, for launchers such as torchrun: as `coca-caption`."""

from coca_lit.tools.caption.command import caption

if __name__ == "__main__":  # and not in the processes that it starts
    caption()
