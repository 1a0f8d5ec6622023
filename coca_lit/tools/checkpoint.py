"""The model of a command that names none, and what the tools show without data of the user: photos of the package, and
the model of the built-in scenes, trained by an earlier run or now.
"""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from coca_lit.errors import ConfigError
from coca_lit.reading import check_inside, read_json
from coca_lit.runs.run_folder import ARCHIVED

if TYPE_CHECKING:
    from coca_lit.models import CoCa

BUILTIN = "builtin"  # as a checkpoint: the demo model, which learned the built-in scenes
OUTPUTS = Path("outputs")
RUN = "demo_model"  # name of the run if one must be started
SCORE = "scenes/exact_match"
GOOD = 0.8  # least score: a finished demo has 0.92 or more, a smoke test 0
SCENES = 200  # images on the page
EDGE = 256  # pixels, for people; the model resizes them


def chosen_checkpoint(checkpoint: str | None, smaller: str = "coca_ViT-B-32", offline: bool = True) -> str:
    """The checkpoint of a command as it is given, or what stands in for it: a released model if there is none, or the
    package's own where that can neither be found nor downloaded; the model of the built-in scenes for `BUILTIN`,
    trained now if no run has left one. Standard error says which one and where it is kept.

    Args:
        smaller: the released model to recommend where the default one is too large.
        offline: whether the package's own model may take the place of the released one.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    from coca_lit.distributed import broadcast_object, rank
    from coca_lit.weights.hub import DEFAULT, PHOTOS, available, released

    if checkpoint == BUILTIN:
        found = find_demo_model(OUTPUTS)
        if found:
            print(f"the built-in demo model is {found}", file=sys.stderr)
            return str(found)
        print(f"there is no finished demo run in {OUTPUTS}: training the demo model, a few minutes", file=sys.stderr)
        return str(train_demo_model(OUTPUTS))
    if checkpoint is not None:
        return str(checkpoint)
    if offline and not broadcast_object(rank() == 0 and available(DEFAULT)):
        if rank() == 0:
            print(
                f"no checkpoint given, and {DEFAULT} is neither in {HF_HUB_CACHE} nor can it be downloaded now: this is"
                f" {PHOTOS}, the small model that comes with coca_lit",
                file=sys.stderr,
            )
        return PHOTOS
    size, small = (model.gigabytes for name in (DEFAULT, smaller) if (model := released(name)))
    if rank() == 0:
        print(
            f"no checkpoint given: this is {DEFAULT}, OpenCLIP's CoCa finetuned on MSCOCO, {size} GB, kept in"
            f" {HF_HUB_CACHE}; a smaller one: checkpoint={smaller} ({small} GB)",
            file=sys.stderr,
        )
    return DEFAULT


def find_demo_model(outputs: Path) -> Path | None:
    """The checkpoint of the run in `outputs` with the best captions of unseen scenes; None if none is good. Raises
    `DataError` for a link out of its run folder.
    """
    good = []
    for results in (*outputs.glob("*/results.json"), *outputs.glob("*/*/results.json")):
        checkpoint = results.parent / "checkpoints" / "last.ckpt"
        is_archived = ARCHIVED.fullmatch(results.parent.name)
        if checkpoint.is_file() and not is_archived and (score := read_json(results, dict).get(SCORE, 0.0)) >= GOOD:
            check_inside(checkpoint, results.parent)
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
        raise ConfigError("the training of the demo model failed, see above; to show another, set checkpoint=PATH")
    return folder / "checkpoints" / "last.ckpt"


def knows_only_scenes(model: "CoCa") -> bool:
    """Whether a model has the vocabulary of the built-in scenes, so that it cannot describe photos."""
    from coca_lit.models.presets import VOCABULARIES

    return model.tokenizer.spec == VOCABULARIES["scenes"]


def write_scenes(folder: Path, count: int = SCENES) -> Path:
    """Writes unseen scenes as PNG files named after their first caption; existing files are kept."""
    from coca_lit.data.scenes.render import scene_records

    folder.mkdir(parents=True, exist_ok=True)
    for record in scene_records("test", EDGE, count):
        path = folder / f"{record.captions[0]}.png"
        if not path.exists():
            record.image().save(path)
    return folder
