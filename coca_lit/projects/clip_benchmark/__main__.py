"""`python -m coca_lit.projects.clip_benchmark`: CLIP_benchmark's command line."""

from coca_lit.projects.clip_benchmark.command import clip_benchmark

if __name__ == "__main__":  # and not in the processes that it starts
    clip_benchmark()
