"""A batch schedule of an own source: random words."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count

import torch
from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.data.batch_schedule import BatchSchedule
from coca_lit.errors import DataError
from coca_lit.models import CoCa
from coca_lit.tokenizer import Tokenizer
from coca_lit.training.objectives import Objective


class QuietNoise(Objective):
    """The features of random words shall be close to the first axis."""

    trains = ("text",)
    works_with_micro_batches = True
    config_key = "data.noise"

    def __init__(self, weight: float) -> None:
        super().__init__(noise=weight)

    def takes(self, batch: Batch) -> bool:
        return "noise" in batch.extras

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        features = net.encode_text(batch.tokens, batch.lengths)  # (B, E)
        return {"noise": -features[:, 0].mean()}


class NoiseBetween(BatchSchedule):
    """At every N-th step random words, in batches of their own.

    Args:
        noise: seed of the words; a negative one is not there.
    """

    def __init__(self, noise: int, noise_every: int = 2, noise_weight: float = 1.0) -> None:
        self.noise = noise
        self.every = noise_every
        self.objectives = [QuietNoise(noise_weight)]

    def begin(self, tokenizer: Tokenizer, batch_size: int, image_size: int, seed: int) -> None:
        self.size = batch_size
        self.words = tokenizer.vocab_size

    def prepare(self) -> None:
        if self.noise < 0:
            raise DataError("there is no such noise")

    def steps(self, pairs: int) -> int:
        return pairs + pairs // (self.every - 1)

    def batches(
        self,
        pairs_from: Callable[[int, int], Iterable[Batch]],
        pairs: int,
        rank: int,
        world: int,
        epoch: int,
        start: int,
    ) -> Iterator[Batch]:
        others = iter(pairs_from(epoch, start - start // self.every))
        for step in count(start):
            yield next(others) if (step + 1) % self.every else self._batch(epoch, step)

    def _batch(self, epoch: int, step: int) -> Batch:
        generator = torch.Generator().manual_seed(self.noise + 1000 * epoch + step)
        tokens = torch.randint(4, self.words, (self.size, 5), generator=generator)
        lengths = torch.full((self.size,), 5)
        images = torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        return Batch(images, tokens, lengths, [f"noise {step}"] * self.size, extras={"noise": ["noise"] * self.size})
