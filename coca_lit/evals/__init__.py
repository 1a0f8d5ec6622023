"""What to score on which data: an `Evaluation` runs a model over records and returns scores by name.

Nothing here needs Lightning. `coca_lit.callbacks.ScoreDuringTraining` decides when an evaluation runs in training.
"""

from coca_lit.evals.base import Evaluation, FunctionEvaluation, NotRunError, Settings

__all__ = ["Evaluation", "FunctionEvaluation", "NotRunError", "Settings"]
