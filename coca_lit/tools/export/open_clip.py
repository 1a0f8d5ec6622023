"""A folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads strictly."""

import json
from pathlib import Path

import torch

from coca_lit.models import CoCa
from coca_lit.models.inputs import largest_shape
from coca_lit.tools.export.folder import Exported
from coca_lit.weights.intact import save_tensors
from coca_lit.weights.load import OPEN_CLIP_CONFIG, load_model, unshared_copies
from coca_lit.weights.open_clip import to_open_clip
from coca_lit.weights.open_clip.config import described_parts, open_clip_config

WEIGHTS = "open_clip_model.safetensors"
TOLERANCE = 1e-5
CORRECT_MASK = (
    "model.text.correct_cls_mask = True  # the mask this model was trained with; OpenCLIP has no key for it\n"
)
ADVICE = (
    "Train models that others will load in OpenCLIP 3.3 with model.net.cls_mask=legacy: they compute the same there"
    " without further code."
)
NEEDS_LINE = (
    "Text features need the line about the mask in the code above: without it OpenCLIP computes them with the legacy"
    f" CLS mask, and they are other numbers. {ADVICE}"
)
LOST_OPTION = "OpenCLIP has no such inputs, and the files do not hold {0}: give it to coca-evaluate."
GENERATE = (
    "`model.generate` of OpenCLIP 3.3 needs transformers up to 4.56. coca_lit writes captions with these files"
    f' without it: `coca_lit.load_model("{{folder}}/{WEIGHTS}")`.'
)
USAGE = """\
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{{folder}}")
{mask}tokenizer = open_clip.get_tokenizer("local-dir:{{folder}}")
model.eval()
with torch.no_grad():
    image_features = model.encode_image(preprocess(Image.open("photo.jpg"))[None], normalize=True)
    text_features = model.encode_text(tokenizer(["a dog", "a cat"]), normalize=True)
print(image_features @ text_features.T)
"""


def write_open_clip(model: CoCa, folder: Path, correct_cls_mask: bool = False, version: str = "3.3") -> Exported:
    """Writes config and weights, reads them back and compares the models.

    Args:
        correct_cls_mask: export a model with that mask although OpenCLIP 3.3 uses it only if set after loading, as the
            card explains.
        version: of OpenCLIP, as of `open_clip_config`; 4 has a key for the mask.

    Raises:
        ValueError: OpenCLIP cannot build this model, or would compute something else with it.
    """
    if correct_cls_mask and version != "3.3":
        raise ValueError("only OpenCLIP 3.3 lacks a key for the CLS mask: leave out correct_cls_mask=true")
    _, _, text = described_parts(model, version)
    config = open_clip_config(model, version)
    corrected = model.config.cls_mask == "correct" and version == "3.3"
    if corrected and not correct_cls_mask:
        raise ValueError(
            "the model was trained with cls_mask=correct, but OpenCLIP gives every model the legacy mask, which"
            " yields other text features; correct_cls_mask=true exports it for use with one more line of code, which"
            f" the card shows (image features and captions need no such line); version=4 needs none. {ADVICE}"
        )
    if correct_cls_mask and not corrected:
        raise ValueError("the model has the legacy CLS mask, as OpenCLIP: leave out correct_cls_mask=true")
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_tensors(unshared_copies(to_open_clip(model, version)), folder / WEIGHTS)
    difference = _difference(model, load_model(folder / WEIGHTS))
    if not difference <= TOLERANCE:
        raise ValueError(f"OpenCLIP cannot build this model: what it would build differs by {difference:.1e}")
    return Exported(
        library="open_clip",
        files={WEIGHTS: "weights in fp32, with OpenCLIP's names", OPEN_CLIP_CONFIG: "architecture and preprocessing"},
        needs=text.versions[version],
        usage=USAGE.format(mask=CORRECT_MASK if corrected else ""),
        check=f"Read back, features and logits differ from the checkpoint's by {difference:.1e} at most.",
        limits=[
            'OpenCLIP takes id 0 for padding everywhere, also inside a run of punctuation such as "!#$", so the text'
            " features of such texts differ from coca_lit's.",
            *([GENERATE] if model.decoder is not None and version == "3.3" else []),
            *(LOST_OPTION.format(f"{name}={value}") for name, value in model.config.options.items()),
        ],
        warning=NEEDS_LINE if corrected else None,
    )


@torch.no_grad()
def _difference(model: CoCa, again: CoCa) -> float:
    """Largest difference of features and caption logits between two models, on images of noise."""
    noise, shape = torch.Generator().manual_seed(0), (2, 3, *largest_shape(model.preprocessing))
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise)
    tokens = model.tokenizer(["a photo of a dog", "two"])
    results = (
        [out.image_features, out.text_features, *([out.logits] if model.decoder is not None else [])]
        for out in (model(images, tokens), again(images, tokens))
    )
    return torch.stack([(a - b).abs().max() for a, b in zip(*results, strict=True)]).max().item()  # NaN if one is
