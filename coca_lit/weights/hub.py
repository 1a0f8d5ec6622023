"""Models by name: a file, a folder, a released model or a repository of the Hugging Face Hub becomes a local file.

`huggingface_hub` downloads, with its cache, its environment variables (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE), its progress bar. Fetched are the weights and `open_clip_config.json` alone, of one commit, so that
they sit in one folder. The config comes first, so cached weights are never without it.
"""

import errno
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from huggingface_hub import _CACHED_NO_EXIST, HfApi, constants, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that this version uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from coca_lit.errors import CheckpointError, suggest
from coca_lit.weights.sharded import is_checkpoint

log = logging.getLogger(__name__)

PREFIX = "hf-hub:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
# In the order in which they are looked for. `model.safetensors` is ours; in OpenCLIP's repositories it may be another
# library's file, but there one of the others comes first.
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
CHECKPOINTS = ("best.ckpt", "last.ckpt")  # of a run, in that order
FILE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
CAPTIONER = "mscoco_finetuned_laion2b_s13b_b90k"  # the tag that a CoCa's name without a tag means
DEFAULT = f"coca_ViT-L-14/{CAPTIONER}"  # what commands use without a checkpoint
RELEASED = Path(__file__).parents[1] / "assets" / "released_models.json"


class Released(NamedTuple):
    """A released model under OpenCLIP's name, "architecture/tag"."""

    name: str
    repo: str
    quick_gelu: bool = False  # of a CLIP: what it was trained with
    gigabytes: float | None = None
    sha256: Mapping[str, str] = MappingProxyType({})  # by file, where it is known
    note: str | None = None


@cache
def released_models() -> dict[str, Released]:
    """The released CoCas, and the released CLIPs that can be evaluated, by name."""
    return {name: Released(name, **facts) for name, facts in json.loads(RELEASED.read_text()).items()}


def released(name: str | Path) -> Released | None:
    """The released model of a name in any case, with - or _; of a CoCa the tag may be missing (`CAPTIONER`)."""
    known = {_key(model.name): model for model in released_models().values()}
    return known.get(_key(str(name))) or known.get(_key(f"{name}/{CAPTIONER}"))


def locate(name: str | Path) -> Path:
    """The file of weights that a name means, downloaded if need be.

    Args:
        name: a file; a folder, of a run (its best checkpoint if it kept one, else the last) or of an export; a released
            model, as in "coca_ViT-L-14/laion2b_s13b_b90k"; or "hf-hub:ORG/REPO", at a revision with "@REVISION".

    Raises:
        FileNotFoundError: there is no such file, folder or released model; the message suggests a name.
        CheckpointError: the download failed.
    """
    path, text = Path(name), str(name)
    if is_checkpoint(path):
        return path
    if path.is_dir():
        return _in_folder(path)
    if text.startswith(PREFIX):
        repo, _, revision = text.removeprefix(PREFIX).partition("@")
        return download(repo, revision or None)
    if model := released(text):
        if model.note is not None:
            log.warning("%s: %s", model.name, model.note)
        return download(model.repo, sha256=model.sha256)
    raise FileNotFoundError(f"there is no checkpoint '{name}'{hint(text)}")


def _in_folder(folder: Path) -> Path:
    names = (*(f"checkpoints/{name}" for name in CHECKPOINTS), *CHECKPOINTS, *WEIGHTS)
    found = next((folder / name for name in names if is_checkpoint(folder / name)), None)
    if found is None:
        raise FileNotFoundError(
            f"there is no checkpoint '{folder}' (it is a folder without {', '.join((*CHECKPOINTS, *WEIGHTS))}; name the"
            " file)"
        )
    return found


def hint(name: str) -> str:
    """The end of a sentence about a checkpoint that is not there: a released model with a similar name."""
    if name.endswith(FILE_SUFFIXES):
        return ""
    aliases: dict[str, str] = {}
    for model in released_models().values():
        aliases.setdefault(_key(model.name.partition("/")[0]), model.name)  # an architecture alone: its first tag
        aliases |= {_key(model.name): model.name, _key(model.repo): f"{PREFIX}{model.repo}"}
    return f": no file, no folder and no released model has this name{suggest(_key(name), (), aliases)}".rstrip(".")


def _key(name: str) -> str:
    return name.lower().replace("-", "_")


# Downloads


def download(repo: str, revision: str | None = None, sha256: Mapping[str, str] = MappingProxyType({})) -> Path:
    """The weights of a repository in the local cache, with its `open_clip_config.json` beside them if it has one.

    Args:
        sha256: what files must have, by name.

    Raises:
        CheckpointError: one sentence on what went wrong.
    """
    with _hub_errors(repo, revision):
        unreachable: LocalEntryNotFoundError | None = None
        config = None
        for name in (OPEN_CLIP_CONFIG, *WEIGHTS):
            commit = config.parent.name if config is not None else revision  # a push in between changes nothing
            cached = try_to_load_from_cache(repo, name, revision=commit)
            try:
                offline = unreachable is not None
                file = Path(hf_hub_download(repo, name, revision=commit, local_files_only=offline))
            except LocalEntryNotFoundError as error:
                if cached is not _CACHED_NO_EXIST:
                    unreachable = unreachable or error
                continue
            except EntryNotFoundError:
                continue
            if name == OPEN_CLIP_CONFIG:
                config = file
                continue
            if unreachable is not None and config is None and name.startswith("open_clip"):
                raise unreachable  # numbers of heads and activation would be guesses
            _verify(file, repo, sha256.get(name), fresh=not isinstance(cached, str))
            return file
        if unreachable is not None:
            raise unreachable
    raise CheckpointError(f"'{repo}' holds no weights that can be read; expected one of {', '.join(WEIGHTS)}")


def _verify(file: Path, repo: str, known: str | None, fresh: bool) -> None:
    """Compares a file with its SHA-256: the known one, else the one that the Hub announced, which names the file in the
    cache. The content is read once, after the download.
    """
    blob = file.resolve()
    announced = blob.name if re.fullmatch("[0-9a-f]{64}", blob.name) else None
    expected = known or announced
    found = announced
    if fresh and expected is not None:
        with blob.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != (announced or expected):
            for path in (file, blob):
                path.unlink(missing_ok=True)
            raise CheckpointError(
                f"'{file.name}' of {repo} did not arrive as it was sent (sha256 {found}, expected"
                f" {announced or expected}), so it was removed: run the same command again"
            )
    if None not in (known, found) and known != found:
        raise CheckpointError(
            f"'{file.name}' of {repo} is not the released file (sha256 {found}, expected {known}); to use it all the"
            f" same, name its revision: {PREFIX}{repo}@main"
        )


# Uploads


def check_push(repo: str) -> None:
    """Finds what would make a push fail before any work is done.

    Raises:
        CheckpointError: this is not the name of a repository, or there is no token.
    """
    with _hub_errors(repo):
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError
    if get_token() is None:
        raise CheckpointError(f"pushing to '{repo}' needs a token that may write: set HF_TOKEN, or run `hf auth login`")


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Uploads the files of a folder in one commit and returns the name that loads them. Weights of an earlier push that
    the folder lacks are removed there, all else stays.

    Args:
        repo: ORG/REPO, which is made if there is none.
        private: of a new repository.

    Raises:
        CheckpointError: one sentence on what went wrong.
    """
    check_push(repo)
    with _hub_errors(repo):
        api = HfApi(library_name="coca_lit")
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        stale = [*WEIGHTS, OPEN_CLIP_CONFIG]
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model", delete_patterns=stale)
    return f"{PREFIX}{repo}"


# Errors


@contextmanager
def _hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns what `huggingface_hub` raises about the environment into one sentence."""
    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(f"'{repo}' is not the name of a repository: expected ORG/REPO") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"'{repo}' has no revision '{revision}'") from error
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: of hf_xet
        raise CheckpointError(_sentence(repo, error)) from error


def _sentence(repo: str, error: Exception) -> str:
    hub, folder = constants.ENDPOINT, constants.HF_HUB_CACHE
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return f"'{repo}' is not in {folder}, and HF_HUB_OFFLINE forbids downloading it: unset it for one run"
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE forbids reaching {hub} for '{repo}': unset it"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, GatedRepoError):
        return f"'{repo}' is gated: accept its terms at {hub}/{repo} and set HF_TOKEN to a token of your account"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no '{repo}' at {hub}, or you may not read it: check the name; a private one needs HF_TOKEN"
    if status in (401, 403):
        return f"{hub} refuses access to '{repo}' ({status}): HF_TOKEN is not valid, or its rights do not suffice"
    if status is not None:
        return f"{hub} answered {status} for '{repo}': try again later"
    for cause in _causes(error):
        if getattr(cause, "errno", None) == errno.ENOSPC or "No space left" in str(cause):
            return f"there is no space left in {folder} for '{repo}': free some, or set HF_HOME to a folder elsewhere"
        if isinstance(cause, PermissionError):
            return f"{folder} cannot be written: set HF_HOME to a folder of yours"
    if isinstance(error, LocalEntryNotFoundError):
        return f"'{repo}' is not in {folder} and {hub} cannot be reached: check the connection, or HF_ENDPOINT"
    return f"the connection to {hub} broke while files of '{repo}' were on their way: run the same command again"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
