"""The training step, ours and OpenCLIP's: the same weights, images and captions, the same loss and gradients.

    OMP_NUM_THREADS=1 python experiments/benchmarks/train_step.py

Forward and backward of contrastive + 2 · caption loss. In fp32 both sides must agree: loss within 2e-6 of its value,
gradients within 1e-5 of their norm over all parameters; the run stops otherwise.

OpenCLIP's main line, which is not released, has options for a faster step. Those that apply to CoCa are added to its
release here: the caption loss on tokens that are not padding, in recomputed chunks (`--fused-caption-loss`), and
`torch.compile` of the model. Its batches of texts of like length are for CLIP alone.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coca_lit.losses import caption_loss, contrastive_loss
from coca_lit.models import CoCa, create_model
from coca_lit.weights.open_clip import to_open_clip
from experiments.benchmarks.harness import Ratio, caption_batch, interleaved, open_clip_model, ratio, same_weights
from experiments.benchmarks.record import record

CSV = Path(__file__).with_suffix(".csv")
# A narrow L/14: its 24 vision layers and 257 image tokens, at a width that two cores can train.
NARROW_L14: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {
        "image_size": 224, "layers": 24, "width": 256, "head_width": 64, "patch_size": 14,
        "attentional_pool": True, "attn_pooler_heads": 8, "output_tokens": True,
    },
    "text_cfg": {"context_length": 76, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 12, "embed_cls": True,
                 "output_tokens": True},
    "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 12},
    "custom_text": True,
}  # fmt: skip
FUSED_CHUNK = 4096  # tokens, OpenCLIP's
Step = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the training step, ours and OpenCLIP's.")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.cases:
        record(CSV, [{"case": name, **row} for row in CASES[name](args.repetitions)])


def against_open_clip(batch: int, target: float, *, bf16: bool = False, full: int = 0) -> Callable[[int], list[dict]]:
    """Our step on coca_ViT-B-32 against OpenCLIP's."""

    def case(repetitions: int) -> list[dict]:
        theirs = open_clip_model("coca_ViT-B-32").train()
        ours = same_weights(theirs).train()
        images, texts = caption_batch(batch, full=full)
        steps = {"theirs": their_step(theirs, images, texts, bf16), "ours": our_step(ours, images, texts, bf16)}
        agreement = {} if bf16 else agree(theirs, ours, steps)
        return [result(interleaved(steps, repetitions), "theirs", "ours", target) | agreement]

    return case


def against_options(*, bf16: bool) -> Callable[[int], list[dict]]:
    """Our step on coca_ViT-B-32 against OpenCLIP's with each further option; `compiled` needs a compiler of C++."""

    def case(repetitions: int) -> list[dict]:
        images, texts = caption_batch(16)
        theirs = open_clip_model("coca_ViT-B-32").train()
        ours = same_weights(theirs).train()
        steps = {"ours": our_step(ours, images, texts, bf16), "theirs": their_step(theirs, images, texts, bf16)}
        agreement = {} if bf16 else agree(theirs, ours, steps)
        fused = open_clip_model("coca_ViT-B-32").train()
        steps["fused loss"] = fused_step(fused, fused, images, texts, bf16)
        compiled = open_clip_model("coca_ViT-B-32").train()
        steps["fused loss, compiled"] = fused_step(compiled, torch.compile(compiled), images, texts, bf16)
        losses = {name: step().item() for name, step in steps.items()}
        if max(losses.values()) - min(losses.values()) > (1e-2 if bf16 else 1e-4):
            raise SystemExit(f"not the same loss: {losses}")
        del steps["theirs"]  # which another case times
        seconds = interleaved(steps, repetitions)
        return [
            {"what": f"OpenCLIP, {name}"}
            | result(seconds | {"theirs": seconds[name]}, "theirs", "ours", None)
            | agreement
            for name in ("fused loss", "fused loss, compiled")
        ]

    return case


def coca_over_clip(repetitions: int) -> list[dict]:
    """Our CoCa step over OpenCLIP's CLIP step and over our own, B/32."""
    images, texts = caption_batch(16)
    clip = open_clip.create_model("ViT-B-32", load_weights=False).train()
    padded = nn.functional.pad(texts, (0, 77 - texts.shape[1]))
    steps = {
        "ours": our_step(create_model("coca_vit_b32").train(), images, texts, False),
        "their CLIP": their_step(clip, images, padded, False),
        "our CLIP": our_step(create_model("clip_vit_b32").train(), images, texts, False),
    }
    seconds = interleaved(steps, repetitions)
    return [
        {"what": "our CoCa / OpenCLIP's CLIP"} | result(seconds, "ours", "their CLIP", 1.15, at_most=True),
        {"what": "our CoCa / our CLIP"} | result(seconds, "ours", "our CLIP", None),
    ]


def narrow_l14(repetitions: int) -> list[dict]:
    theirs = open_clip.CoCa(**{k: v for k, v in NARROW_L14.items() if k != "custom_text"}).train()
    nn.init.normal_(theirs.text_decoder.text_projection, std=192**-0.5)
    ours = same_weights(theirs).train()
    clip = CoCa(ours.config, decoder_layers=0, pooler_queries=1).train()
    images, texts = caption_batch(8)
    steps = {
        "theirs": their_step(theirs, images, texts, False),
        "ours": our_step(ours, images, texts, False),
        "our CLIP": our_step(clip, images, texts, False),
    }
    agreement = agree(theirs, ours, steps)
    seconds = interleaved(steps, repetitions)
    return [
        {"what": "OpenCLIP's / ours"} | result(seconds, "theirs", "ours", 1.6) | agreement,
        {"what": "our CoCa / our CLIP"} | result(seconds, "ours", "our CLIP", 1.15, at_most=True),
    ]


def text_encoding(repetitions: int) -> list[dict]:
    """Text features for retrieval, 64 captions."""
    theirs = open_clip_model("coca_ViT-B-32").eval()
    ours = same_weights(theirs).eval()
    _, texts = caption_batch(64)
    with torch.no_grad():
        variants = {
            "theirs": lambda: theirs.encode_text(texts),
            "ours": lambda: ours.encode_text(texts),
        }
        difference = (variants["theirs"]() - variants["ours"]()).abs().max().item()
        return [result(interleaved(variants, repetitions), "theirs", "ours", 3.5) | {"difference": difference}]


def optimizer_step(repetitions: int) -> list[dict]:
    """AdamW on 253 M parameters: OpenCLIP's default (for-loop) and ours (fused)."""
    from coca_lit.training.optim import AdamW

    model = create_model("coca_vit_b32")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    variants = {"theirs": torch.optim.AdamW(model.parameters(), lr=0.0).step, "ours": AdamW(lr=0.0)(model).step}
    return [result(interleaved(variants, repetitions), "theirs", "ours", 4.0)]


def our_step(model: CoCa, images: Tensor, texts: Tensor, bf16: bool) -> Step:
    def step() -> Tensor:
        model.zero_grad(set_to_none=False)  # gradients stay where they are, as with most optimizers
        with precision(bf16):
            out = model(images, texts)
            loss = contrastive_loss(out.image_features, out.text_features, out.logit_scale)
            if out.hidden is not None:
                loss = loss + 2 * caption_loss(out.hidden, out.vocabulary, out.labels)
        loss.backward()
        return loss.detach()

    return step


def their_step(model: nn.Module, images: Tensor, texts: Tensor, bf16: bool) -> Step:
    captions = hasattr(model, "text_decoder")
    criterion = open_clip.CoCaLoss(2.0, 1.0) if captions else open_clip.ClipLoss()

    def step() -> Tensor:
        model.zero_grad(set_to_none=False)  # gradients stay where they are, as with most optimizers
        with precision(bf16):
            out = model(images, texts)
            terms = criterion(**out, output_dict=True).values() if captions else [criterion(*out[:3])]
            loss = sum(terms)
        loss.backward()
        return loss.detach()

    return step


def fused_step(model: Any, called: Callable[..., Any], images: Tensor, texts: Tensor, bf16: bool) -> Step:
    """OpenCLIP's step without logits of padding: its decoder leaves out the last product, and the loss has it.

    Args:
        called: the model, or what `torch.compile` made of it.
    """
    vocabulary, model.text_decoder.text_projection = model.text_decoder.text_projection, None
    contrastive = open_clip.ClipLoss()

    def summed(hidden: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy((hidden @ vocabulary).float(), labels, reduction="sum")

    def step() -> Tensor:
        model.zero_grad(set_to_none=False)
        if vocabulary.grad is not None:  # no part of the model any longer
            vocabulary.grad.zero_()
        with precision(bf16):
            out = called(images, texts)
            real = out["labels"] != 0
            pairs = zip(out["logits"][real].split(FUSED_CHUNK), out["labels"][real].split(FUSED_CHUNK), strict=True)
            total = sum(checkpoint(summed, hidden, labels, use_reentrant=False) for hidden, labels in pairs)
            scores = contrastive(out["image_features"], out["text_features"], out["logit_scale"])
            loss = scores + 2 * total / real.sum()
        loss.backward()
        return loss.detach()

    return step


def precision(bf16: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


def agree(theirs: nn.Module, ours: CoCa, steps: dict[str, Step]) -> dict[str, float]:
    """Relative differences of loss and gradients; raises if the two computations differ."""
    expected = steps["theirs"]()
    loss = ((steps["ours"]() - expected).abs() / expected).item()
    with torch.no_grad():
        exchange_gradients(ours)  # they travel under the names of the weights
        ours_grads = {name: tensor.clone() for name, tensor in to_open_clip(ours).items()}
        exchange_gradients(ours)
    pairs = [(p.grad, ours_grads[name]) for name, p in theirs.named_parameters() if p.grad is not None]
    difference = sum((a - b.view_as(a)).double().square().sum() for a, b in pairs) ** 0.5
    gradient = float(difference / sum(a.double().square().sum() for a, _ in pairs) ** 0.5)
    if loss > 2e-6 or gradient > 1e-5:
        raise SystemExit(f"not the same step: losses differ by {loss:.1e}, gradients by {gradient:.1e} of their norm")
    return {"loss_difference": loss, "gradient_difference": gradient}


def exchange_gradients(model: nn.Module) -> None:
    """Each parameter becomes its gradient, and the other way round."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data, parameter.grad.data = parameter.grad.data, parameter.data


def result(
    seconds: dict[str, list[float]], numerator: str, denominator: str, target: float | None, at_most: bool = False
) -> dict[str, Any]:
    found: Ratio = ratio(seconds[numerator], seconds[denominator])
    goal = "" if target is None else f"{'at most' if at_most else 'at least'} {target}"
    return {"ratio": str(found), "target": goal, **{f"{n} s": round(min(s), 3) for n, s in seconds.items()}}


CASES: dict[str, Callable[[int], list[dict]]] = {
    "fp32, batch 16": against_open_clip(16, 2.2),
    "bf16, batch 16": against_open_clip(16, 2.5, bf16=True),
    "bf16, batch 48, one full caption": against_open_clip(48, 1.9, bf16=True, full=1),
    "fp32, batch 16, full captions": against_open_clip(16, 1.03, full=16),
    "fp32, batch 16, OpenCLIP's options": against_options(bf16=False),
    "bf16, batch 16, OpenCLIP's options": against_options(bf16=True),
    "CoCa over CLIP, fp32": coca_over_clip,
    "narrow L/14, fp32, batch 8": narrow_l14,
    "text encoding, fp32": text_encoding,
    "optimizer step": optimizer_step,
}


if __name__ == "__main__":
    main()
