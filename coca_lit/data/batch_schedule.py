"""Batches of another source between the batches of captioned images that a DataModule reads."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from coca_lit.data.batch import Batch
from coca_lit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from coca_lit.training.objectives import Objective


class BatchSchedule:
    """Which source gives each batch of a training: the pairs, which are the captioned images of the data, or another.

    The source of a batch, and what the other source gives, are functions of epoch and step alone, so that a resumed run
    needs only the trainer's position. A project declares the keys that ask for a schedule, see `coca_lit.extensions`.

    Attributes:
        objectives: what the batches of the other source are trained for. Those of pairs take all batches with images.
    """

    objectives: Sequence["Objective"] = ()

    def begin(self, tokenizer: Tokenizer, batch_size: int, image_size: int, seed: int) -> None:
        """Called once by the DataModule, with its own arguments, before all that follows."""

    def prepare(self) -> None:
        """Finds the data of the other source, or raises `DataError`: called before anything slow begins."""

    def steps(self, pairs: int) -> int:
        """Global batches of an epoch that has this many batches of pairs."""
        raise NotImplementedError

    def batches(
        self,
        pairs_from: Callable[[int, int], Iterable[Batch]],
        pairs: int,
        rank: int,
        world: int,
        epoch: int,
        start: int,
    ) -> Iterator[Batch]:
        """This rank's batches of an epoch from step `start` on, at least to its end.

        Args:
            pairs_from: (epoch, batches of pairs before) -> this rank's batches of pairs from there on.
            pairs: global batches of pairs in an epoch.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Facts about the other source, which checkpoints keep and which all processes must agree on."""
        return {}

    def changed_since(self, state: Mapping[str, Any]) -> str:
        """What changed by itself since `state_dict` returned this state, in words; nothing if nothing did."""
        return ""
