"""Where the real data lie that some tests read."""

import json
import os
from pathlib import Path

SHARED = Path(os.environ.get("COCA_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
CAPTIONS = SHARED / "captions"


def fakecap(images: int | None = None) -> tuple[dict[int, list[str]], dict[int, str]]:
    """References and captions of coco-caption's example, or of its first images."""
    references: dict[int, list[str]] = {}
    for row in json.loads((CAPTIONS / "fakecap_refs.json").read_text())["annotations"]:
        references.setdefault(row["image_id"], []).append(row["caption"])
    captions = {row["image_id"]: row["caption"] for row in json.loads((CAPTIONS / "fakecap_results.json").read_text())}
    chosen = list(references)[:images]
    return {key: references[key] for key in chosen}, {key: captions[key] for key in chosen}
