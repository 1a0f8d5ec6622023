"""Where the real data lie that some tests read."""

import os
from pathlib import Path

SHARED = Path(os.environ.get("COCA_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
