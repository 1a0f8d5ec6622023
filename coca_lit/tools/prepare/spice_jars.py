"""Fetches the two jars that SPICE needs out of Stanford's archive: `coca-data spice`."""

import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from coca_lit.data.shards.shard import sha256_of
from coca_lit.metrics.java.spice import JARS, SpiceError

ARCHIVE = "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
# As Maven Central has them; the bytes in the archive were not compared.
SHA256 = {
    JARS[0]: "d341d5863276f55782c5ef73212222d6b3b48e02ae1951ab6de7618d28b12742",
    JARS[1]: "d285157bd7887ee3018094b5dbae092e49088b023361ccdb550ee1daf9b2c9bd",
}
PIECE = 1 << 20


def fetch_jars(folder: Path, progress: Callable[[int, int], None], url: str = ARCHIVE) -> list[str]:
    """Downloads the archive, resuming an earlier attempt, and keeps the two jars.

    Args:
        progress: called with the bytes fetched so far and their total.

    Returns:
        The jars that differ from Maven's, which may still work.

    Raises:
        SpiceError: the archive cannot be fetched or written, or holds something else; what is there is kept.
    """
    archive = folder / f"{url.rpartition('/')[2]}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _download(url, archive, progress)
        with zipfile.ZipFile(archive) as content:
            members = {Path(name).name: name for name in content.namelist()}
            for jar in JARS:
                part = folder / f".{jar}.part"
                with content.open(members[jar]) as source, part.open("wb") as target:  # checks the CRC at its end
                    shutil.copyfileobj(source, target, PIECE)
                part.replace(folder / jar)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        archive.unlink(missing_ok=True)
        raise SpiceError(
            f"{url} is not an archive that holds {' and '.join(JARS)}: {error}; repeat the command"
        ) from error
    except (OSError, EOFError) as error:
        raise SpiceError(f"cannot fetch {url} into {folder}: {error}; run the same command again to resume") from error
    archive.unlink()
    return [jar for jar in JARS if sha256_of(folder / jar) != SHA256[jar]]


def _download(url: str, path: Path, progress: Callable[[int, int], None]) -> None:
    begun = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and begun:  # nothing is left to fetch
            return
        raise
    with answer:
        resumed = answer.status == 206  # else the server sends the whole file
        done = begun if resumed else 0
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length else 0
        with path.open("ab" if resumed else "wb") as file:
            while piece := answer.read(PIECE):
                file.write(piece)
                done += len(piece)
                progress(done, max(total, done))
    if done < total:
        raise EOFError(f"the connection ended after {done} of {total} bytes")
