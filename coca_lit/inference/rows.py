"""Results on standard output: one line each, fields separated by tabs, whatever characters a file name holds."""

import os
import sys
from collections.abc import Sequence

_ESCAPES = {ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"}


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of fields. Tabs and line breaks in a field are written as \\t, \\n and \\r; bytes that are no Unicode
    come out as they are. Ends the process quietly when nobody reads any more.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        for row in rows:
            print("\t".join(field.translate(_ESCAPES) for field in row))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads our output, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit()
