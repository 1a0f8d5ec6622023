"""`coca-demo`: a web page on this machine to caption, classify and search images with a model."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from coca_lit.cli.command import command
from coca_lit.cli.runtime import configure_libraries
from coca_lit.errors import ConfigError, DataError, check_number, error_context
from coca_lit.machine import best_device
from coca_lit.reading import printable
from coca_lit.tools.checkpoint import BUILTIN, chosen_checkpoint

if TYPE_CHECKING:
    from coca_lit.models import CoCa
    from coca_lit.tools.search.index import ImageIndex


def demo() -> None:
    """Entry point of `coca-demo`."""
    command("demo", run)


def run(cfg: DictConfig) -> None:
    """Serves the page until the process is stopped.

    Raises:
        ConfigError: gradio is not installed, the checkpoint cannot be used, or the port is taken.
        DataError: there is no image in the folder.
    """
    if find_spec("gradio") is None:
        raise ConfigError("the web page needs gradio: pip install 'coca_lit[demo]'")
    if cfg.port is not None:
        with error_context("port"):
            check_number("it", cfg.port, whole=True, at_least=1, at_most=65535)
    from coca_lit.weights.load import load_model

    configure_libraries(cfg.threads)
    checkpoint = chosen_checkpoint(cfg.checkpoint)
    with error_context("checkpoint"):
        model = load_model(checkpoint).to(best_device())

    from coca_lit.tools.checkpoint import knows_only_scenes, write_scenes
    from coca_lit.tools.demo.page import build_page, serve

    with _ended_by_signals(), TemporaryDirectory(prefix="coca_demo_") as temporary:
        # Uploads and thumbnails go when the page ends.
        os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(temporary, "gradio")))
        folder = Path(cfg.images) if cfg.images is not None else None
        if folder is None and knows_only_scenes(model):
            folder = write_scenes(Path(temporary, "built-in scenes"))
        index = _index(model, folder) if folder is not None else None
        page = build_page(model, checkpoint, index, builtin=cfg.checkpoint == BUILTIN)
        serve(page, cfg.port, cfg.open_browser)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within the block SIGTERM and the end of the terminal raise `SystemExit`, so that temporary files go."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _index(model: "CoCa", folder: Path) -> "ImageIndex":
    """The features of the images in the folder, up to date, in the index file that `coca-search` uses."""
    from coca_lit.data.pixels import SUFFIXES
    from coca_lit.tools.search.index import ImageIndex, index_file, refresh

    file = index_file(folder)
    problem = None
    index = ImageIndex(model, folder)
    if file.exists():
        try:
            index = ImageIndex.load(file, model)
            index.folder = folder  # as the user wrote it
        except DataError as error:  # another model's is not replaced
            problem = error
    has_others = any(path.suffix.lower() not in SUFFIXES for path in index.paths)  # which the page would lose

    def save() -> None:
        nonlocal problem
        if not problem and not has_others:
            try:
                index.save(file)
            except DataError as error:  # nobody may be able to write there
                problem = error

    changes = refresh(index, save)
    for reason in changes.unreadable.values():
        print(printable(f"not searched: {reason}"))
    save()
    if problem:
        print(printable(f"the index is not saved, and is built again next time: {problem}"))
    return index
