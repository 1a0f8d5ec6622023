"""What exports compute in Transformers alone: `with_transformers.py OUTPUT FOLDER…` in the folder of the inputs
`texts.json`, `photo.png` and `scene.png`.
"""

import json
import sys

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer


@torch.no_grad()
def results(folder: str) -> dict[str, object]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    with open("texts.json") as file:
        texts = tokenizer(json.load(file), padding=True, truncation=True, return_tensors="pt")
    images = processor([Image.open("photo.png"), Image.open("scene.png")], return_tensors="pt")
    out = model(**images, **texts)
    found = {
        "tokens": [ids[mask.bool()].tolist() for ids, mask in zip(*texts.values(), strict=True)],
        "image_features": out.image_embeds.tolist(),
        "text_features": out.text_embeds.tolist(),
        "logits": out.logits_per_image.tolist(),
        "without_mask": model.get_text_features(texts["input_ids"]).tolist(),
    }
    if model.config.multimodal_layers:
        found["ids"] = model.generate(**images).tolist()
        found["captions"] = tokenizer.batch_decode(found["ids"], skip_special_tokens=True)
        found["without_cache"] = model.generate(**images, use_cache=False).tolist()
        found["beams"] = model.generate(**images, num_beams=3).tolist()
        found["beams_without_cache"] = model.generate(**images, num_beams=3, use_cache=False).tolist()
        prompt = texts["input_ids"][:1, :3].expand(2, -1)
        found["prompted"] = model.generate(**images, decoder_input_ids=prompt).tolist()
    return found


if __name__ == "__main__":
    output, *folders = sys.argv[1:]
    with open(output, "w") as file:
        json.dump({folder: results(folder) for folder in folders}, file)
