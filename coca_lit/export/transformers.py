"""A folder for `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`. It holds the code of the model, a copy of
`modeling_coca.py`, and needs no coca_lit.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer
from transformers import PreTrainedTokenizerFast

from coca_lit.export import modeling_coca
from coca_lit.export.card import Exported
from coca_lit.models import CoCa, text_lengths
from coca_lit.models.generation.options import DEFAULT_MAX_LENGTH
from coca_lit.models.image import ImagePooling
from coca_lit.models.text import TextTower
from coca_lit.tokenizer import WORD, CLIPTokenizer, R50kTokenizer, Tokenizer
from coca_lit.weights.load import unshared_copies

CODE = "modeling_coca"
WEIGHTS = "model.safetensors"
FAILED = "format=transformers cannot build this model"
TOLERANCE = 1e-4  # the largest difference of unit vectors and logits
VISION = {  # name in timm's vision transformer -> name in `modeling_coca`
    "image_encoder.trunk.patch_embed.proj.": "vision.patches.",
    "image_encoder.trunk.pos_embed": "vision.position_embedding",
    "image_encoder.trunk.norm_pre.": "vision.norm.",
    "image_encoder.trunk.": "vision.",
    "pooling.": "vision.",
    "image_projection.": "vision.projection.",
}
BLOCK = {".norm1.": ".norm_1.", ".attn.": ".attention.", ".proj.": ".out.", ".norm2.": ".norm_2."}
BLOCK |= {".fc1.": ".0.", ".fc2.": ".2."}
ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
LOAD = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{folder}", trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained("{folder}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
images = processor(Image.open("photo.jpg"), return_tensors="pt")
texts = tokenizer(["a dog", "a cat"], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    print(model(**images, **texts).logits_per_image.softmax(dim=-1))
"""
CAPTION = "print(tokenizer.batch_decode(model.generate(**images), skip_special_tokens=True))\n"


def write_transformers(model: CoCa, folder: Path) -> Exported:
    """Writes code, config, weights, image processor and tokenizer, and compares what they compute with the model.

    Raises:
        ValueError: the code in the folder cannot build this model, or would compute something else with it.
    """
    config = _config(model)
    shutil.copyfile(modeling_coca.__file__, folder / f"{CODE}.py")
    save_file(unshared_copies({_name(k): v for k, v in model.state_dict().items()}), folder / WEIGHTS, {"format": "pt"})
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", _processor_config(model))
    _write_tokenizer(model.tokenizer, folder)
    if model.decoder is not None:
        _write_json(folder / "generation_config.json", _generation_config(model))
    difference = _difference(model, folder)
    if not difference <= TOLERANCE:
        raise ValueError(f"{FAILED}: what it would build differs by {difference:.1e}")
    files = {
        f"{CODE}.py": "the code of the model, in plain PyTorch",
        WEIGHTS: "weights in fp32",
        "config.json": "architecture",
        "preprocessor_config.json": "image size and normalisation",
        "tokenizer.json": "vocabulary and merges",
        "tokenizer_config.json": "special tokens",
    }
    return Exported(
        library="transformers",
        files=files | ({"generation_config.json": "defaults of `generate`"} if model.decoder is not None else {}),
        needs="`transformers` 4.56 or newer, `torch` and `pillow`",
        usage=LOAD + (CAPTION if model.decoder is not None else ""),
        check=f"Features and logits of this code differ from the checkpoint's by {difference:.1e} at most.",
        limits=[
            "The tokenizer does not repair broken Unicode and HTML entities as coca_lit does, so the features of such"
            " texts differ.",
        ],
    )


def _config(model: CoCa) -> dict[str, Any]:
    """Content of config.json.

    Raises:
        ValueError: the code lacks the image encoder or text tower of the model.
    """
    ours, trunk = model.config, model.image_encoder.trunk
    if type(trunk) is not VisionTransformer or not hasattr(trunk, "norm_pre") or trunk.pos_embed is None:
        raise ValueError(
            "format=transformers has the code of CLIP's vision transformers (vit_*_clip_*) alone, and the image"
            f" encoder is {ours['image_encoder']}: export format=safetensors or format=onnx"
        )
    if type(model.text) is not TextTower:
        raise ValueError(
            "format=transformers has the code of the built-in text tower alone, and this model has a"
            f" {type(model.text).__name__}: export format=safetensors"
        )
    if not isinstance(model.pooling, ImagePooling):
        raise ValueError(
            f"format=transformers has no code for pooler={ours['pooler']}: export format=safetensors or open_clip"
        )
    block: Any = trunk.blocks[0]
    text: Any = model.text.blocks[0]
    return {
        "model_type": modeling_coca.CoCaConfig.model_type,
        "architectures": ["CoCaModel"],
        "auto_map": {"AutoConfig": f"{CODE}.CoCaConfig", "AutoModel": f"{CODE}.CoCaModel"},
        "dtype": "float32",
        "image_size": ours["image_size"],
        "patch_size": trunk.patch_embed.patch_size[0],
        "image_width": trunk.embed_dim,
        "image_layers": len(trunk.blocks),
        "image_heads": block.attn.num_heads,
        "image_mlp_width": block.mlp.fc1.out_features,
        "image_activation": _activation(block.mlp.act),
        **{name: ours[name] for name in ("embed_dim", "pooler", "pooler_queries", "pooler_heads")},
        "vocab_size": model.tokenizer.vocab_size,
        **{name: ours[name] for name in ("context_length", "cls_mask", "text_width", "text_layers", "text_heads")},
        "text_mlp_width": text.mlp[0].out_features,
        "text_activation": _activation(text.mlp[1]),
        "multimodal_layers": ours["decoder_layers"],
        "has_logit_bias": model.logit_bias is not None,
        "text_padding_id": model.tokenizer.pad_id,
        **_special_ids(model.tokenizer),
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
    }


def _activation(module: torch.nn.Module) -> str:
    name = type(module).__name__
    if name not in ACTIVATIONS:
        raise ValueError(f"format=transformers knows the activations {', '.join(ACTIVATIONS)}, not {name}")
    return ACTIVATIONS[name]


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The padding after a caption must be a special token, which decoding skips, so it cannot be CLIP's id 0, a "!".
    The end token would do, but Transformers warns when it cannot tell the end from padding.
    """
    padding = tokenizer.sot_id if isinstance(tokenizer, CLIPTokenizer) else tokenizer.pad_id
    start = {"bos_token_id": tokenizer.sot_id, "decoder_start_token_id": tokenizer.sot_id}
    return {**start, "eos_token_id": tokenizer.eot_id, "pad_token_id": padding}


def _generation_config(model: CoCa) -> dict[str, Any]:
    """Greedy captions of the same length as ours, which end with the end token in any case."""
    length = min(DEFAULT_MAX_LENGTH, model.tokenizer.context_length)
    return {**_special_ids(model.tokenizer), "max_length": length, "forced_eos_token_id": model.tokenizer.eot_id}


def _processor_config(model: CoCa) -> dict[str, Any]:
    size, normalise = model.image_size, model.image_encoder.normalise
    return {
        "image_processor_type": "CoCaImageProcessor",
        "auto_map": {"AutoImageProcessor": f"{CODE}.CoCaImageProcessor"},
        "crop_size": {"height": size, "width": size},
        "resample": {"bicubic": 3, "bilinear": 2}[model.preprocessing["interpolation"]],
        "resize_mode": model.preprocessing["resize_mode"],
        "image_mean": normalise.mean.flatten().tolist(),
        "image_std": normalise.std.flatten().tolist(),
    }


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    if isinstance(tokenizer, CLIPTokenizer | R50kTokenizer):
        fast = _byte_pair_tokenizer(tokenizer)
    else:
        fast = _word_tokenizer(tokenizer)
    special = {"bos_token": tokenizer.sot_id, "eos_token": tokenizer.eot_id}
    special |= {"pad_token": _special_ids(tokenizer)["pad_token_id"]}
    special |= {"unk_token": tokenizer.unk_id} if tokenizer.unk_id is not None else {}
    names = {key: fast.id_to_token(id) for key, id in special.items()}
    fast.add_special_tokens(list(dict.fromkeys(names.values())))
    ends = [(names["bos_token"], tokenizer.sot_id), (names["eos_token"], tokenizer.eot_id)]
    template = f"{names['bos_token']} $A {names['eos_token']}"
    fast.post_processor = processors.TemplateProcessing(template, special_tokens=ends)
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.context_length, **names}
    # Text is never parsed for special tokens, and no blanks are removed when it is put together again.
    rest = {"split_special_tokens": True, "clean_up_tokenization_spaces": False, "padding_side": "right"}
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}
    _write_json(folder / "tokenizer_config.json", {**config, **rest, **inputs})


def _byte_pair_tokenizer(tokenizer: CLIPTokenizer | R50kTokenizer) -> HFTokenizer:
    content = json.loads(tokenizer.bpe.to_str())
    # Straight quotation marks, as ftfy writes them
    normal = [
        normalizers.NFC(),
        normalizers.Replace(Regex("[\u2018-\u201b]"), "'"),
        normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
    ]
    special = {"<start_of_text>": tokenizer.sot_id, "<end_of_text>": tokenizer.eot_id}
    if isinstance(tokenizer, CLIPTokenizer):
        normal.append(normalizers.Lowercase())
        # Ġ is the byte-level name of a blank.
        decoder = [decoders.Replace("</w>", "Ġ"), decoders.ByteLevel(), decoders.Strip(" ", 0, 1)]
    else:
        normal += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        decoder = [decoders.ByteLevel(), decoders.Strip(" ", 1, 1)]
        special |= {"<pad>": tokenizer.pad_id, "<|endoftext|>": 50256}  # the last one is in no text
    content["model"]["vocab"] |= special
    fast = HFTokenizer.from_str(json.dumps(content))
    fast.add_special_tokens(list(special))
    fast.normalizer, fast.decoder = normalizers.Sequence(normal), decoders.Sequence(decoder)
    return fast


def _word_tokenizer(tokenizer: Tokenizer) -> HFTokenizer:
    special = {"<pad>": tokenizer.pad_id, "<start>": tokenizer.sot_id, "<end>": tokenizer.eot_id}
    special["<unk>"] = tokenizer.unk_id if tokenizer.unk_id is not None else 3
    words = {word: i for i, word in enumerate(tokenizer.spec, start=len(special))}
    fast = HFTokenizer(models.WordLevel(special | words, unk_token="<unk>"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    return fast


def _name(ours: str) -> str:
    """A tensor's name in `modeling_coca`."""
    for start, there in VISION.items():
        if ours.startswith(start):
            inside = ours.removeprefix(start)
            for old, new in BLOCK.items() if ours.startswith("image_encoder.trunk.blocks.") else ():
                inside = inside.replace(old, new)
            return there + inside
    return ours


@torch.no_grad()
def _difference(model: CoCa, folder: Path) -> float:
    """Largest difference of features and next-token logits between the model and the code with the files written.

    Raises:
        ValueError: the weights do not fit the code, or the tokenizer gives other ids.
    """
    built = modeling_coca.CoCaModel(modeling_coca.CoCaConfig(**json.loads((folder / "config.json").read_text())))
    try:
        built.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{FAILED}: {first}") from error
    built.eval()
    texts = ["A photo of a dog's  toy", "two"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for text, ids in zip(texts, tokenizer(texts, truncation=True)["input_ids"], strict=True):
        if ids != model.tokenizer.encode(text):
            raise ValueError(f"{FAILED}: {text!r} would be the tokens {ids} instead of {model.tokenizer.encode(text)}")
    size, noise = model.image_size, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=noise)
    tokens = model.tokenizer(texts)
    lengths = text_lengths(tokens, model.tokenizer.pad_id)
    beginnings = tokens if model.decoder is not None else None
    found = built(model.image_encoder.normalise(images), tokens, decoder_input_ids=beginnings)
    expected = model(images, tokens)
    pairs = [(expected.image_features, found.image_embeds), (expected.text_features, found.text_embeds)]
    if found.logits is not None:
        rows = [logits[: length - 1] for logits, length in zip(found.logits, lengths.tolist(), strict=True)]
        pairs.append((expected.logits, torch.cat(rows)))
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
