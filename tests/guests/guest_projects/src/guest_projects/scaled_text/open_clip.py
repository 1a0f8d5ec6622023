"""The tower in the files of a fork of OpenCLIP that has it."""

from typing import Any, ClassVar

from coca_lit.weights.open_clip.parts import Tensors
from coca_lit.weights.open_clip.text import ClassicText
from guest_projects.scaled_text.tower import ScaledTower


class ScaledText(ClassicText):
    kinds = (ScaledTower,)
    since = "4"
    versions: ClassVar = {"scaled": "the fork with scaled embeddings"}

    def arguments(self, theirs: Tensors) -> dict[str, Any]:
        return {**super().arguments(theirs), "text_tower": "scaled"}
