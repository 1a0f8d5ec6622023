"""Operations, waits and bytes of a training step and of a generated token on a GPU, beside OpenCLIP's; counted, not
timed, on the simulated GPU of the tests.

    python experiments/benchmarks/gpu_operations.py

coca_ViT-B-32 in bf16, eight captions of 12 words on average, forward, backward, clipping, optimizer. An operation is
what PyTorch hands to the device, views excepted; a wait makes the host stand still until the device has done all its
work. Needs g++ and a CPU build of PyTorch.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/projects/gpu_check/simulated"))
from simulated_gpu import counted, to_gpu  # isort: skip  # before PyTorch

import open_clip
import torch
from torch import Tensor, nn

from coca_lit.losses import loss_terms
from coca_lit.models import create_model
from coca_lit.models.packing import to_device
from coca_lit.training.optim import AdamW
from experiments.benchmarks.record import record

LENGTHS = [12, 9, 17, 14, 11, 20, 13, 16]  # tokens, start and end included
GPU = torch.device("cuda", 0)


def main() -> None:
    ours, theirs = create_model("coca_ViT-B-32", cls_mask="legacy"), open_clip.create_model("coca_ViT-B-32")
    rows = [training_row("coca_lit", ours, our_step), training_row("open_clip", theirs, their_step)]
    rows += [
        generation_row("coca_lit", lambda length: our_captions(ours, length)),
        generation_row("open_clip", lambda length: their_captions(theirs, length)),
    ]
    record(Path(__file__).with_suffix(".csv"), rows)


def texts() -> tuple[Tensor, Tensor]:
    """Ids padded to the context, and lengths."""
    generator, lengths = torch.Generator().manual_seed(0), torch.tensor(LENGTHS)
    tokens = torch.randint(1, 49000, (len(LENGTHS), 76), generator=generator)
    tokens[torch.arange(76) >= lengths[:, None]] = 0
    return tokens, lengths


Step = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def our_step(net: Any, images: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    terms = loss_terms(net(images, tokens[:, : max(LENGTHS)], lengths))
    return terms["contrastive"] + 2 * terms["caption"]


def their_step(net: Any, images: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The same losses of OpenCLIP's CoCa. Its images are normalised before they come, its texts padded (B, 76)."""
    loss = open_clip.CoCaLoss(caption_loss_weight=2, clip_loss_weight=1, pad_id=0)
    return torch.stack(list(loss(**net(images, tokens), output_dict=True).values())).sum()


def training_row(way: str, net: nn.Module, step: Step) -> dict[str, Any]:
    tokens, lengths = texts()
    images = torch.randint(0, 256, (len(LENGTHS), 3, 224, 224), dtype=torch.uint8)
    if way == "open_clip":  # whose images are normalised before
        images = images.float()
    net = to_gpu(net.train())
    optimizer = AdamW(lr=1e-4)(net) if way == "coca_lit" else torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    for _ in range(2):  # the first step creates the optimizer's state
        with counted() as counts:
            with torch.autocast("cuda", torch.bfloat16):
                loss = step(net, to_device(images, GPU), to_device(tokens, GPU), lengths)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    casts = counts.launches["_to_copy"]
    found = {"operations": counts.launches.total(), "of them casts and copies": casts}
    return {"case": "training step", "way": way, **found, "waits": counts.waits.total(), "MB": counts.bytes / 1e6}


def our_captions(net: Any, length: int) -> None:
    net.generate(to_device(images(), GPU), min_length=length - 1, max_length=length)


def their_captions(net: Any, length: int) -> None:
    """Sampling among the one most likely token, which is greedy; the model reads all tokens again for each."""
    options = {"seq_len": length, "min_seq_len": length - 1, "generation_type": "top_k", "top_k": 1}
    net.generate(to_device(images().float(), GPU), **options)


def images() -> Tensor:
    return torch.zeros(1, 3, 224, 224, dtype=torch.uint8)


def generation_row(way: str, write: Callable[[int], None]) -> dict[str, Any]:
    """By the difference of captions of 20 and of 12 tokens, none of which ends early."""
    found = []
    for length in (12, 20):
        with counted() as counts, torch.no_grad():
            write(length)
        found.append((counts.launches.total(), counts.waits.total(), counts.bytes / 1e6))
    operations, waits, megabytes = ((many - few) / 8 for few, many in zip(*found, strict=True))
    return {"case": "generated token", "way": way, "operations": operations, "waits": waits, "MB": megabytes}


if __name__ == "__main__":
    main()
