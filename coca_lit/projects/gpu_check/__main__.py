"""`python -m coca_lit.projects.gpu_check`: as `coca-gpu-check`."""

from coca_lit.projects.gpu_check.command import gpu_check

if __name__ == "__main__":  # and not in the processes that it starts
    gpu_check()
