"""Weights and architecture in one file of ours, without the optimizer of a training checkpoint."""

from pathlib import Path

from coca_lit.export.card import Exported
from coca_lit.models import CoCa
from coca_lit.weights.load import save_model

WEIGHTS = "model.safetensors"
USAGE = """\
import coca_lit
from PIL import Image

model = coca_lit.load_model("{folder}/model.safetensors")
images = coca_lit.build_transform(**model.preprocessing)(Image.open("photo.jpg"))[None]
similarity = model.encode_image(images) @ model.encode_text(model.tokenizer(["a dog", "a cat"])).T
print(similarity)
"""
CAPTION = "print(model.tokenizer.decode(model.generate(images)[0]))\n"


def write_safetensors(model: CoCa, folder: Path) -> Exported:
    save_model(model, folder / WEIGHTS)
    return Exported(
        library="coca_lit",
        files={WEIGHTS: "weights in fp32; the architecture and a digest of both in the file's metadata"},
        needs="coca_lit",
        usage=USAGE + (CAPTION if model.decoder is not None else ""),
        check="The file holds the weights of the checkpoint as they are.",
        limits=[],
    )
