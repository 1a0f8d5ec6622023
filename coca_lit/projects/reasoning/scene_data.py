"""DataModules of questions and statements about built-in scenes."""

import logging
from typing import Literal, Unpack

from coca_lit.data.datamodule import SceneArguments, ScenesDataModule
from coca_lit.projects.reasoning.scene_questions import scene_question_records
from coca_lit.projects.reasoning.scene_statements import LABELS, TRUTHS, comparison_records, entailment_records

log = logging.getLogger(__name__)


class SceneQuestionsDataModule(ScenesDataModule):
    """Questions about the built-in scenes, see `scene_question_records`."""

    def __init__(self, **shared: Unpack[SceneArguments]) -> None:
        super().__init__(**shared)
        self._scenes = scene_question_records


class SceneStatementsDataModule(ScenesDataModule):
    """Statements about the built-in scenes and their labels, see `coca_lit.projects.reasoning.scene_statements`. Those
    about the same scene, and of comparisons each block of two pairs and two texts, stay in one batch: what differs
    there decides about the label.

    Args:
        task: entailment: one scene and three labels; comparison: two scenes, true or false.
    """

    def __init__(self, task: Literal["entailment", "comparison"], **shared: Unpack[SceneArguments]) -> None:
        super().__init__(**shared)
        tasks = {"entailment": (entailment_records, len(LABELS)), "comparison": (comparison_records, len(TRUTHS) ** 2)}
        if task not in tasks:
            raise ValueError(f"task must be {' or '.join(tasks)}, got {task!r}")
        self._scenes, self.together = tasks[task]
        if self.batch_size % self.together:
            log.warning(
                "data.batch_size=%d splits statements that belong together over batches: choose a multiple of %d",
                self.batch_size,
                self.together,
            )
