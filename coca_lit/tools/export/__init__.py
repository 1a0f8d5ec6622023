"""A model as files for other programs: OpenCLIP, safetensors and ONNX, each with a model card."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command checks its keys before torch is imported
    from coca_lit.models import CoCa

__all__ = ["push_to_hub", "save_pretrained"]


def save_pretrained(model: "CoCa", folder: str | Path) -> None:
    """Writes weights, architecture and a model card, as `coca-export format=safetensors` does; an earlier export in the
    folder is replaced.

    Raises:
        ValueError: the folder holds something else.
    """
    from coca_lit.tools.export.folder import check_output, new_folder, write_card, write_safetensors

    folder = Path(folder)
    check_output(folder, overwrite=True)
    with new_folder(folder) as new:
        write_card(new, folder.resolve().name, model, write_safetensors(model, new))


def push_to_hub(model: "CoCa", repo: str, private: bool = False) -> str:
    """Uploads what `save_pretrained` writes to a repository of the Hub, which is made if there is none.

    Returns:
        The name that `coca_lit.load_model` takes, "hf-hub:ORG/REPO".

    Raises:
        CheckpointError: one sentence on what went wrong.
    """
    from tempfile import TemporaryDirectory

    from coca_lit.tools.export.folder import write_card, write_safetensors
    from coca_lit.weights import hub

    hub.check_push(repo)
    with TemporaryDirectory() as folder:
        write_card(Path(folder), repo.partition("/")[2], model, write_safetensors(model, Path(folder)), repo=repo)
        return hub.push(Path(folder), repo, private)
