"""Which parts of the network are not trained: those that the config names, and those that no loss would train."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from coca_lit.distributed import print_rank_zero
from coca_lit.models import CoCa


def freeze(net: CoCa, parts: Sequence[str], weights: Mapping[str, float], trained: Collection[str] = ()) -> None:
    """Freezes parts of the network and prints which.

    A parameter that never gets a gradient must be frozen: DistributedDataParallel would wait for that gradient.

    Args:
        parts: names or patterns, see `CoCa.freeze`; or a single one.
        weights: of the "contrastive" and the "caption" loss; what only a loss of weight 0 trains is frozen too.
        trained: parts that further objectives train, which stay trainable unless `parts` names them.
    """
    parts = [parts] if isinstance(parts, str) else parts
    unused = [
        part
        for loss, weight in weights.items()
        if weight == 0
        for whole in net.parameters_of_loss(loss)
        for part in _without(net, whole, trained)
    ]
    for reason, names in (("as configured", parts), ("no loss with a weight above 0 trains them", unused)):
        if names:
            frozen = net.freeze(*names)
            print_rank_zero(f"frozen, {reason}: {', '.join(names)} ({len(frozen)} tensors)")


def _without(net: CoCa, part: str, trained: Collection[str]) -> Iterator[str]:
    """The part itself, or its parts that are not trained; nothing if all of it is trained."""
    if any(f"{part}.".startswith(f"{name}.") for name in trained):
        return
    if not any(name.startswith(f"{part}.") for name in trained):
        yield part
        return
    inside = (n.removeprefix(f"{part}.") for n, _ in net.named_parameters() if n.startswith(f"{part}."))
    for child in dict.fromkeys(name.partition(".")[0] for name in inside):  # modules and parameters
        yield from _without(net, f"{part}.{child}", trained)
