"""Models by name: a file, a folder, a released model or a repository of the Hugging Face Hub becomes a local file.

`huggingface_hub` downloads, with its cache, its environment variables (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE), its progress bar. Fetched are one file of weights and OpenCLIP's config alone, of one commit, so that
they sit in one folder. The config comes first, so cached weights are never without it.
"""

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from socket import gaierror
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
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_session, validate_repo_id

from coca_lit.errors import CheckpointError, suggest
from coca_lit.reading import check_inside
from coca_lit.weights.sharded import is_checkpoint

log = logging.getLogger(__name__)

PREFIX = "hf-hub:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
CONFIGS = (OPEN_CLIP_CONFIG, "config.json")  # the second may be another library's, see `load`
EPOCH = re.compile(r"epoch_(\d+)\.pt")  # OpenCLIP's checkpoints of a training
# In the order in which they are looked for. `model.safetensors` is ours; in OpenCLIP's repositories it may be another
# library's file, but there one of the others comes first.
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
GRAPHS = ("image_encoder", "text_encoder", "decoder")  # of an export to ONNX
GRAPH_ENDS = (".onnx", ".onnx.data")
CHECKPOINTS = ("best.ckpt", "last.ckpt")  # of a run, in that order
FILE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
CAPTIONER = "mscoco_finetuned_laion2b_s13b_b90k"  # the tag that a CoCa's name without a tag means
DEFAULT = f"coca_ViT-L-14/{CAPTIONER}"  # what commands use without a checkpoint
ASSETS = Path(__file__).parents[1] / "assets"
RELEASED = ASSETS / "released_models.json"
PHOTOS = "photos"  # the small model that comes with the package
WITHOUT_HUB = f"name a local file, or '{PHOTOS}', the small model that comes with coca_lit"
PHOTOS_WEIGHTS = ASSETS / PHOTOS / "model.safetensors"
MAX_CONFIG = 4 * 2**20  # bytes of JSON that describe a model
PATIENCE = 5.0  # seconds for the Hub to answer at all


class Released(NamedTuple):
    """A released model under OpenCLIP's name, "architecture/tag"."""

    name: str
    repo: str
    quick_gelu: bool = False  # of a CLIP: what it was trained with
    gigabytes: float | None = None
    sha256: Mapping[str, str] = MappingProxyType({})  # by file, where it is known
    licence: str | None = None  # if it restricts the use
    note: str | None = None

    @property
    def captions(self) -> bool:
        """Whether it is a captioner and no CLIP."""
        return not self.name.startswith("ViT-")


@cache
def released_models() -> dict[str, Released]:
    """The released CoCas, and the released CLIPs that can be evaluated, by name."""
    return {name: Released(name, **facts) for name, facts in json.loads(RELEASED.read_text()).items()}


def list_models(pattern: str = "*") -> list[str]:
    """The names of models, sorted: captioners ("coca_…" and others), which `load_model` takes, and CLIPs ("ViT-…"),
    for `coca-evaluate`, `coca-search`, `init_from` and `coca_lit.weights.load.load_dual_encoder`.

    Args:
        pattern: with `*`, `?` and `[…]`, in any case and with - or _: "coca*" names the captioners. After "hf-hub:"
            what is in a repository, as in "hf-hub:laion/scaling-laws-for-comparison/ViT-S-32-alt*" or, for the epochs
            of a run, "hf-hub:ORG/REPO/FOLDER/epoch_*".

    Raises:
        CheckpointError: the repository cannot be listed.
    """
    names: Iterable[str] = released_models()
    if pattern.startswith(PREFIX):
        org, _, rest = pattern.removeprefix(PREFIX).partition("/")
        repo, _, path = rest.partition("/")
        folder = path.rpartition("/")[0]
        with _hub_errors(f"{org}/{repo}"):
            _expect_name(f"{org}/{repo}")
            files, folders = _listed(f"{org}/{repo}", folder, None)
        start = "/".join(filter(None, (f"{PREFIX}{org}/{repo}", folder)))
        names = [f"{start}/{name}" for name in (*folders, *files) if name in folders or name.endswith(FILE_SUFFIXES)]
    key = re.sub(r"(\[[^]]*\])|-", lambda found: found[1] or "_", pattern.lower())  # in [0-9] it is no part of a name
    return sorted(name for name in names if fnmatchcase(_key(name), key))


def released(name: str | Path) -> Released | None:
    """The released model of a name or a repository in any case, with - or _; of a CoCa the tag may be missing
    (`CAPTIONER`).
    """
    known = {_key(model.repo): model for model in released_models().values()}
    known |= {_key(model.name): model for model in released_models().values()}
    return known.get(_key(str(name))) or known.get(_key(f"{name}/{CAPTIONER}"))


def locate(name: str | Path) -> Path:
    """The file of weights that a name means, downloaded if need be.

    Args:
        name: a file; a folder, of a run (its best checkpoint if it kept one, else the last), of an export or of one of
            OpenCLIP's trainings, and "FOLDER/epoch_N"; a released model, as in "coca_ViT-L-14/laion2b_s13b_b90k", or
            its repository; "hf-hub:ORG/REPO" with any of "/FOLDER", "/FILE" or "/epoch_N", and "@REVISION"; or
            "photos", which is the package's own model even where a folder has this name: "photos/" is the folder.

    Raises:
        FileNotFoundError: there is no such file, folder or released model; the message suggests a name.
        CheckpointError: the download failed, or there are several files to choose from.
        DataError: what was found in a folder is a link out of it.
    """
    text = os.path.expanduser(name)  # a shell leaves the ~ of checkpoint=~/run
    path = Path(text)
    if text == PHOTOS:
        return PHOTOS_WEIGHTS
    if path.is_file():
        return path
    if path.is_dir():
        names = ("", *(f"checkpoints/{name}" for name in CHECKPOINTS), *CHECKPOINTS, *WEIGHTS)
        found = next((path / name for name in names if is_checkpoint(path / name)), None)
        if found:
            _check_links(found, path)
            return found
        weights = [file.name for file in path.iterdir() if file.suffix in FILE_SUFFIXES and is_checkpoint(file)]
        if weights:
            found = path / choose(weights, "", str(path))
            _check_links(found, path)
            return found
        expected = ", ".join((*CHECKPOINTS, *WEIGHTS))
        raise FileNotFoundError(f"there is no checkpoint in the folder '{path}': expected {expected}")
    file = Path(f"{path}.pt")
    if is_checkpoint(file):
        return file
    if text.startswith(PREFIX):
        place, _, revision = text.removeprefix(PREFIX).partition("@")
        parts = place.rstrip("/").split("/")
        repo = "/".join(parts[:2])
        _tell(next((model for model in released_models().values() if model.repo == repo), None))
        return download(repo, revision or None, "/".join(parts[2:]))
    model = released(text)
    if model:
        _tell(model)
        return download(model.repo, sha256=model.sha256)
    raise FileNotFoundError(f"there is no checkpoint '{name}'{hint(text)}")


def _check_links(found: Path, folder: Path) -> None:
    """Raises `DataError` if weights in a folder, or what is read with them, are links out of it. In the Hub's cache
    `snapshots/COMMIT` links to `blobs`.
    """
    beside = [found.parent / name for name in CONFIGS] if found != folder else []
    caches = (place.parent for place in Path(os.path.abspath(folder)).parents if place.name == "snapshots")
    whole = next((cache for cache in caches if (cache / "blobs").is_dir()), folder)
    for file in (found, *found.glob("*"), *beside):
        check_inside(file, whole)


@cache
def _say(name: str, fact: str) -> None:
    """Says something of a model once in a process."""
    log.warning("%s: %s", name, fact)


def _tell(model: Released | None) -> None:
    """Says what a user of a released model has to know."""
    if model is not None and model.note is not None:
        _say(model.name, model.note)
    if model is not None and model.licence is not None:
        _say(model.name, f"its licence restricts the use: {model.licence}, see {constants.ENDPOINT}/{model.repo}")


def hint(name: str) -> str:
    """The end of a sentence about a checkpoint that is not there: a released model with a similar name."""
    if name.endswith(FILE_SUFFIXES):
        return ""
    aliases = {PHOTOS: PHOTOS}
    for model in released_models().values():
        aliases.setdefault(_key(model.name.partition("/")[0]), model.name)  # an architecture alone: its first tag
        aliases |= {_key(model.name): model.name, _key(model.repo): f"{PREFIX}{model.repo}"}
    return f": no file, no folder and no released model has this name{suggest(_key(name), (), aliases)}".rstrip(".")


def _key(name: str) -> str:
    return name.lower().replace("-", "_")


# Downloads


def available(name: str) -> bool:
    """Whether the weights of a released model are in the cache or can be asked for."""
    names = _cached(released_models()[name].repo, "", None)
    return any(name.endswith(FILE_SUFFIXES) for name in names) or _reachable()


def _reachable() -> bool:
    """Whether the Hub answers anything. Its client would try again and again for half a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except (HTTPError, OSError):  # HF_HUB_OFFLINE is an OSError, too
        return False
    except (ImportError, ValueError) as error:  # the client lacks a package for this proxy, or knows none of its kind
        _say(constants.ENDPOINT, f"cannot be asked: {error}")
        return False
    return True


def download(
    repo: str, revision: str | None = None, path: str = "", sha256: Mapping[str, str] = MappingProxyType({})
) -> Path:
    """The weights of a repository in the local cache, with OpenCLIP's config beside them if there is one.

    Args:
        path: in the repository: a folder, or a file or "epoch_N" in one; see `choose`.
        sha256: what files must have, by name.

    Raises:
        CheckpointError: one sentence on what went wrong.
    """
    folder, _, wanted = path.rpartition("/")
    if not (wanted.endswith(FILE_SUFFIXES) or wanted.startswith("epoch_")):
        folder = path
        wanted = ""
    if path and not all(part.strip(".") for part in path.split("/")):
        raise CheckpointError(f"'{path}' is not a path within '{repo}'")
    with _hub_errors(repo, revision):
        _expect_name(repo)
        offline = not _reachable()
        try:
            names = _cached(repo, folder, revision) if offline else _listed(repo, folder, revision)[0]
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            names = _cached(repo, folder, revision)
            named = {wanted, f"{wanted}.pt"} if wanted else {*WEIGHTS}  # of epochs the last may be missing
            if not (status == 429 or status >= 500) or names.isdisjoint(named):
                raise
            offline = True
            _say(repo, f"{constants.ENDPOINT} answered {status}, so what was fetched before is taken")
        weights = {name for name in names if name.endswith(FILE_SUFFIXES)}
        if offline and (weights.isdisjoint((wanted, f"{wanted}.pt")) if wanted else not weights):
            raise LocalEntryNotFoundError("no weights in the cache")
        name = choose(weights, wanted, f"{repo}/{folder}".rstrip("/"))
        # Also asked for where it is not listed: the cache then knows that there is none.
        config = next((name for name in CONFIGS if name in names), OPEN_CLIP_CONFIG)
        commit = revision
        inside = f"{folder}/" if folder else ""
        try:
            found = Path(hf_hub_download(repo, inside + config, revision=revision, local_files_only=offline))
            commit = found.parents[inside.count("/")].name  # a push in between changes nothing
        except LocalEntryNotFoundError:
            known = try_to_load_from_cache(repo, inside + config, revision=revision)
            if known is not _CACHED_NO_EXIST and name != WEIGHTS[-1]:
                raise  # numbers of heads and activation would be guesses
        except EntryNotFoundError:
            pass
        cached = try_to_load_from_cache(repo, inside + name, revision=commit)
        file = Path(hf_hub_download(repo, inside + name, revision=commit, local_files_only=offline))
        _verify(file, repo, sha256.get(name), fresh=not isinstance(cached, str))
        return file


def choose(names: Iterable[str], wanted: str, where: str) -> str:
    """The file of weights in a folder: the one that is asked for, one of `WEIGHTS`, the last epoch, or the only one.

    Args:
        names: of the files of weights there.
        wanted: a name, or "epoch_N" for "epoch_N.pt"; empty if nothing is asked for.
        where: the folder, for messages.

    Raises:
        CheckpointError: it is not there, there is none, or there are several.
    """
    weights = sorted(names)
    epochs = {int(match[1]): name for name in weights if (match := EPOCH.fullmatch(name))}
    if wanted:
        found = next((name for name in (wanted, f"{wanted}.pt") if name in weights), None)
        if found:
            return found
        listed = f"the epochs {', '.join(map(str, sorted(epochs)))}" if epochs else ", ".join(weights) or "no weights"
        raise CheckpointError(f"'{where}' has no '{wanted}': it has {listed}")
    known = next((name for name in WEIGHTS if name in weights), None)
    if known:
        return known
    if epochs or len(weights) == 1:
        return epochs[max(epochs)] if epochs else weights[0]
    if weights:
        raise CheckpointError(f"'{where}' has several files of weights: add one to its name, of {', '.join(weights)}")
    raise CheckpointError(f"'{where}' holds no weights that can be read; expected one of {', '.join(WEIGHTS)}")


def _listed(repo: str, folder: str, revision: str | None) -> tuple[set[str], set[str]]:
    """The names of files and of folders in a folder of a repository on the Hub."""
    inside = f"{folder}/" if folder else ""
    try:
        entries = list(HfApi().list_repo_tree(repo, folder or None, revision=revision))
    except EntryNotFoundError as error:
        raise CheckpointError(f"'{repo}' has no folder '{folder}'") from error
    files: set[str] = set()
    folders: set[str] = set()
    for entry in entries:
        if re.fullmatch(rf"{re.escape(inside)}[^/\\]+", entry.path):
            kind = files if isinstance(entry, RepoFile) else folders
            kind.add(entry.path.removeprefix(inside))
    return files, folders


def _cached(repo: str, folder: str, revision: str | None) -> set[str]:
    """The names of files in a folder of a repository that are in the local cache."""
    place = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
    ref = place / "refs" / (revision or constants.DEFAULT_REVISION)
    commit = ref.read_text() if ref.is_file() else str(revision)
    files = (place / "snapshots" / commit / folder).glob("*")
    return {path.name for path in files if path.is_file()}


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
                f"'{file.name}' of {repo} arrived damaged and was removed: run the same command again"
                f" (sha256 {found}, expected {announced or expected})"
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
        _expect_name(repo)
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
        stale = [*WEIGHTS, OPEN_CLIP_CONFIG, *(graph + end for graph in GRAPHS for end in GRAPH_ENDS)]
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model", delete_patterns=stale)
    return f"{PREFIX}{repo}"


# Errors


def _expect_name(repo: str) -> None:
    validate_repo_id(repo)
    if "/" not in repo:  # a name of the Hub's first years
        raise HFValidationError


@contextmanager
def _hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns what `huggingface_hub` raises about the environment into one sentence."""
    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(f"'{repo}' is not the name of a repository: expected ORG/REPO") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"'{repo}' has no revision '{revision}'") from error
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise CheckpointError(_sentence(repo, error.__cause__)) from error
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise CheckpointError(f"'{repo}' is not in {constants.HF_HUB_CACHE}, and {why}: {WITHOUT_HUB}") from None
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: of hf_xet
        raise CheckpointError(_sentence(repo, error)) from error
    except (ImportError, ValueError) as error:  # as in `_reachable`
        raise CheckpointError(f"{constants.ENDPOINT} cannot be asked for '{repo}': {error}") from error


def _sentence(repo: str, error: Exception) -> str:
    hub = constants.ENDPOINT
    folder = constants.HF_HUB_CACHE
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE forbids reaching {hub} for '{repo}': unset it"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, GatedRepoError):
        return f"'{repo}' is gated: accept its terms at {hub}/{repo} and set HF_TOKEN to a token of your account"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no '{repo}' at {hub}, or you may not read it: check the name; a private one needs HF_TOKEN"
    if status in (401, 403):
        return f"{hub} refuses access to '{repo}' ({status}): HF_TOKEN is not valid, or its rights do not suffice"
    if status is not None:
        return f"{hub} answered {status} for '{repo}': try again later"
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) == errno.ENOSPC or "No space left" in str(cause):
            return f"there is no space left in {folder} for '{repo}': free some, or set HF_HOME to a folder elsewhere"
        if isinstance(cause, PermissionError):
            return f"{folder} cannot be written: set HF_HOME to a folder of yours"
        if isinstance(cause, ConnectionRefusedError | gaierror):
            return f"{hub} cannot be reached for '{repo}': {WITHOUT_HUB}"
        cause = cause.__cause__ or cause.__context__
    return f"the connection to {hub} broke while files of '{repo}' were on their way: run the same command again"
