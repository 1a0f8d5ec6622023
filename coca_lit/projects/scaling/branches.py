"""Runs of several lengths from one trunk: a sweep over `trainer.max_steps`, the longest first. Each cools down in its
last fifth; all but the longest start there, from a checkpoint of the longest.
"""

from pathlib import Path

from coca_lit.runs.run_folder import CHECKPOINTS


def cooldown_of(steps: int) -> int:
    """`model.cooldown_steps` of a run of `steps` steps."""
    return steps // 5


def branch_of(folder: str, steps: int, longest: int) -> str:
    """`ckpt_path` of a run of `steps` steps in a sweep.

    Args:
        folder: of the run; that of the longest differs in the value of `trainer.max_steps`.
        longest: the steps of the longest run.
    """
    if steps == longest or any(Path(folder, CHECKPOINTS).glob("step_*.ckpt")):  # it resumes
        return "auto"
    trunk = Path(folder.replace(f"trainer.max_steps={steps}", f"trainer.max_steps={longest}"))
    return str(trunk / CHECKPOINTS / f"step_{steps - cooldown_of(steps)}.ckpt")
