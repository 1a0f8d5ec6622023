"""A selection of samples: a Parquet file with a row (shard, key) for each sample that is kept. `coca-data filter` and
`coca-data dedup` write it, and any engine can.

Training on shards with a selection equals training on copies of the shards that hold these samples alone. Shards go by
their file names, so that they can be moved. Only the keys of one shard at a time are in memory.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from coca_lit.data.shards.shard import Shard, sha256_of
from coca_lit.errors import DataError
from coca_lit.reading import open_parquet, printable

SHARD, KEY = COLUMNS = ("shard", "key")


@dataclass(frozen=True)
class Selection:
    """The samples that are kept of a set of shards."""

    path: Path
    digest: str  # of the file
    counts: Mapping[str, int] = field(hash=False, repr=False)  # of samples, by the file name of their shard
    groups: Mapping[str, list[int]] = field(hash=False, repr=False)  # the row groups that hold them

    def keys(self, shard: str) -> frozenset[str]:
        """Of the samples that are kept of the shard with this file name."""
        from pyarrow import compute

        found: set[str] = set()
        with open_parquet(self.path, COLUMNS) as file:
            for group in self.groups.get(shard, ()):
                for batch in file.read_row_group(group, list(COLUMNS)).to_batches():
                    names = batch.column(SHARD)
                    known = names.dictionary.to_pylist()
                    if shard in known:
                        rows = batch.column(KEY).filter(compute.equal(names.indices, known.index(shard)))
                        found.update(rows.drop_null().unique().to_pylist())
        return frozenset(found)

    def of(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those of the shards that hold selected samples.

        Raises:
            DataError: there are none, shards of the selection are missing, or two shards have the same file name.
        """
        names: dict[str, str] = {}
        for shard in shards:
            if names.setdefault(shard.file_name, shard.name) != shard.name:
                both = f"{names[shard.file_name]} and {shard.name}"
                raise DataError(f"{both} have the same file name: name them as a mixture, each with its own selection")
        found = [replace(shard, selection=self) for shard in shards if shard.file_name in self.counts]
        if not found:
            raise DataError(f"{self.path} selects no sample of the {len(shards)} shards: it is about other ones")
        lost = sorted(self.counts.keys() - names.keys() - {""})
        if lost:  # a row without a shard selects nothing
            raise DataError(
                f"{len(lost)} of the {len(self.counts)} shards of {self.path} are not given, e.g. {lost[0]}: restore "
                "them, or choose again from those that are left"
            )
        return found


def read_selection(path: Path) -> Selection:
    """Which shards a selection is about; keys are read shard by shard.

    Raises:
        DataError: it cannot be read, or is not a selection.
    """
    counts: Counter[str] = Counter()
    groups: dict[str, list[int]] = {}
    with open_parquet(path, COLUMNS) as file:
        digest = sha256_of(path)
        kinds = {name: str(file.schema_arrow.field(name).type) for name in COLUMNS if name in file.schema_arrow.names}
        if any("string" not in kinds.get(name, "") for name in COLUMNS):
            raise DataError(
                f"{path} has no columns of texts {SHARD} and {KEY}: write a selection with coca-data filter or dedup"
            )
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group, [SHARD]).column(SHARD).value_counts().to_pylist():
                name = printable(row["values"] or "")
                counts[name] += row["counts"]
                groups.setdefault(name, []).append(group)
    return Selection(path, digest, dict(counts), groups)
