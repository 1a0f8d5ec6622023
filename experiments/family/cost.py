"""What a training step of each member costs: parameters, FLOPs of a pair, CPU seconds of a step of 64 pairs.

    python -m experiments.family.cost [FLICKR8K_FOLDER]

writes costs.csv; without the folder its rows of photos stay. The members take turns on one thread. A step is what
training does between two batches: losses, gradients, clipping, optimizer. Photos enter as the output of the frozen
encoder, as in the runs.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median

import torch
from omegaconf import DictConfig

from coca_lit.cli.assembly import build_data
from coca_lit.cli.command import compose
from coca_lit.cli.module import build_module, with_vocabulary
from coca_lit.data.batch import Batch
from coca_lit.lit_module import CoCaLit
from coca_lit.runs.run_folder import environment
from coca_lit.tools.plan.command import build_without_weights
from coca_lit.tools.plan.trace import trace
from experiments.benchmarks.harness import interleaved, ratio
from experiments.study import replace_rows

FOLDER = Path(__file__).resolve().parent
MEMBERS = tuple(path.stem for path in sorted((FOLDER / "member").glob("*.yaml")))
TURNS = 20
BATCH = 64


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    photos = [f"data.root={sys.argv[1]}"] if sys.argv[1:] else None
    rows = measured("scenes", []) + (measured("flickr8k", photos) if photos else [])
    about = environment()
    command = {"command": "python -m experiments.family.cost FLICKR8K_FOLDER"}
    rows = [row | command | {k: about[k] for k in ("commit", "machine", "torch")} for row in rows]
    replace_rows(FOLDER / "costs.csv", rows, by=["data", "member"])


def measured(data: str, overrides: list[str]) -> list[dict[str, str]]:
    modules: dict[str, CoCaLit] = {}
    facts: dict[str, dict[str, str]] = {}
    steps: dict[str, Callable[[], object]] = {}
    for member in MEMBERS:
        words = [f"experiment=family_{data}", f"+member={member}", "trainer=cpu", "name=cost", *overrides]
        cfg = with_vocabulary(compose("train", [*words, f"hydra.searchpath=[file://{FOLDER}]"]))
        module = modules[member] = build_module(cfg).train()
        batches, tokens = training_batches(cfg, module)
        steps[member] = training_step(module, batches)
        trained = sum(p.numel() for p in module.net.parameters() if p.requires_grad)
        every = sum(p.numel() for p in module.net.parameters())
        gflop = flops_of_pair(cfg, tokens) / 1e9
        facts[member] = {"parameters": str(every), "trained": str(trained), "GFLOP": f"{gflop:.4f}"}
    seconds = interleaved(steps, TURNS)
    return [
        {"data": data, "member": member}
        | facts[member]
        | {"seconds": f"{median(seconds[member]):.4f}", "ratio": str(ratio(seconds[member], seconds["coca"]))}
        for member in MEMBERS
    ]


def training_batches(cfg: DictConfig, module: CoCaLit) -> tuple[Iterator[Batch], int]:
    """Batches without end, and the mean length of their captions in tokens."""
    data, tokenizer = build_data(cfg, module.net.tokenizer), module.net.tokenizer
    captions = [caption for group in data.training_captions().values() for caption in group]
    tokens = round(mean(min(n, tokenizer.context_length) for n in tokenizer.lengths(captions)))
    if cfg.data.get("cached_augmentations"):
        with torch.no_grad():
            images = module.net.image_encoder(torch.zeros(1, 3, cfg.image_size, cfg.image_size, dtype=torch.uint8))

        def cached() -> Iterator[Batch]:
            while True:
                texts = tokenizer([captions[i] for i in torch.randint(len(captions), (BATCH,))])
                lengths = (texts != tokenizer.pad_id).sum(dim=1)
                yield Batch(torch.randn(BATCH, *images.shape[1:]), texts, lengths, [""] * BATCH)

        return cached(), tokens

    def rendered() -> Iterator[Batch]:
        while True:
            yield from data.train_dataloader()

    return rendered(), tokens


def training_step(module: CoCaLit, batches: Iterator[Batch]) -> Callable[[], object]:
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = module.make_optimizer(module.net)

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(next(batches), 0).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def flops_of_pair(cfg: DictConfig, tokens: int) -> float:
    """Forward and backward pass, without a frozen image encoder, whose output is kept."""
    module = build_without_weights(cfg)
    weights = dict(module.loss_weights)
    if not any(weights.values()):  # parallel prediction: the work of the caption loss
        weights["caption"] = 1.0
    found = trace(module.net, weights, tokens, None, BATCH)
    frozen = not any(p.requires_grad for p in module.net.image_encoder.parameters())
    return (found.total - (found.forward["image encoder"] if frozen else 0)) / BATCH


if __name__ == "__main__":
    main()
