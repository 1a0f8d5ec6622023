"""What the tools show without data of the user: photos of the package, and the model of the built-in scenes, trained by
an earlier run or now.
"""

import subprocess
import sys
from pathlib import Path

from coca_lit.data.scenes.render import VOCABULARY, scene_records
from coca_lit.errors import ConfigError
from coca_lit.models import CoCa
from coca_lit.reading import read_json

PHOTOS = Path(__file__).parents[1] / "assets" / "photos"  # of the public domain
RUN = "demo_model"  # name of the run if one must be started
SCORE = "scenes/exact_match"
GOOD = 0.8  # least score: a finished demo has 0.92 or more, a smoke test 0
SCENES = 200  # images on the page
EDGE = 256  # pixels, for people; the model resizes them


def find_demo_model(outputs: Path) -> Path | None:
    """The checkpoint of the run in `outputs` with the best captions of unseen scenes; None if none is good."""
    good = []
    for results in (*outputs.glob("*/results.json"), *outputs.glob("*/*/results.json")):
        checkpoint = results.parent / "checkpoints" / "last.ckpt"
        if checkpoint.is_file() and (score := read_json(results, dict).get(SCORE, 0.0)) >= GOOD:
            good.append((score, checkpoint))
    return max(good)[1] if good else None


def train_demo_model(outputs: Path) -> Path:
    """Trains the demo as `python train.py` does, with its progress on the terminal, and returns the checkpoint.

    Raises:
        ConfigError: the training failed; its error is in the terminal.
    """
    folder = outputs / RUN
    program = "import sys; sys.argv[0] = 'coca-train'; from coca_lit.cli import train_command; train_command()"
    done = subprocess.run([sys.executable, "-c", program, "experiment=demo", f"name={RUN}", f"hydra.run.dir={folder}"])
    if done.returncode:
        raise ConfigError(
            "the training of the built-in demo model failed, see above; to show another, set checkpoint=PATH"
        )
    return folder / "checkpoints" / "last.ckpt"


def knows_only_scenes(model: CoCa) -> bool:
    """Whether a model has the vocabulary of the built-in scenes, so that it cannot describe photos."""
    return model.tokenizer.spec == list(VOCABULARY)


def write_scenes(folder: Path, count: int = SCENES) -> Path:
    """Writes unseen scenes as PNG files named after their first caption; existing files are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in scene_records("test", EDGE, count):
        path = folder / f"{record.captions[0]}.png"
        if not path.exists():
            record.image().save(path)
    return folder
