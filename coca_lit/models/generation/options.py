"""What can be asked of `CoCa.generate`, and the checks that say clearly what does not go together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch

from coca_lit.models.generation.beam import Scoring
from coca_lit.models.generation.sampling import Sampling

Strategy = Literal["greedy", "beam", "sample"]
Rerank = Literal["contrastive"]
DEFAULT_MAX_LENGTH = 30  # start and end included, as in OpenCLIP
DEFAULT_BEAMS = 2  # what OpenCLIP's default of 6 beams in 3 groups amounts to
LEGACY_MIN_LENGTH = 5  # OpenCLIP's default

# Options that only one strategy has.
_STRATEGY_OF: dict[str, Strategy] = {
    "num_beams": "beam",
    "length_penalty": "beam",
    "temperature": "sample",
    "top_k": "sample",
    "top_p": "sample",
    "generator": "sample",
}


class GenerateArguments(TypedDict, total=False):
    """Types of the arguments of `CoCa.generate` that do not change what it returns, for type checkers and editors."""

    prompt: str | Sequence[str] | None
    strategy: Strategy
    num_beams: int | None
    num_captions: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_length: int | None
    max_length: int | None
    length_penalty: float | None
    repetition_penalty: float
    no_repeat_ngram: int
    generator: torch.Generator | None
    scoring: Scoring
    rerank: Rerank | None
    rerank_weight: float | None


@dataclass(frozen=True)
class Options:
    """How to write captions; `CoCa.generate` says what each option means. None stands for "not given"."""

    strategy: Strategy = "greedy"
    num_beams: int | None = None
    num_captions: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    length_penalty: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    generator: torch.Generator | None = None
    scoring: Scoring = "log_prob"
    rerank: Rerank | None = None
    rerank_weight: float | None = None

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()
        self._check_combinations()

    def _check_names(self) -> None:
        if self.strategy not in ("greedy", "beam", "sample"):
            raise ValueError(f"strategy must be 'greedy', 'beam' or 'sample', got '{self.strategy}'")
        if self.scoring not in ("log_prob", "openclip_legacy"):
            raise ValueError(f"scoring must be 'log_prob' or 'openclip_legacy', got '{self.scoring}'")
        if self.rerank not in (None, "contrastive"):
            raise ValueError(f"rerank must be 'contrastive' or None, got '{self.rerank}'")

    def _check_combinations(self) -> None:
        for name, strategy in _STRATEGY_OF.items():
            if getattr(self, name) is not None and self.strategy != strategy:
                raise ValueError(f"{name} is an option of strategy='{strategy}', but the strategy is '{self.strategy}'")
        if self.scoring != "log_prob" and self.strategy != "beam":
            raise ValueError(f"scoring='{self.scoring}' is about beams, but the strategy is '{self.strategy}'")
        if self.strategy == "greedy" and (self.rerank or (self.num_captions or 1) > 1):
            raise ValueError(
                "strategy='greedy' writes one caption; for several captions and for rerank use 'beam' or 'sample'"
            )
        if self.strategy == "beam" and self.captions > self.beams:
            raise ValueError(f"{self.beams} beams cannot give {self.captions} captions; raise num_beams")
        if self.strategy == "sample" and self.rerank and self.captions == 1:
            raise ValueError("rerank needs several captions to order: give num_captions, or use strategy='beam'")
        if self.rerank_weight is not None and self.rerank is None:
            raise ValueError("rerank_weight needs rerank='contrastive'")

    def _check_numbers(self) -> None:
        for name, number, fits, expected in (
            ("num_beams", self.num_beams, lambda n: n >= 1, "at least 1"),
            ("num_captions", self.num_captions, lambda n: n >= 1, "at least 1"),
            ("temperature", self.temperature, lambda n: n > 0, "greater than 0"),
            ("top_k", self.top_k, lambda n: n >= 1, "at least 1"),
            ("top_p", self.top_p, lambda n: 0 < n <= 1, "greater than 0 and at most 1"),
            ("min_length", self.min_length, lambda n: n >= 0, "at least 0"),
            ("repetition_penalty", self.repetition_penalty, lambda n: n > 0, "greater than 0"),
            ("no_repeat_ngram", self.no_repeat_ngram, lambda n: n >= 0, "at least 0"),
            ("rerank_weight", self.rerank_weight, lambda n: 0 <= n <= 1, "between 0 and 1"),
        ):
            if number is not None and not fits(number):
                raise ValueError(f"{name} must be {expected}, got {number}")

    @property
    def beams(self) -> int:
        return DEFAULT_BEAMS if self.num_beams is None else self.num_beams

    @property
    def captions(self) -> int:
        return 1 if self.num_captions is None else self.num_captions

    @property
    def sampling(self) -> Sampling:
        return Sampling(1.0 if self.temperature is None else self.temperature, self.top_k, self.top_p, self.generator)

    def lengths(self, context_length: int) -> tuple[int, int]:
        """Least and largest length of a caption, in a model with the given context."""
        least = self.min_length
        if least is None:
            least = LEGACY_MIN_LENGTH if self.scoring == "openclip_legacy" else 0
        most = min(DEFAULT_MAX_LENGTH, context_length) if self.max_length is None else self.max_length
        if not 2 <= most <= context_length:
            raise ValueError(f"max_length must lie between 2 and the context length of {context_length}, got {most}")
        if least >= most:
            raise ValueError(
                f"min_length ({least}) must be smaller than max_length ({most}): the end needs room after it"
            )
        return least, most
