r"""CLIP_benchmark's command line with a model type for everything that this package loads:

    python -m coca_lit.projects.clip_benchmark eval \
        --model_type coca_lit --model mine --pretrained last.ckpt --dataset cifar10

`--pretrained` is what `coca-evaluate` calls `checkpoint=`, `--model` a name for the results. As in OpenCLIP, a name
that ends in -quickgelu says that a CLIP was trained with QuickGELU. All other options are CLIP_benchmark's. Mixed
precision is off (`--no_amp`), so that scores equal those of `coca-evaluate`.
"""

import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from coca_lit.data.sources import Transform
from coca_lit.data.transforms import build_transform
from coca_lit.errors import UserError, error_context
from coca_lit.models import DualEncoder
from coca_lit.tokenizer import CLIPTokenizer, Tokenizer, get_tokenizer
from coca_lit.weights.load import load_dual_encoder

MODEL_TYPE = "coca_lit"


def load_model(
    model_name: str, pretrained: str, cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[DualEncoder, Transform, Tokenizer]:
    """A loader for `clip_benchmark.models.TYPE2FUNC`: model, image transform and tokenizer.

    Args:
        cache_dir: not used; the Hub's own settings apply.
    """
    quick_gelu = True if model_name.endswith("-quickgelu") else None  # None: what the file says
    with error_context("--pretrained"):
        model: Any = load_dual_encoder(pretrained, quick_gelu).to(device)
        if model.image_encoder.token_kind is not None:
            raise ValueError("CLIP_benchmark stacks images of one shape: use coca-evaluate evals=clip_benchmark")
    if model.decoder is not None and not isinstance(model.tokenizer, CLIPTokenizer):
        # CLIP_benchmark decodes all captions with CLIP's vocabulary, so they are given in its ids.
        own, clip = model.generate, get_tokenizer("clip", 77)
        model.generate = lambda images: clip([model.tokenizer.decode(ids) for ids in own(images)])
    return model, build_transform(**model.preprocessing), model.tokenizer


def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """As CLIP_benchmark's, which makes a number of an array of one element: NumPy from 2.4 on refuses."""
    correct = output.topk(max(topk)).indices == target[:, None]
    return [correct[:, :k].any(dim=1).cpu().double().mean().item() for k in topk]


def clip_benchmark() -> None:
    """CLIP_benchmark's command, which also knows the model type `coca_lit`."""
    if find_spec("clip_benchmark") is None:
        sys.exit("error: CLIP_benchmark is not installed: pip install 'coca_lit[clip_benchmark]'")
    import clip_benchmark.models
    from clip_benchmark import cli
    from clip_benchmark.metrics import zeroshot_classification

    clip_benchmark.models.TYPE2FUNC[MODEL_TYPE] = load_model
    clip_benchmark.models.MODEL_TYPES.append(MODEL_TYPE)
    zeroshot_classification.accuracy = accuracy
    if sys.argv[1:2] == ["eval"] and "--no_amp" not in sys.argv:
        sys.argv.insert(2, "--no_amp")
    try:
        cli.main()
    except UserError as error:
        sys.exit(f"error: {error}")
