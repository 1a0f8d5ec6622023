"""From the cost of a sample to the memory of a device, samples per second and device-hours."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from coca_lit.models import CoCa
from coca_lit.plan.hardware import Gpu
from coca_lit.plan.trace import Cost
from coca_lit.training.sharding import blocks

USABLE = 0.92  # of a GPU's memory; the rest is for the CUDA context, communication buffers and fragmentation
TILE = 256  # rows of contrastive logits that exist at a time


class Model(NamedTuple):
    """Sizes of a network, in bytes where nothing else is said."""

    parameters: dict[str, tuple[int, int]]  # by part: numbers in all, and those that are trained
    weights: int
    trained: int
    in_blocks: int  # weights that sharding gathers block by block, see `coca_lit.training.sharding`
    largest_block: int
    width: int  # numbers in a feature


class Recipe(NamedTuple):
    batch: int  # pairs in a step, of all devices
    devices: int
    contrastive: bool = True
    sharded: bool = False
    averaged: bool = False  # EMA weights are kept
    micro_batch: int | None = None  # pairs at a time on a device
    half: bool = True  # products in bf16
    samples: float | None = None  # of the whole training


def measure(net: CoCa) -> Model:
    named: dict[str, Iterable[Tensor]] = {
        "image encoder": net.image_encoder.parameters(),
        "pooling": [*net.pooling.parameters(), *net.image_projection.parameters()],
        "text tower": net.text.parameters(),
    }
    if net.decoder is not None:
        vocabulary = net.decoder.vocabulary.weight
        named |= {"decoder": [p for p in net.decoder.parameters() if p is not vocabulary], "vocabulary": [vocabulary]}
    counts = {}
    for part, tensors in named.items():
        sizes = [(p.numel(), p.requires_grad) for p in tensors]
        counts[part] = (sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained))
    groups = [sum(p.nbytes for module in group for p in module.parameters()) for group in blocks(net)]
    weights = sum(p.nbytes for p in net.parameters())
    trained = sum(p.nbytes for p in net.parameters() if p.requires_grad)
    return Model(counts, weights, trained, sum(groups), max(groups, default=0), net.config["embed_dim"])


def memory(model: Model, cost: Cost, recipe: Recipe) -> dict[str, float]:
    """Bytes on a device by what they are for, all but the activations of its samples."""
    share = recipe.devices if recipe.sharded else 1
    found = {
        "weights": model.weights / share,
        "gradients": model.trained / share,
        "AdamW states": 2 * model.trained / share,
        "casts of weights, chunks of the losses": cost.fixed,
    }
    if recipe.sharded:
        found["weights gathered for a step"] = model.weights - model.in_blocks + model.largest_block
    elif recipe.devices > 1:
        found["DDP's buckets"] = model.trained
    if recipe.averaged:
        found["averaged weights"] = model.weights
    if recipe.contrastive:
        found["contrastive loss over the global batch"] = recipe.batch * _per_text(model)
    return found


def _per_text(model: Model) -> int:
    """Bytes on every device of a pair of the global batch: its text and the gradient, a column of a tile of logits and
    of its gradient.
    """
    return 4 * 2 * (model.width + TILE)


def per_sample(model: Model, cost: Cost, recipe: Recipe, pixels: int) -> tuple[float, float]:
    """Bytes of a sample on its device: while it is in the network, and the whole step long (images and features)."""
    return cost.activations, pixels + (4 * 4 * model.width if recipe.micro_batch else 0)


def largest_batch(memory_gb: float, model: Model, cost: Cost, recipe: Recipe, pixels: int) -> int:
    """Pairs per device that fit; with micro-batches only so many are in the network at a time, but every device holds
    the texts of all. 0: not even one, or not even a micro-batch.
    """
    in_network, always = per_sample(model, cost, recipe, pixels)
    if recipe.contrastive:
        always += recipe.devices * _per_text(model)
    free = USABLE * memory_gb * 1e9 - sum(memory(model, cost, recipe._replace(batch=0)).values())
    if recipe.micro_batch is None:
        return max(int(free / (in_network + always)), 0)
    found = int((free - recipe.micro_batch * in_network) / always)
    return found if found >= recipe.micro_batch else 0


def largest_micro_batch(memory_gb: float, model: Model, cost: Cost, recipe: Recipe, pixels: int) -> int | None:
    """Pairs that a device can send through the network at a time so that the recipe's batch fits: a divisor of its
    part of that batch. None: not even one by one, or sharded weights, which micro-batches do not go with.
    """
    own = recipe.batch // recipe.devices
    sizes = [] if recipe.sharded else [n for n in range(own, 0, -1) if own % n == 0]
    fits = (n for n in sizes if largest_batch(memory_gb, model, cost, recipe._replace(micro_batch=n), pixels) >= own)
    return next(fits, None)


def flops(model: Model, cost: Cost, recipe: Recipe) -> float:
    """Of a sample in training: the step, the contrastive logits of the global batch (4 products), and with
    micro-batches a second forward pass of the two towers.
    """
    logits = 4 * 2 * model.width * recipe.batch if recipe.contrastive else 0
    towers = ("image encoder", "pooling", "text tower")
    again = sum(cost.forward[part] for part in towers) if recipe.micro_batch and recipe.contrastive else 0
    return cost.total + logits + again


def samples_per_second(sample_flops: float, gpu: Gpu, utilisation: float, half: bool) -> float:
    """Of one device, as arithmetic has it: the input pipeline and the network between machines may be slower."""
    return utilisation * (gpu.bf16 if half else gpu.tf32) * 1e12 / sample_flops


def total_parameters(parameters: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    return sum(n for n, _ in parameters.values()), sum(n for _, n in parameters.values())
