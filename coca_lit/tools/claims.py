"""Whose an output is: the settings that make it, recorded beside it, so that no other command adds to it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coca_lit.errors import DataError
from coca_lit.files import beside, write_errors
from coca_lit.reading import printable, read_json


def is_of_another(made: str, path: Path) -> bool:
    """Whether a result that was made of the file `made` is not of this one, and not of one that has moved here."""
    return os.path.exists(made) and not os.path.samefile(made, path)


def claim(file: Path, settings: Mapping[str, Any], taken: bool = False) -> None:
    """Records in `file`, beside an output, the settings that make it. Of several processes that begin at once, the
    first one records its own.

    Args:
        taken: whether the output exists already: then the record must, too.

    Raises:
        DataError: the output is made with other settings, or is not ours; or nothing can be written there.
    """
    if not taken and not file.exists() and _created(file, (json.dumps(settings, indent=2) + "\n").encode()):
        return
    if not file.exists():
        raise DataError(f"the output exists and this command did not write it ({file} is missing): choose another")
    known = read_json(file, dict)
    for key in {**settings, **known}:
        if known.get(key) != settings.get(key):
            was, now = (printable(f"{key}={values.get(key)}") for values in (known, settings))
            raise DataError(f"{file} says {was}, but now {now}: choose another output")


def _created(path: Path, content: bytes) -> bool:
    """Writes a new file, complete or not at all where the system has hard links; False if there is one."""
    temporary = beside(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            try:
                os.link(temporary, path)  # unlike a renaming, it fails if the file exists
            except (OSError, NotImplementedError):  # it does, or there are no hard links here
                with path.open("xb") as file:
                    file.write(content)
            return True
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
