"""Search from the command line: `coca-search FOLDER "a dog on a beach"`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from coca_lit.cli.command import command
from coca_lit.cli.runtime import configure_libraries
from coca_lit.errors import ConfigError, DataError, error_context
from coca_lit.machine import best_device, in_shell
from coca_lit.reading import printable
from coca_lit.tools.caption.command import decoders, input_options_of
from coca_lit.tools.checkpoint import chosen_checkpoint

if TYPE_CHECKING:
    from coca_lit.tools.search.index import Hit, ImageIndex


def search() -> None:
    """Entry point of `coca-search`."""
    command("search", run, positional=("index", "query"))


def run(cfg: DictConfig) -> "list[Hit]":
    """Updates the index if it belongs to a folder, prints the hits and returns them."""
    from coca_lit.data.inputs import source_of
    from coca_lit.tools.caption.inputs import picture_endings
    from coca_lit.tools.caption.outputs import print_rows
    from coca_lit.tools.search.index import ImageIndex, cut_note, refresh
    from coca_lit.weights.load import load_dual_encoder

    file, folder = _places(cfg)  # before the seconds that the model takes
    configure_libraries(cfg.threads)
    with error_context("checkpoint"):
        checkpoint = chosen_checkpoint(cfg.checkpoint, smaller="coca_ViT-B-32/laion2b_s13b_b90k")
        model = load_dual_encoder(checkpoint, cfg.quick_gelu)
    model = model.to(best_device())
    index = ImageIndex.load(file, model) if file.exists() or folder is None else ImageIndex(model, folder)
    index.options = input_options_of(cfg)
    if folder is not None:
        index.folder = folder
    elif cfg.query is None and not index.folder.resolve().is_relative_to(file.resolve().parent):
        place = in_shell([f"images={index.folder}"])
        raise ConfigError(printable(f"{file} is of a folder that does not lie beside it: to read that, set {place}"))
    if folder is not None or cfg.query is None:
        changes = refresh(index, lambda: _save(index, file), cfg.batch_size, decoders(cfg.num_workers))
        for reason in changes.unreadable.values():
            print(printable(f"skipped: {reason}"), file=sys.stderr)
        if not file.exists() or changes.added or changes.changed or changes.removed:
            counts = f"{len(changes.added)} added, {len(changes.changed)} changed, {len(changes.removed)} removed"
            _save(index, file, f" ({counts})", needed=cfg.query is None)
    if cfg.query is None:
        return []
    query = str(cfg.query)
    path = Path(str(cfg.query))
    is_file = os.path.isfile(path)  # unlike Path's, False also for a text that is too long for a name
    with error_context("query"):
        if not is_file and query.lower().endswith(picture_endings()):
            raise ConfigError(f"query: there is no image '{query}'")
        asked = source_of(path, index.options) if is_file else query
        hits = index.query(asked, cfg.k, without=path if is_file else None)
    if not is_file and (note := cut_note(model.tokenizer, query)):
        print(f"note: {note}", file=sys.stderr)
    print_rows([(f"{hit.score:.4f}", str(hit.path)) for hit in hits])
    return hits


def _save(index: "ImageIndex", file: Path, counts: str = "", needed: bool = False) -> None:
    """Unless it is `needed`, hits are found without the file too: nobody may be able to write to a folder of photos."""
    try:
        index.save(file)
        print(f"{file}: {len(index)} images{counts}", file=sys.stderr)
    except DataError as error:
        if needed:
            raise
        place = f"index=FILE.safetensors images={in_shell([str(index.folder)])}"
        print(printable(f"the index is not saved ({error}): keep it elsewhere with {place}"), file=sys.stderr)


def _places(cfg: DictConfig) -> tuple[Path, Path | None]:
    """The file of the index, and the folder of images that it is updated from, if any."""
    path = Path(str(cfg.index))
    query = str(cfg.query)
    swapped = os.path.isdir(query) or query.endswith(".safetensors")
    is_folder = os.path.isdir(path)
    if not is_folder and (swapped or (cfg.images is None and not os.path.exists(path))):
        words = in_shell([query, str(path)] if swapped else ["photos/", "a dog on a beach"])
        example = f"{'did you mean' if swapped else 'for example'}: coca-search {words}"
        raise ConfigError(f"expected a folder of images or an index file first, found '{path}'; {example}")
    if cfg.images is not None:
        if is_folder:
            raise ConfigError(f"index: '{path}' is a folder; with images=FOLDER it is the file of the index")
        return path, Path(str(cfg.images))
    if is_folder:
        from coca_lit.tools.search.index import index_file

        return index_file(path), path
    return path, None
