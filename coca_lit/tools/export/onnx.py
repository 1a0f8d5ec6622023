"""ONNX graphs of the image encoder, the text encoder and the decoder, compared with the model in ONNX Runtime; for CPUs
also with weights and matrix products in int8, which are compared with fp32: a model of the built-in scenes on unseen
scenes, any other on the photos of the package.
"""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.onnx import OnnxExporterError

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import scene_records
from coca_lit.data.transforms import build_transform
from coca_lit.data.video import MAX_FRAMES
from coca_lit.errors import check_number
from coca_lit.metrics.cider import CiderD, fast_words
from coca_lit.models import CoCa
from coca_lit.models.generation.options import DEFAULT_MAX_LENGTH
from coca_lit.runs.run_folder import machine
from coca_lit.tools.checkpoint import SAMPLE_PHOTOS, knows_only_scenes
from coca_lit.tools.export import onnx_captioner
from coca_lit.tools.export.folder import Exported
from coca_lit.tools.export.graphs import Graph, graphs_of

OPSET = 18
TOLERANCE = 1e-3  # of the largest value of an output; ONNX Runtime adds up in another order
# Bytes. A file of protobuf holds at most 2 GB, so larger graphs keep their weights beside them.
ONE_FILE = 1_500_000_000
INT8 = "_int8"  # at the end of the names of those graphs
QUANTIZED = ["MatMul", "Gemm", "Gather"]  # convolutions in int8 lose more than they gain
SCENES, BATCH = 128, 32  # on which int8 is compared with fp32
CAPTION = """\
import sys

sys.path.append("{folder}")
from captioner import Captioner

captioner = Captioner("{folder}")  # int8=True for the int8 graphs
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


def write_onnx(model: CoCa, folder: Path, max_int8_loss: float = 0.0, frames: int = 0) -> Exported:
    """Writes and checks the graphs.

    Args:
        frames: of the clips that the graphs take, in place of images; 0 for images. int8 is then compared with fp32 on
            clips that stand still.
        max_int8_loss: what the int8 graphs may lose at most: of CIDEr on built-in scenes if these are what the model
            knows, else of the cosine between image features of fp32 and int8 on photos. 0 writes none.

    Raises:
        ValueError: a graph computes something else than the model, int8 loses more than that, or the model takes images
            of any shape.
    """
    if model.image_encoder.takes_patches:
        raise ValueError("format=onnx has graphs for images of one shape: export format=safetensors or open_clip")
    check_number("frames", frames, whole=True, at_least=0, at_most=MAX_FRAMES)
    check_number("max_int8_loss", max_int8_loss, at_least=0)
    graphs = graphs_of(model, frames)
    differences = {}
    for name, graph in graphs.items():
        _export(graph, folder / f"{name}.onnx")
        differences[name] = float(np.max([*_differences(graph, folder / f"{name}.onnx")]))  # NaN if one is
        if not differences[name] <= TOLERANCE:
            raise ValueError(f"{name}.onnx does not compute what the model does: it differs by {differences[name]:.1e}")
    _write_config(model, folder, frames)
    files = {f"{name}.onnx": graph.what for name, graph in graphs.items()}
    files |= {"config.json": "image size, lengths and special ids", "tokens.json": "the bytes of each id, as Latin-1"}
    if model.decoder is not None:
        shutil.copyfile(onnx_captioner.__file__, folder / "captioner.py")
        files["captioner.py"] = "greedy captions with NumPy and ONNX Runtime"
    measured = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    check = f"Largest difference from the model in ONNX Runtime, as a share of the largest value: {measured}."
    if max_int8_loss > 0:
        check += f" {_write_int8(model, folder, list(graphs), max_int8_loss, frames)}"
        files |= {f"{name}{INT8}.onnx": f"{name}.onnx in int8, for CPUs" for name in graphs}
    usage = f"{CAPTION}\n{FEATURES}" if model.decoder is not None else FEATURES
    files |= {path.name: "weights of that graph" for path in sorted(folder.glob("*.onnx.data"))}
    return Exported(
        library="onnx",
        files=files,
        needs="`onnxruntime` and `pillow`",
        usage=_of_clips(usage, frames) if frames else usage,
        check=check,
        limits=["The text tower is in two graphs, text encoder and decoder, so its weights are there twice."]
        if model.decoder is not None
        else [],
    )


def _of_clips(usage: str, frames: int) -> str:
    """The code for clips in place of images."""
    reading = f'frames = [captioner.read_image(f"frame{{i}}.jpg") for i in range({frames})]  # uniform in time\n'
    return (
        usage.replace("import sys\n", "import sys\n\nimport numpy as np\n")
        .replace("ids = ", f"{reading}ids = ")
        .replace('captioner.read_image("photo.jpg")[None]', "np.stack(frames)[None]")
        .replace("np.zeros((2, 3,", f"np.zeros((2, {frames}, 3,")
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


def _write_int8(model: CoCa, folder: Path, graphs: list[str], max_loss: float, frames: int) -> str:
    """Writes each graph in int8 and returns what was measured, in sentences.

    Raises:
        ValueError: more than `max_loss` is lost.
    """
    from onnxruntime.quantization import quantize_dynamic  # loads onnx

    for name in graphs:
        path = folder / f"{name}.onnx"
        large = path.with_suffix(".onnx.data").exists()
        # 7 bits of weights: without VNNI, x86 adds two products of 8 bits in 16, which overflow.
        options: dict[str, Any] = {"per_channel": True, "reduce_range": True, "use_external_data_format": large}
        with _quiet():
            quantize_dynamic(path, folder / f"{name}{INT8}.onnx", op_types_to_quantize=QUANTIZED, **options)
    files = ([path for name in graphs for path in folder.glob(f"{name}{ending}.onnx*")] for ending in ("", INT8))
    fp32, int8 = (sum(path.stat().st_size for path in of_kind) / 1e6 for of_kind in files)
    scenes = scene_records("test", model.image_size, SCENES) if knows_only_scenes(model) else None
    images = (
        np.stack([np.asarray(record.image()).transpose(2, 0, 1) for record in scenes]) if scenes else _photos(model)
    )
    if frames:
        images = np.repeat(images[:, None], frames, axis=1)
    what = f"{len(images)} built-in scenes" if scenes else f"{len(images)} views of the package's photos"
    cosine = _lowest_cosine(folder, images)
    lost, measure = 1 - cosine, f"the cosine between image features ({cosine:.4f})"
    found = f"the lowest cosine between image features of fp32 and int8 is {cosine:.4f}"
    if model.decoder is not None:
        (before, slow), (after, fast) = (_captions(folder, images, small) for small in (False, True))
        if scenes:
            old, new = _cider(before, scenes), _cider(after, scenes)
            change = f"CIDEr {100 * old:.1f} → {100 * new:.1f}"
            # A model that cannot describe the scenes has little to lose there: below 1, compared with 1.
            lost, measure, found = (old - new) / max(old, 1), f"CIDEr ({change})", f"{found}, {change}"
        same = sum(a == b for a, b in zip(before, after, strict=True)) / len(images)
        speed = f"{slow:.3g} → {fast:.3g} captions per second in batches of {BATCH}"
        found += f", {same:.1%} of the captions are the same, {speed} ({machine()})"
    if not lost <= max_loss:
        raise ValueError(
            f"on {what} the int8 graphs lose {lost:.1%} of {measure}, more than max_int8_loss={max_loss:g}: raise it,"
            " or leave them out with max_int8_loss=0"
        )
    return f"int8: {fp32:.3g} → {int8:.3g} MB; on {what} {found}."


def _photos(model: CoCa) -> np.ndarray:
    """(I, 3, H, W): the whole, the corners and the mirror image of each photo of the package."""
    transform, views = build_transform(**model.preprocessing), []
    for path in sorted(SAMPLE_PHOTOS.glob("*.jpg")):
        with Image.open(path) as photo:
            width, height = (3 * side // 4 for side in photo.size)
            corners = [(x, y) for x in (0, photo.width - width) for y in (0, photo.height - height)]
            crops = [photo.crop((x, y, x + width, y + height)) for x, y in corners]
            views += [np.asarray(transform(view)) for view in (photo, ImageOps.mirror(photo), *crops)]
    return np.stack(views)


def _captions(folder: Path, images: np.ndarray, int8: bool) -> tuple[list[str], float]:
    """Captions of images (I, 3, H, W) by the captioner in the folder, and how many it writes in a second."""
    captioner = onnx_captioner.Captioner(folder, int8=int8)
    captioner.write(images[:BATCH])  # the first run also plans memory
    start = time.perf_counter()
    ids = [row for i in range(0, len(images), BATCH) for row in captioner.write(images[i : i + BATCH])]
    seconds = time.perf_counter() - start
    return [captioner.decode(row) for row in ids], len(images) / seconds


def _cider(texts: list[str], records: list[Record]) -> float:
    """Mean CIDEr-D, 0 to 10."""
    score = CiderD({record.id: [fast_words(text) for text in record.captions] for record in records})
    scores = [score(record.id, [fast_words(text)])[0] for record, text in zip(records, texts, strict=True)]
    return sum(scores) / len(scores)


def _lowest_cosine(folder: Path, images: np.ndarray) -> float:
    sessions = [onnxruntime.InferenceSession(folder / f"image_encoder{end}.onnx") for end in ("", INT8)]
    batches = (images[i : i + BATCH] for i in range(0, len(images), BATCH))
    pairs = ([session.run(["features"], {"images": batch})[0] for session in sessions] for batch in batches)
    return float(np.min([(a * b).sum(axis=-1).min() for a, b in pairs]))  # NaN if one is


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


def _write_config(model: CoCa, folder: Path, frames: int) -> None:
    tokenizer = model.tokenizer
    config = {
        "image_size": model.image_size,
        "frames": frames,
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
