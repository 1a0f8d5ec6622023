"""A resumed run compares its texts with those that it began with."""

from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from coca_lit.cli.train import resume_data
from coca_lit.data import Record
from coca_lit.data.datamodule import RecordsDataModule
from coca_lit.errors import DataError
from coca_lit.projects.texts.batches import TextsBetweenPairs
from coca_lit.runs.resume import ResumePoint
from coca_lit.tokenizer import WordTokenizer

TOKENIZER = WordTokenizer(["a", "cat", "cow", "dog"], context_length=8)
RECORDS = [Record(f"{i}", partial(Image.new, "RGB", (8, 8)), "a dog") for i in range(4)]


def test_a_run_goes_on_with_the_texts_that_it_began_with(tmp_path: Path) -> None:
    def data(*texts: str) -> RecordsDataModule:
        (tmp_path / "texts.txt").write_text("\n".join(texts))
        shared = {"tokenizer": TOKENIZER, "batch_size": 2, "image_size": 8, "val_split": None}
        schedule = TextsBetweenPairs([str(tmp_path / "texts.txt")])
        return RecordsDataModule({"train": RECORDS}, batch_schedule=schedule, **shared)

    start = ResumePoint(tmp_path / "step_1.ckpt", {"RecordsDataModule": data("a dog", "a cat").state_dict()})
    resume_data(data("a dog", "a cat"), start, strict=True)
    for texts, others in (("a dog", "a cow"), "others"), (("a dog", "a cat", "a cow"), "3"):
        with pytest.raises(
            DataError, match=f"^the run began with 2 texts to train on, and now there are {others}: restore"
        ):
            resume_data(data(*texts), start, strict=True)
