"""The options of `CoCa.generate`, in one place: each is one line of `GenerateOptions`.

Type checkers read its annotations. The defaults, the checks and the documentation of `CoCa.generate`, the keys of
`coca-caption` and their help are made from the same lines when the program runs. Nothing here imports torch, so that
`coca-caption --help` answers at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_args, get_origin

from coca_lit.errors import check_choice, check_number, suggest

if TYPE_CHECKING:
    import torch

Strategy = Literal["greedy", "beam", "sample"]
Scoring = Literal["log_prob", "openclip", "openclip_legacy"]
Rerank = Literal["contrastive"]
Preset = Literal["mobileclip2"]

DEFAULT_MAX_LENGTH = 30  # start and end included, as in OpenCLIP
OPEN_CLIP_MIN_LENGTH = 5  # OpenCLIP's default


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its type.

    Args:
        help: one sentence.
        default: None for none.
        strategy: the only one that has the option.
        at_least, above, at_most: bounds of a number.
        key: whether commands have it as a key.
    """

    help: str
    default: Any = None
    strategy: Strategy | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    key: bool = True


class GenerateOptions(TypedDict, total=False):
    """Options of `CoCa.generate`. None stands for the default."""

    strategy: Annotated[
        Strategy,
        Option("greedy: the most likely token each time; beam: beam search; sample: random tokens", "greedy"),
    ]
    preset: Annotated[
        Preset | None,
        Option("mobileclip2: as Apple writes captions with its CoCas: strategy=sample top_p=0.9 min_length=5 cut_at=."),
    ]
    prompt: Annotated[str | Sequence[str] | None, Option("how every caption begins; in Python also one for each")]
    num_beams: Annotated[int | None, Option("captions that beam search keeps for each image", 2, "beam", at_least=1)]
    num_captions: Annotated[
        int | None,
        Option(
            "captions per image, best beams first, samples in order unless reranked; the ids are then (B, N, L)",
            at_least=1,
        ),
    ]
    temperature: Annotated[float | None, Option("divides the logits, before top_k and top_p", 1.0, "sample", above=0)]
    top_k: Annotated[int | None, Option("only among the k most likely tokens", None, "sample", at_least=1)]
    top_p: Annotated[
        float | None,
        Option("only among the most likely tokens up to this total probability", None, "sample", above=0, at_most=1),
    ]
    min_length: Annotated[
        int | None,
        Option(
            "minimum number of tokens, start included (OpenCLIP's min_seq_len); default 0, or 5 with its scoring",
            at_least=0,
        ),
    ]
    max_length: Annotated[
        int | None,
        Option("maximum number of tokens, start and end included; default 30, or the context length if shorter"),
    ]
    length_penalty: Annotated[
        float | None,
        Option("beams compare sum / length ** length_penalty; larger favours longer captions", 1.0, "beam"),
    ]
    repetition_penalty: Annotated[
        float | None, Option("above 1 makes tokens that the caption already contains less likely", 1.0, above=0)
    ]
    no_repeat_ngram: Annotated[
        int | None, Option("no n-gram of this many tokens occurs twice; 0 allows all", 0, at_least=0)
    ]
    cut_at: Annotated[str | None, Option("captions end before the first token that contains this, such as a full stop")]
    generator: Annotated[
        "torch.Generator | None", Option("source of random numbers, on the model's device", None, "sample", key=False)
    ]
    scoring: Annotated[
        Scoring | None,
        Option(
            "log_prob; openclip: as OpenCLIP 4, where a caption of max_length has no end; openclip_legacy: as OpenCLIP"
            " 3's beam search, which adds logits",
            "log_prob",
        ),
    ]
    rerank: Annotated[
        Rerank | None,
        Option(
            "contrastive: orders beams or samples by w · exp(logit_scale) · cosine(image, caption)"
            " + (1 - w) · mean log-probability"
        ),
    ]
    # The default is near the best weight on scenes and on photos, see experiments/contrastive_reranking.
    rerank_weight: Annotated[float | None, Option("the weight w of rerank", 0.2, at_least=0, at_most=1)]


PRESETS: dict[str, dict[str, Any]] = {
    # The README of its models; with OpenCLIP's default of min_seq_len.
    "mobileclip2": {"strategy": "sample", "top_p": 0.9, "min_length": OPEN_CLIP_MIN_LENGTH, "cut_at": "."},
}
OPTIONS: dict[str, Option] = {name: get_args(hint)[1] for name, hint in GenerateOptions.__annotations__.items()}


def value_type(name: str) -> type:
    """The type of an option's value in a config: int, float or str."""
    return next((kind for kind in (int, float) if kind in _alternatives(name)), str)


def _alternatives(name: str) -> tuple[Any, ...]:
    """The types that the value of an option may have."""
    hint = get_args(GenerateOptions.__annotations__[name])[0]
    return (hint, *get_args(hint))


def describe(name: str, default: Any = None) -> str:
    """The help of an option, with its strategy and default.

    Args:
        default: in place of that of `CoCa.generate`.
    """
    option = OPTIONS[name]
    only = f"{option.strategy}: " if option.strategy else ""
    default = default or option.default
    return f"{only}{option.help}" if default is None else f"{only}{option.help} (default {default})"


class Options(SimpleNamespace):
    """Complete options: what was given, checked, and the defaults. `options.num_beams` reads one."""

    @property
    def captions(self) -> int:
        """Number of captions for each image."""
        return self.num_captions or 1

    def lengths(self, context_length: int) -> tuple[int, int]:
        """Least and largest length of a caption in a model with the given context.

        Raises:
            ValueError: they do not fit the context or each other.
        """
        least = self.min_length
        most = self.max_length
        if least is None:
            least = OPEN_CLIP_MIN_LENGTH if self.scoring != "log_prob" else 0
        if most is None:
            most = min(DEFAULT_MAX_LENGTH, context_length)
        if not 2 <= most <= context_length:
            raise ValueError(f"max_length must lie between 2 and the context length of {context_length}, got {most}")
        if least >= most:
            raise ValueError(
                f"min_length ({least}) must be smaller than max_length ({most}): the end needs room after it"
            )
        return least, most


def complete(options: Mapping[str, Any]) -> Options:
    """The options, with defaults for what is missing or None.

    Raises:
        TypeError: an unknown option; the message suggests the right one.
        ValueError: a wrong value, or options that do not go together.
    """
    for name in options:
        if name not in OPTIONS:
            raise TypeError(
                f"generate has no option '{name}'{suggest(name, list(OPTIONS))} Its options: {', '.join(OPTIONS)}"
            )
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        option = OPTIONS[name]
        choices = [c for kind in _alternatives(name) if get_origin(kind) is Literal for c in get_args(kind)]
        if choices:
            check_choice(name, value, choices)
        kind = value_type(name)
        if name == "cut_at" and not isinstance(value, str):
            raise ValueError(f"cut_at must be a text, got {value!r}: quote a number twice, '\"1\"'")
        if kind is not str:
            bounds = {"at_least": option.at_least, "above": option.above, "at_most": option.at_most}
            check_number(name, value, whole=kind is int, **bounds)
    given = PRESETS.get(given.get("preset", ""), {}) | given
    found = Options(**{name: given.get(name, option.default) for name, option in OPTIONS.items()})
    _check_combination(found, given)
    return found


def check_shared(options: Mapping[str, Any]) -> None:
    """Checks options that all evaluations share, which want one caption for each image.

    Raises:
        ValueError: an unknown option, the message suggests the right one; or what `complete` refuses.
    """
    known = [name for name, option in OPTIONS.items() if option.key and name != "num_captions"]
    for name in options:
        if name not in known:
            hint = f"{suggest(name, known)} Its options: {', '.join(known)}"
            raise ValueError(f"generate has no option '{name}' for an evaluation{hint}")
    try:
        prompt = options.get("prompt", "")
        if not isinstance(prompt, str | None):
            raise ValueError(f"prompt must be one text for all images, got {prompt!r}")
        complete(options)
    except ValueError as error:
        raise ValueError(f"generate: {error}") from error


def _check_combination(options: Options, given: Mapping[str, Any]) -> None:
    strategy = options.strategy
    for name in given:
        only = OPTIONS[name].strategy
        if only is not None and only != strategy:
            raise ValueError(f"{name} is an option of strategy='{only}', but the strategy is '{strategy}'")
    if options.scoring != "log_prob" and strategy != "beam":
        raise ValueError(
            f"scoring='{options.scoring}' is an option of strategy='beam', but the strategy is '{strategy}'"
        )
    if strategy == "greedy" and (options.rerank or options.captions > 1):
        raise ValueError(
            "strategy='greedy' writes one caption; for several captions and for rerank use 'beam' or 'sample'"
        )
    if strategy == "beam" and options.captions > options.num_beams:
        raise ValueError(f"{options.num_beams} beams cannot give {options.captions} captions; raise num_beams")
    if strategy == "sample" and options.rerank and options.captions == 1:
        raise ValueError("rerank needs several captions to order: set num_captions, or use strategy='beam'")
    if "rerank_weight" in given and options.rerank is None:
        raise ValueError("rerank_weight needs rerank='contrastive'")
