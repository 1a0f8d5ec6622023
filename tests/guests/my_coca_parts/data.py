"""Images of one colour: as a function that returns records, and as a whole DataModule."""

from functools import partial

import lightning.pytorch as L
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from coca_lit.data.batch import Batch, Example, collate
from coca_lit.data.records import Record
from coca_lit.tokenizer import Tokenizer

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}


def patch_records(split: str, count: int = 16, size: int = 32) -> list[Record]:
    """Records of one split: each has an id, a function that opens its image, and its captions."""
    names = [list(COLOURS)[i % len(COLOURS)] for i in range(count)]
    return [
        Record(f"{split}_{i}", partial(Image.new, "RGB", (size, size), COLOURS[name]), (f"a large {name} square",))
        for i, name in enumerate(names)
    ]


class PatchesDataModule(L.LightningDataModule):
    """Any LightningDataModule whose batches are `coca_lit.data.batch.Batch`."""

    def __init__(self, tokenizer: Tokenizer, batch_size: int, image_size: int = 32, count: int = 16) -> None:
        super().__init__()
        self.tokenizer, self.batch_size, self.image_size, self.count = tokenizer, batch_size, image_size, count

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("val")

    def _loader(self, split: str) -> DataLoader[Batch]:
        examples = [
            Example(
                torch.from_numpy(np.asarray(record.image()).copy()).permute(2, 0, 1),
                self.tokenizer.encode(record.captions[0]),
                str(record.id),
            )
            for record in patch_records(split, self.count, self.image_size)
        ]
        return DataLoader(examples, self.batch_size, collate_fn=partial(collate, pad_id=self.tokenizer.pad_id))
