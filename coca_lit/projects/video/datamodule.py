"""Training on built-in clips."""

from functools import partial
from typing import Unpack

from coca_lit.data.datamodule import SceneArguments, ScenesDataModule
from coca_lit.projects.video.scenes import motion_records


class MovingScenesDataModule(ScenesDataModule):
    """Built-in clips of moving shapes, see `motion_records`.

    Args:
        frames: of each clip.
    """

    def __init__(self, frames: int, **shared: Unpack[SceneArguments]) -> None:
        super().__init__(**shared)
        self._scenes = partial(motion_records, frames=frames)
