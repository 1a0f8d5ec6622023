"""How the parts of a captioner are written in OpenCLIP's files: names of tensors and keys of the config.

There is a `Part` for each kind of image encoder, of pooler, and of text tower with its decoder. CoCa's own stand in
`image`, `poolers` and `text`. A project declares its own in the table `open_clip` of its `project.toml`, by the name of
a tensor that shows it in a file.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor, nn

from coca_lit import extensions
from coca_lit.models.coca import CoCa
from coca_lit.weights.open_clip.config_keys import Allowed, OpenClipConfig

# The last one that a file has counts: a file with two poolers has the first one's tensors too.
OWN = {
    "visual.conv1.weight": "coca_lit.weights.open_clip.image:ClipTransformer",
    "visual.attn_pool.query": "coca_lit.weights.open_clip.poolers:SinglePooler",
    "visual.attn_pool_contrastive.query": "coca_lit.weights.open_clip.poolers:TwoPoolers",
    "text.cls_emb": "coca_lit.weights.open_clip.text:ClassicText",
}
OTHER_TEXT_TOWERS = ("text.transformer.embeddings.", "text.transformer.encoder.", "text.transformer.shared.")
_TOKENIZERS = {49408: "clip", 50260: "r50k"}  # by the size of the vocabulary
Tensors = Mapping[str, Tensor]


class Renaming(NamedTuple):
    """Tensors whose names begin with `ours` in a `CoCa`, and with `theirs` in OpenCLIP's file.

    Attributes:
        inside: names in the rest, ours -> OpenCLIP's.
    """

    ours: str
    theirs: str
    inside: Mapping[str, str] = {}


class Part(ABC):
    """A kind of part. It has no state.

    Attributes:
        kinds: the classes that it describes. A class that is derived from one of them has tensors of the same names.
        since: the first version of OpenCLIP that has it, "3.3" or "4".
        names: of its tensors; the first renaming that fits a name counts.
        transposed: OpenCLIP's names of the tensors that it stores transposed.
        flat: OpenCLIP's names of the tensors that it stores without dimensions of one.
        allowed: section of the config -> key -> the values that coca_lit computes, None for any.
        required: keys that `vision_cfg` must have -> what the weights have that they say more about.
        models: OpenCLIP's names of models that are told by this part, for messages.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]]
    since: ClassVar[str] = "3.3"
    names: ClassVar[Sequence[Renaming]]
    transposed: ClassVar[Collection[str]] = ()
    flat: ClassVar[Collection[str]] = ()
    allowed: ClassVar[Mapping[str, Allowed]]
    required: ClassVar[Mapping[str, str]] = {}
    models: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def arguments(self, theirs: Tensors) -> dict[str, Any]:
        """The arguments of `CoCa` that the tensors of a file show.

        Raises:
            ValueError: a tensor is missing.
        """

    def without_config(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that neither tensors nor a config show: what OpenCLIP's own models with this part have."""
        return {}

    def shown(self, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Section of the config -> key -> its value by the tensors, which is the only one that it may have."""
        return {}

    def configured(self, config: OpenClipConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that only the config shows.

        Args:
            arguments: those that are known already.

        Raises:
            ValueError: it does not belong to the tensors, or asks for something that coca_lit does not compute.
        """
        return {}

    def obstacle(self, model: CoCa, version: str) -> str | None:
        """Why this version of OpenCLIP cannot build the part of the model, if it cannot."""
        return None

    def unreadable(self, theirs: Collection[str]) -> str | None:
        """The model in a file that combines this part with parts that coca_lit lacks, and why it is not read."""
        return None


class ImagePart(Part):
    """An image encoder."""

    @abstractmethod
    def keys(self, encoder: Any) -> dict[str, Any]:
        """Its keys in `vision_cfg`."""


class PoolerPart(Part):
    @abstractmethod
    def keys(self, pooling: Any) -> dict[str, Any]:
        """Its keys in `vision_cfg`."""


class TextPart(Part):
    """A text tower and its decoder.

    Attributes:
        versions: of OpenCLIP that have it -> what they are called.
    """

    versions: ClassVar[Mapping[str, str]] = {"4": "OpenCLIP 4 (its main branch)"}

    @abstractmethod
    def sections(self, model: CoCa, version: str) -> dict[str, dict[str, Any]]:
        """The sections `text_cfg` and `multimodal_cfg`."""

    def translated(self, model: Mapping[str, Any]) -> Mapping[str, Any]:
        """The section `model_cfg` of a file, with the sections and keys of OpenCLIP 4."""
        return model

    def read(self, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file under their names in OpenCLIP 4."""
        return theirs

    def written(self, theirs: dict[str, Tensor], version: str) -> dict[str, Tensor]:
        """The tensors under their names in a version of OpenCLIP, from the names of version 4."""
        return theirs


class Parts(NamedTuple):
    """The parts of a model or a file; None for one that nobody describes."""

    image: ImagePart | None = None
    pooler: PoolerPart | None = None
    text: TextPart | None = None

    @classmethod
    def of(cls, parts: Iterable[Part | None]) -> Self:
        """Of several of a kind the last one counts."""
        found: dict[str, Any] = {}
        for part in parts:
            for name, kind in (("image", ImagePart), ("pooler", PoolerPart), ("text", TextPart)):
                if isinstance(part, kind):
                    found[name] = part
        return cls(**found)


def parts_in(theirs: Collection[str]) -> Parts:
    """The parts that the names of tensors in a file show."""
    return Parts.of(extensions.load(target)() for tensor, target in _known().items() if tensor in theirs)


def _known() -> dict[str, str]:
    """Where the parts are, by a tensor that shows each."""
    return OWN | extensions.declared("open_clip")


def is_captioner(theirs: Collection[str]) -> bool:
    """Whether the names of tensors are a captioner's, with or without a decoder, and not a CLIP's."""
    parts = parts_in(theirs)
    return (
        any(name.startswith(("text_decoder.", "text.cls_emb")) for name in theirs)
        or (parts.pooler is not None and parts.text is not None)
        or any(part is not None and part.unreadable(theirs) is not None for part in parts)
    )


def expect_captioner(theirs: Tensors, parts: Parts) -> tuple[ImagePart, PoolerPart, TextPart]:
    """The parts in a file; raises `ValueError` if it is no captioner of OpenCLIP, or one that cannot be read."""
    reason = _unreadable(theirs, parts)
    if reason is not None:
        readable = [name for target in _known().values() for name in extensions.load(target).models]
        raise ValueError(
            f"this is {reason}; of OpenCLIP's captioners these can be read, in any size: {', '.join(readable)}"
        )
    image, pooler, text = parts
    if image is not None and pooler is not None and text is not None:
        return image, pooler, text
    needed = ((pooler, "visual.attn_pool.query"), (text, "text.cls_emb"), (image, "visual.conv1.weight"))
    missing = [tensor for part, tensor in needed if part is None]
    raise ValueError(f"this is not an OpenCLIP CoCa checkpoint: it has no tensor '{missing[0]}'")


def _unreadable(theirs: Collection[str], parts: Parts) -> str | None:
    """What a captioner of OpenCLIP that cannot be read is called, and why; None for all other files."""

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in theirs)

    for part in parts:
        reason = None if part is None else part.unreadable(theirs)
        if reason is not None:
            return reason
    if not has("text_decoder."):
        return None
    if has(*OTHER_TEXT_TOWERS):
        return "a coca_roberta-ViT-B-32, whose text tower is a Hugging Face model and sees the tokens it should predict"
    if parts.image is None and has("visual.trunk.", "visual.layer1."):
        return "a CoCa whose image tower is not a CLIP vision transformer (timm_model_name, or a ResNet)"
    if parts.pooler is None and not has("visual.attn_pool.", "attn_pool."):
        return "a coca_base, which has no attentional pooler"
    return None


def tokenizer_of(vocab_size: int) -> str:
    """The tokenizer of a vocabulary; raises `ValueError` if its size is unknown."""
    if vocab_size not in _TOKENIZERS:
        raise ValueError(f"the checkpoint has a vocabulary of {vocab_size} tokens: expected one of {[*_TOKENIZERS]}")
    return _TOKENIZERS[vocab_size]


def parts_of(model: CoCa) -> Parts:
    """The descriptions of the parts of a model, by their classes or the nearest base classes."""
    return Parts.of(_part_of(type(part)) for part in (model.image_encoder, model.pooling, model.text))


def _part_of(module: type[nn.Module]) -> Part | None:
    """The part of a class. That of a project stands in the same package as its class."""
    packages = {parent.__module__.rpartition(".")[0] for parent in module.__mro__}
    targets = [*OWN.values()]
    for target in extensions.declared("open_clip").values():
        if target.partition(":")[0].rpartition(".")[0] in packages:
            targets.append(target)
    parts: list[Part] = [extensions.load(target)() for target in targets]
    described = {kind: part for part in parts for kind in part.kinds}
    return next((described[parent] for parent in module.__mro__ if parent in described), None)


def depth(theirs: Collection[str], prefix: str) -> int:
    """Number of blocks whose names start with `prefix`."""
    return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in theirs if name.startswith(f"{prefix}.")})
