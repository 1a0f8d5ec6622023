"""The model of a command that names none."""

import sys
from pathlib import Path

BUILTIN = "builtin"  # as a checkpoint: the demo model, which learned the built-in scenes
OUTPUTS = Path("outputs")


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
        from coca_lit.tools.builtin import find_demo_model, train_demo_model

        if found := find_demo_model(OUTPUTS):
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
