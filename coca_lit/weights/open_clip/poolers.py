"""Attentional poolers in OpenCLIP's files: the single one of version 3.3, and the two of version 4."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from coca_lit.models.poolers import (
    AttentionalPooler,
    OpenClipCascadePooling,
    OpenClipParallelPooling,
    OpenClipPooling,
    SinglePooling,
)
from coca_lit.weights.open_clip.config_keys import OpenClipConfig, count
from coca_lit.weights.open_clip.parts import PoolerPart, Renaming, Tensors

ALLOWED_SINGLE = {"vision_cfg": {"attentional_pool": (True, False), "pool_type": ("tok",)}}
ALLOWED_TWO = {"vision_cfg": {"attentional_pool": ("parallel", "cascade"), "pool_type": None}}
REQUIRED_TWO = {"attentional_pool": "two attentional poolers"}
QUERY_POOLER = {"norm_query": "ln_q", "norm_context": "ln_k", "attention.out": "attn.out_proj"}


class SinglePooler(PoolerPart):
    kinds = (SinglePooling,)
    names = (
        Renaming("pooling.generative.norm_out.", "visual.ln_post."),
        Renaming("pooling.generative.", "visual.attn_pool.", QUERY_POOLER),
    )
    allowed = ALLOWED_SINGLE

    def arguments(self, theirs: Tensors) -> dict[str, Any]:
        return {
            "embed_dim": theirs["visual.proj"].shape[1],
            "pooler": "single",
            "pooler_queries": len(theirs["visual.attn_pool.query"]),
        }

    def configured(self, config: OpenClipConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"pooler_heads": count(config.vision, "attn_pooler_heads", 8)}

    def keys(self, pooling: SinglePooling) -> dict[str, Any]:
        return {"attentional_pool": True, **pooler_keys(pooling.generative)}


class TwoPoolers(PoolerPart):
    """OpenCLIP's config says whether they stand in parallel or in a cascade."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (OpenClipParallelPooling, OpenClipCascadePooling)
    since = "4"
    names = (
        Renaming("pooling.norm.", "visual.ln_post."),
        Renaming("pooling.generative.", "visual.attn_pool.", QUERY_POOLER),
        Renaming("pooling.contrastive.", "visual.attn_pool_contrastive.", QUERY_POOLER),
    )
    allowed = ALLOWED_TWO
    required = REQUIRED_TWO
    ours = "openclip"  # our poolers are ours_parallel and ours_cascade
    theirs = "visual."  # where they stand in OpenCLIP

    def arguments(self, theirs: Tensors) -> dict[str, Any]:
        queries, embed_dim = theirs[f"{self.theirs}attn_pool.query"].shape
        context = len(theirs[f"{self.theirs}attn_pool_contrastive.ln_k.weight"])
        # With equal widths both have the same tensors; then the config decides.
        kind = "cascade" if context == embed_dim else "parallel"
        return {"embed_dim": embed_dim, "pooler": f"{self.ours}_{kind}", "pooler_queries": queries}

    def without_config(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"cls_mask": "correct"}

    def configured(self, config: OpenClipConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "pooler": f"{self.ours}_{config.vision['attentional_pool']}",
            "pooler_heads": count(config.vision, "attn_pooler_heads", 8),
        }

    def keys(self, pooling: OpenClipPooling) -> dict[str, Any]:
        kind = "parallel" if pooling.parallel else "cascade"
        return {"attentional_pool": kind, **pooler_keys(pooling.generative)}


def pooler_keys(pooler: AttentionalPooler) -> dict[str, int]:
    return {"attn_pooler_queries": len(pooler.query), "attn_pooler_heads": pooler.attention.heads}
