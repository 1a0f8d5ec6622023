"""ONNX graphs of the image encoder, the text encoder and the decoder, compared with the model in ONNX Runtime."""

import json
import logging
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from torch.onnx import OnnxExporterError

from coca_lit.data.inputs import IMAGES, ImageReader
from coca_lit.models import CoCa
from coca_lit.models.generation.options import DEFAULT_MAX_LENGTH
from coca_lit.tools.export import onnx_captioner
from coca_lit.tools.export.folder import Exported
from coca_lit.tools.export.graphs import Graph, graphs_of

OPSET = 18
TOLERANCE = 1e-3  # of the largest value of an output; ONNX Runtime adds up in another order
# Bytes. A file of protobuf holds at most 2 GB, so larger graphs keep their weights beside them.
ONE_FILE = 1_500_000_000
CAPTION = """\
import sys

sys.path.append("{folder}")
from captioner import Captioner

captioner = Captioner("{folder}")
ids = captioner.write(captioner.read_image("photo.jpg")[None])
print(captioner.decode(ids[0]))
"""
FEATURES = """\
import json

import numpy as np
import onnxruntime

image_encoder = onnxruntime.InferenceSession("{folder}/image_encoder.onnx")
text_encoder = onnxruntime.InferenceSession("{folder}/text_encoder.onnx")
config = json.load(open("{folder}/config.json"))
images = np.zeros((2, 3, config["image_size"], config["image_size"]), np.uint8)  # resized and cropped, not normalised
tokens = np.full((1, config["context_length"]), config["pad_id"])
tokens[0, :2] = config["start_id"], config["end_id"]  # between them the ids of a text, see tokens.json
image_features = image_encoder.run(["features"], {"images": images})[0]
text_features = text_encoder.run(None, {"tokens": tokens})[0]
print(image_features @ text_features.T)
"""


def write_onnx(model: CoCa, folder: Path, reader: ImageReader = IMAGES) -> Exported:
    """Writes and checks the graphs.

    Args:
        reader: of the kind of input that the graphs take.

    Raises:
        ValueError: a graph computes something else than the model, or the model takes no images of one shape.
    """
    if model.image_encoder.input_kind is not None:
        raise ValueError("format=onnx has graphs for images of one shape: export format=safetensors or open_clip")
    graphs = graphs_of(model, reader)
    differences = {}
    for name, graph in graphs.items():
        _export(graph, folder / f"{name}.onnx")
        differences[name] = float(np.max([*_differences(graph, folder / f"{name}.onnx")]))  # NaN if one is
        if not differences[name] <= TOLERANCE:
            raise ValueError(f"{name}.onnx does not compute what the model does: it differs by {differences[name]:.1e}")
    _write_config(model, folder, reader)
    files = {f"{name}.onnx": graph.what for name, graph in graphs.items()}
    files |= {"config.json": "image size, lengths and special ids", "tokens.json": "the bytes of each id, as Latin-1"}
    if model.decoder is not None:
        shutil.copyfile(onnx_captioner.__file__, folder / "captioner.py")
        files["captioner.py"] = "greedy captions with NumPy and ONNX Runtime"
    measured = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    check = f"Largest difference from the model in ONNX Runtime, as a share of the largest value: {measured}."
    usage = f"{CAPTION}\n{FEATURES}" if model.decoder is not None else FEATURES
    files |= {path.name: "weights of that graph" for path in sorted(folder.glob("*.onnx.data"))}
    return Exported(
        library="onnx",
        files=files,
        needs="`onnxruntime` and `pillow`",
        usage=_of_several_pictures(usage, reader) if reader.leading else usage,
        check=check,
        limits=["The text tower is in two graphs, text encoder and decoder, so its weights are there twice."]
        if model.decoder is not None
        else [],
    )


def _of_several_pictures(usage: str, reader: ImageReader) -> str:
    """The code for inputs of several pictures in place of images."""
    (count,) = reader.leading
    read = f'captioner.read_image(f"picture{{i}}.jpg") for i in range({count})'
    reading = f"pictures = [{read}]  # {reader.pictures}\n"
    return (
        usage.replace("import sys\n", "import sys\n\nimport numpy as np\n")
        .replace("ids = ", f"{reading}ids = ")
        .replace('captioner.read_image("photo.jpg")[None]', "np.stack(pictures)[None]")
        .replace("np.zeros((2, 3,", f"np.zeros((2, {count}, 3,")
    )


def _export(graph: Graph, path: Path) -> None:
    weights = sum(tensor.nbytes for tensor in graph.module.state_dict().values())
    try:
        with _quiet():
            torch.onnx.export(
                graph.module,
                (),
                path,
                kwargs=graph.inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=graph.dynamic,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                external_data=weights > ONE_FILE,
                verbose=False,
            )
    except OnnxExporterError as error:
        raise ValueError(f"PyTorch cannot write {path.name} of this model: {str(error).splitlines()[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's log messages; errors are raised as exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@torch.no_grad()
def _differences(graph: Graph, path: Path) -> Iterator[float]:
    """Largest difference of each output, as a share of the largest value, for inputs of the example's shape and of the
    smallest one.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    smallest, least = {}, {"past": 0}  # a caption that begins
    for name, tensor in graph.inputs.items():
        axes = [graph.dynamic[name].get(axis) for axis in range(tensor.ndim)]
        smallest[name] = tensor[tuple(slice(least.get(axis, 1) if axis else None) for axis in axes)]
    for inputs in (graph.inputs, smallest):
        expected: Any = graph.module(**inputs)
        found = session.run(None, {name: tensor.contiguous().numpy() for name, tensor in inputs.items()})
        for ours, theirs in zip([expected] if isinstance(expected, Tensor) else expected, found, strict=True):
            yield float((ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max())


def _write_config(model: CoCa, folder: Path, reader: ImageReader) -> None:
    tokenizer = model.tokenizer
    config = {
        "image_size": model.image_size,
        "pictures": math.prod(reader.leading) if reader.leading else 0,  # of an input; 0: an image
        "interpolation": model.preprocessing["interpolation"],
        "resize_mode": model.preprocessing["resize_mode"],
        "context_length": tokenizer.context_length,
        "max_length": min(DEFAULT_MAX_LENGTH, tokenizer.context_length),
        "start_id": tokenizer.sot_id,
        "end_id": tokenizer.eot_id,
        "pad_id": tokenizer.pad_id,
        "logit_scale": model.logit_scale.exp().item(),
        **({"logit_bias": model.logit_bias.item()} if model.logit_bias is not None else {}),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokens = [token.decode("latin-1") for token in tokenizer.token_bytes]
    (folder / "tokens.json").write_text(json.dumps(tokens) + "\n")
