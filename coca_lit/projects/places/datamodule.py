"""The DataModule of built-in scenes with questions about places."""

from typing import Unpack

from coca_lit.data.datamodule import SceneArguments, ScenesDataModule
from coca_lit.projects.places.scenes import scene_place_records


class ScenePlacesDataModule(ScenesDataModule):
    """The built-in scenes with their captions, and with questions that give the box of a thing or ask for it, see
    `scene_place_records`.
    """

    def __init__(self, **shared: Unpack[SceneArguments]) -> None:
        super().__init__(**shared)
        if self.cached_augmentations > 1:
            raise ValueError("cached_augmentations must be 0 or 1 for places: mirror images would keep their boxes")
        self._scenes = scene_place_records
