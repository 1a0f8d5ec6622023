"""What a plan assumes; `conf/plan.yaml` holds the defaults."""

from collections.abc import Sequence

from coca_lit.errors import suggest
from coca_lit.plan.hardware import GPUS


class Settings:
    """
    Args:
        gpus: names from `coca_lit.plan.hardware`.
        utilisation: share of the peak that a training step reaches. Published runs of CLIP and CoCa: 0.15 to 0.4 on an
            A100, 0.2 to 0.3 on an H100.
        caption_tokens: mean length of the captions, start and end included.
        devices: GPUs of the run; None for the number that the trainer has, else 8.
        samples: of the whole training; None for what the config implies.
    """

    def __init__(
        self,
        gpus: Sequence[str],
        utilisation: float,
        caption_tokens: int,
        devices: int | None,
        samples: float | None,
    ) -> None:
        for name in gpus:
            if name not in GPUS:
                raise ValueError(f"gpus: there is no '{name}'{suggest(name, GPUS)} Known: {', '.join(GPUS)}")
        if not isinstance(utilisation, int | float) or not 0 < utilisation <= 1:
            raise ValueError(f"utilisation must be a share between 0 and 1, got {utilisation!r}")
        if not isinstance(caption_tokens, int) or caption_tokens < 2:
            raise ValueError(f"caption_tokens must be a whole number of at least 2, got {caption_tokens!r}")
        if devices is not None and (not isinstance(devices, int) or devices < 1):
            raise ValueError(f"devices must be a whole number of at least 1, got {devices!r}")
        if samples is not None and (not isinstance(samples, int | float) or samples <= 0):
            raise ValueError(f"samples must be a number above 0, got {samples!r}")
        self.gpus, self.utilisation, self.caption_tokens = list(gpus), utilisation, caption_tokens
        self.devices, self.samples = devices, samples
