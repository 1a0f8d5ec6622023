"""Records of several sources in given proportions: captioned images mixed with classes as texts."""

import random
from collections.abc import Callable, Mapping, Sequence

from coca_lit.data.mixture import check_weights
from coca_lit.data.records import Record
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError


def weighted_records(
    split: str, sources: Mapping[str, Callable[[str], Sequence[Record]]], weights: Mapping[str, float]
) -> list[Record]:
    """Records of several sources, such as captioned photos and classes as texts (the CoCa paper mixes ALIGN and JFT).

    In "train" those of all sources, each source with the share of its weight: the one that is largest for its
    weight once, the others as often as it takes, in whole passes and a random part of one. In other splits those of the
    first source alone, so that validation does not depend on the weights.

    Args:
        sources: split -> records, by name.
        weights: above 0, of each source. A repeated record has a crop and a caption of its own each time.

    Raises:
        DataError: a source has no weight, or no records.
    """
    if weights.keys() != sources.keys():
        raise DataError(
            f"weights are of {', '.join(weights)}, and sources {', '.join(sources)}: give each one a weight"
        )
    try:
        check_weights("weights", weights)
    except ValueError as error:
        raise DataError(str(error)) from error
    if split != "train":
        return list(next(iter(sources.values()))(split))
    found = {name: list(read(split)) for name, read in sources.items()}
    empty = [name for name, records in found.items() if not records]
    if empty:
        raise DataError(f"the source {empty[0]} has no training records: check its folder")
    per_weight = max(len(records) / weights[name] for name, records in found.items())
    mixed: list[Record] = []
    for name, records in found.items():
        passes, rest = divmod(round(per_weight * weights[name]), len(records))
        some = random.Random(stable_seed("weighted", name)).sample(records, rest)
        for number, part in enumerate([*[records] * passes, some]):
            mixed += [record._replace(id=f"{name}/{number}/{record.id}") for record in part]
    return mixed
