"""A checkpoint for other programs: `coca-export checkpoint=PATH format=open_clip output=FOLDER`."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from coca_lit import extensions
from coca_lit.cli.command import command
from coca_lit.cli.runtime import configure_libraries
from coca_lit.errors import CheckpointError, ConfigError, error_context, suggest
from coca_lit.machine import in_shell

if TYPE_CHECKING:
    from coca_lit.models import CoCa
    from coca_lit.tools.export.folder import Exported

FORMATS = ("open_clip", "safetensors", "onnx")
ONNX = ("onnx", "onnxscript", "onnxruntime")  # packages that the format needs


def export() -> None:
    """Entry point of `coca-export`."""
    command("export", run)


def run(cfg: DictConfig) -> None:
    """Writes the checkpoint to the folder `cfg.output`, in the format `cfg.format`, with a model card, and uploads that
    to the repository `cfg.push_to` if there is one.
    """
    output = Path(str(cfg.output))
    with error_context("format"):
        write = _writer(cfg)
    from coca_lit.tools.export.folder import Mixture, check_output, new_folder, write_card
    from coca_lit.weights import hub
    from coca_lit.weights.computation import interpolate
    from coca_lit.weights.load import load_model

    configure_libraries(cfg.threads)
    if cfg.interpolate_with is None and cfg.weight != 0.5:
        raise ConfigError("weight belongs to interpolate_with=OTHER: leave it out, or name the other weights")
    if cfg.push_to is not None:
        hub.check_push(cfg.push_to)
    with error_context("output"):
        sources = [Path(str(name)) for name in (cfg.checkpoint, cfg.interpolate_with) if name is not None]
        check_output(output, sources, cfg.overwrite)
    with error_context("checkpoint"):
        checkpoint = hub.locate(str(cfg.checkpoint))
        model = load_model(checkpoint)
    mixture = None
    if cfg.interpolate_with is not None:
        mixture = Mixture(str(cfg.checkpoint), str(cfg.interpolate_with), cfg.weight)
        with error_context("interpolate_with"):
            interpolate(model, load_model(cfg.interpolate_with), cfg.weight)
    with new_folder(output) as folder:
        with error_context("format"):
            exported = write(model, folder)
        write_card(folder, output.resolve().name, model, exported, checkpoint, _command(cfg), mixture, cfg.push_to)
    if exported.warning:
        print(f"note: {exported.warning}")
    print(f"{exported.check}\nThe model and its card, README.md, are in {output}")
    if cfg.push_to is not None:
        try:
            print(f"and on the Hub, as {hub.push(output, cfg.push_to)}")
        except CheckpointError as error:
            raise CheckpointError(f"{error}; the export itself is whole: add overwrite=true to the command") from error


def _writer(cfg: DictConfig) -> "Callable[[CoCa, Path], Exported]":
    """The function that writes the format."""
    name = cfg.format
    version = str(cfg.version)
    inputs = {key: cfg[key] for key in extensions.input_options() if cfg[key]}
    for key, owner, is_given in (
        *((option, "onnx", True) for option in inputs),
        ("correct_cls_mask", "open_clip", cfg.correct_cls_mask),
        ("version", "open_clip", version != "3.3"),
    ):
        if is_given and name != owner:
            raise ConfigError(f"{key} belongs to format={owner}, but the format is {name}: leave it out")
    if name == "open_clip":
        from coca_lit.tools.export.open_clip import write_open_clip

        return lambda model, folder: write_open_clip(model, folder, cfg.correct_cls_mask, version)
    if name == "safetensors":
        from coca_lit.tools.export.folder import write_safetensors

        return write_safetensors
    if name == "onnx":
        missing = [package for package in ONNX if find_spec(package) is None]
        if missing:
            raise ValueError(f"onnx needs {', '.join(missing)}: pip install 'coca_lit[onnx]'")
        from coca_lit.data.inputs import chosen_reader
        from coca_lit.tools.export.onnx import write_onnx

        reader = chosen_reader(inputs)
        return lambda model, folder: write_onnx(model, folder, reader)
    raise ValueError(f"there is no format '{name}'{suggest(name, FORMATS)} The formats: {', '.join(FORMATS)}")


def _command(cfg: DictConfig) -> str:
    words = {key: cfg[key] for key in ("checkpoint", "format", "output")}
    if cfg.correct_cls_mask:
        words["correct_cls_mask"] = "true"
    if cfg.format == "open_clip":
        words["version"] = cfg.version
    words |= {key: cfg[key] for key in extensions.input_options() if cfg[key]}
    if cfg.interpolate_with is not None:
        words |= {"interpolate_with": cfg.interpolate_with, "weight": cfg.weight}
    if cfg.push_to is not None:
        words["push_to"] = cfg.push_to
    if cfg.imports:
        words["imports"] = f"[{','.join(cfg.imports)}]"
    return in_shell(["coca-export", *(f"{key}={value}" for key, value in words.items())])
