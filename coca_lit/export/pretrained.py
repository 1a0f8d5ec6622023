"""The methods of `CoCa` that Hugging Face's libraries have too: `from_pretrained`, `save_pretrained`, `push_to_hub`."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from coca_lit.export.card import write_card
from coca_lit.export.folder import check_output, new_folder
from coca_lit.export.safetensors import write_safetensors
from coca_lit.models import CoCa
from coca_lit.weights import hub
from coca_lit.weights.load import load_model


def from_pretrained(name: str | Path) -> CoCa:
    """As `load_model`; "ORG/REPO" that is neither a path nor a released model is a repository of the Hub."""
    repository = re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", str(name)) and not Path(name).exists()
    return load_model(f"{hub.PREFIX}{name}" if repository and not hub.released(name) else name)


def save_pretrained(model: CoCa, folder: str | Path) -> None:
    """Writes weights, architecture and a model card, as `coca-export format=safetensors` does; an earlier export in the
    folder is replaced.

    Raises:
        ValueError: the folder holds something else.
    """
    folder = Path(folder)
    check_output(folder, overwrite=True)
    with new_folder(folder) as new:
        write_card(new, folder.resolve().name, model, write_safetensors(model, new))


def push_to_hub(model: CoCa, repo: str, private: bool = False) -> str:
    """Uploads what `save_pretrained` writes to a repository of the Hub, which is made if there is none.

    Returns:
        The name that loads it, "hf-hub:ORG/REPO".

    Raises:
        CheckpointError: one sentence on what went wrong.
    """
    hub.check_push(repo)
    with TemporaryDirectory() as folder:
        write_card(Path(folder), repo.partition("/")[2], model, write_safetensors(model, Path(folder)), repo=repo)
        return hub.push(Path(folder), repo, private)
