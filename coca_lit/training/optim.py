"""AdamW and timm's optimizers with CLIP's decay groups and layer-wise learning rates; schedules of the learning rate:
warm-up, then half a cosine, or a constant rate with a cooldown at the end; and what of a network is frozen.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from coca_lit.distributed import print_rank_zero
from coca_lit.errors import CheckpointError, ConfigError, check_names, check_number, suggest

if TYPE_CHECKING:  # what only some functions need, they import: a misspelt argument is refused soon
    from coca_lit.models import CoCa

# Learned positions, tokens and queries are no transformations: pulling them to zero has no meaning.
NOT_DECAYED = ("pos_embed", "cls_token", "position_embedding", "cls_embedding", "query")
WHOLE = ("mars", "kron", "adamuon", "nvnovograd")  # of timm 1.0.28: operations that PyTorch lacks for sharded tensors
FALLBACK = ("token_embedding.weight", "vocabulary.weight")  # tables of words, whose rows are no transformation either


class Grouped:
    """What makes an optimizer for the trainable parameters of a module. Its settings are checked at once, whereas the
    parameters are final only when training starts.

    Matrices decay; biases, norms, the temperature, position embeddings and learned queries do not.

    Args:
        lr, weight_decay: as for `torch.optim.AdamW`.
        layer_decay: factor of the learning rate from each layer of a tower to the one below it, as in BEiT (Bao et al.
            2021): the last layer learns with lr · layer_decay, the parts above the towers with lr.
        image_factor: factor of the learning rate of the image encoder, for one that is pretrained when the rest is not.

    Raises:
        ValueError: a number is out of range; when called, everything is frozen, as PyTorch's optimizers say.
    """

    def __init__(self, lr: float, weight_decay: float, layer_decay: float, image_factor: float) -> None:
        check_number("lr", lr, at_least=0)
        check_number("weight_decay", weight_decay, at_least=0)
        check_number("layer_decay", layer_decay, above=0, at_most=1)
        check_number("image_factor", image_factor, above=0, at_most=1)
        self.lr = lr
        self.weight_decay = weight_decay
        self.layer_decay = layer_decay
        self.image_factor = image_factor

    def groups(self, module: nn.Module, key: str | None = None) -> list[dict[str, Any]]:
        """The trainable parameters by weight decay and learning rate.

        Args:
            key: of a group, True in the groups of `FALLBACK` and in those without decay.
        """
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        kept = {
            f"{part}.{name}"
            for part, trunk in module.named_modules()
            for name in (trunk.no_weight_decay() if hasattr(trunk, "no_weight_decay") else ())  # as timm lists them
        }
        decayed = {
            name
            for name, p in trainable.items()
            if p.ndim > 1 and name.rsplit(".", 1)[-1] not in NOT_DECAYED and name not in kept
        }
        depth: dict[str, int] = {}  # parameters above the towers have none
        for part, tower in module.named_children() if self.layer_decay != 1 else ():
            depths = getattr(tower, "depths", None)
            if depths:
                depth |= (layers := {f"{part}.{name}": layer for name, layer in depths().items()})
                if not layers and any(name.startswith(f"{part}.") for name in trainable):
                    raise ValueError(f"layer_decay: the {part} does not tell its layers (group_matcher): set it to 1")
        groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
        for name, p in trainable.items():
            factor = self.image_factor if name.startswith("image_encoder.") else 1
            other = key is not None and (name.endswith(FALLBACK) or name not in decayed)
            kind = (name in decayed, self.layer_decay ** depth.get(name, 0) * factor, other)
            groups.setdefault(kind, []).append(p)
        return [
            {
                "params": groups[decays, factor, other],
                "weight_decay": self.weight_decay if decays else 0.0,
                "lr": self.lr * factor,
                **({key: other} if key is not None else {}),
            }
            for decays, factor, other in sorted(groups, reverse=True)
        ]


class AdamW(Grouped):
    """`AdamW(lr=1e-3)(module)` is a `torch.optim.AdamW`; see `Grouped` for the other arguments and errors.

    Args:
        betas, eps: as for `torch.optim.AdamW`.
    """

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
        layer_decay: float = 1.0,
        image_factor: float = 1.0,
    ) -> None:
        super().__init__(lr, weight_decay, layer_decay, image_factor)
        check_number("eps", eps, at_least=0)
        pair = isinstance(betas, Sequence) and len(betas) == 2
        if not pair or not all(isinstance(beta, Real) and 0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers of at least 0 and below 1, got {betas!r}")
        self.betas = (betas[0], betas[1])
        self.eps = eps

    def __call__(self, module: nn.Module) -> torch.optim.AdamW:
        settings = self.groups(module)
        # One kernel for all parameters: 4.5 times as fast as PyTorch's default on a CPU, with the same result.
        return torch.optim.AdamW(settings, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


class Timm(Grouped):
    """An optimizer of timm by its name: `Timm("lion", lr=1e-4)(module)`; see `Grouped` for other arguments.

    Muon and its variants orthogonalise the updates of matrices; embeddings, the vocabulary projection and what does not
    decay get the AdamW that they bring along.

    Args:
        name: one of `timm.optim.list_optimizers()`. Recommended, and tested on sharded weights (`trainer=fsdp`): muon,
            lion, adopt, nadamw.
        arguments: of that optimizer. Without a `momentum` timm's factory gives 0.9, also to Muon, whose own is 0.95.

    Raises:
        ValueError: there is no such optimizer, or it has no such argument, or refuses a value.
    """

    def __init__(
        self,
        name: str,
        lr: float,
        weight_decay: float = 0.2,
        layer_decay: float = 1.0,
        image_factor: float = 1.0,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__(lr, weight_decay, layer_decay, image_factor)
        from timm.optim import get_optimizer_class, list_optimizers

        names = [str(known) for known in list_optimizers(exclude_filters=["fused*", "bnb*"])]
        if name not in names:
            raise ValueError(f"timm has no optimizer '{name}'{suggest(name, names)} It has {', '.join(names)}")
        self.kind: Any = get_optimizer_class(name, bind_defaults=False)
        known = [key for key in inspect.signature(self.kind).parameters if key not in ("params", "lr", "weight_decay")]
        check_names(f"timm's {name}", arguments, known)
        self.name = name
        self.arguments = dict(arguments)
        try:
            self._make([{"params": [nn.Parameter(torch.zeros(1, 1, device="cpu"))]}])
        except (TypeError, ValueError, LookupError) as error:
            raise ValueError(f"timm's {name} refuses arguments={self.arguments}: {error}") from error

    def __call__(self, module: nn.Module) -> torch.optim.Optimizer:
        """Raises `ConfigError` if the weights are sharded and the optimizer does not support that."""
        from timm.optim import Muon
        from torch.distributed.tensor import DTensor

        sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
        if sharded and any(part in self.name for part in WHOLE):
            raise ConfigError(
                f"timm's {self.name} does not work on sharded weights: use muon, lion, adopt or nadamw, or trainer=ddp"
            )
        groups = self.groups(module, "use_fallback" if issubclass(self.kind, Muon) else None)
        return self._make(groups)

    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from timm.optim import create_optimizer_v2

        return create_optimizer_v2(groups, self.name, self.lr, self.weight_decay, **self.arguments)


def optimizer_of(make: Callable[[nn.Module], torch.optim.Optimizer], *modules: nn.Module) -> torch.optim.Optimizer:
    """One optimizer of all modules that have something to train."""
    trained = [module for module in modules if any(p.requires_grad for p in module.parameters())]
    optimizer, *others = map(make, trained or modules[:1])  # which refuses one without any
    for other in others:
        for group in other.param_groups:
            optimizer.add_param_group(group)
    return optimizer


def check_resumable(
    checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Raises `CheckpointError` if a checkpoint of Lightning's has other weights than a run, or trains others."""
    shapes = [{name: tensor.shape for name, tensor in of.items()} for of in (checkpoint["state_dict"], weights)]
    states = (checkpoint["optimizer_states"][0], optimizer.state_dict())
    groups = [[len(group["params"]) for group in state["param_groups"]] for state in states]
    if shapes[0] != shapes[1] or groups[0] != groups[1]:
        raise CheckpointError(
            "the checkpoint has other weights than this run, or trains others, so it cannot be resumed: undo the "
            "change of model.net, model.optimizer, model.freeze, lora or of a loss weight that is 0, or take the "
            "weights alone with ckpt_path=null init_from=FILE"
        )


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Learning rate factor per step: linear from 1/warmup_steps to 1, then half a cosine down to 0 at `total_steps`."""

    def after(step: int) -> float:
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    return _warmed_up(optimizer, warmup_steps, after)


def warmup_stable_decay(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, cooldown_steps: int
) -> LambdaLR:
    """Learning rate factor per step: linear from 1/warmup_steps to 1, constant, and in the last `cooldown_steps` before
    `total_steps` down to 0 as 1 - sqrt of the progress (Hägele et al. 2024, arXiv 2405.18392).

    Until the cooldown nothing depends on the total, so that a run without one is the trunk of runs of any length: each
    resumes from one of its checkpoints and cools down.
    """
    stable_until = total_steps - cooldown_steps
    if stable_until < warmup_steps:
        raise ConfigError(
            f"{warmup_steps} steps of warm-up and {cooldown_steps} of cooldown do not fit a run of {total_steps} steps:"
            " set model.warmup_steps or model.cooldown_steps to fewer"
        )

    def after(step: int) -> float:
        progress = (step - stable_until) / max(cooldown_steps, 1)
        return 1 - math.sqrt(min(max(progress, 0.0), 1.0))

    return _warmed_up(optimizer, warmup_steps, after)


def _warmed_up(optimizer: torch.optim.Optimizer, warmup_steps: int, after: Callable[[int], float]) -> LambdaLR:
    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return after(step)

    return LambdaLR(optimizer, factor)


# What is not trained: what the config names, and what no loss would train


def freeze(net: "CoCa", parts: Sequence[str], trained: Collection[str]) -> None:
    """Freezes parts of the network and prints which.

    A parameter that never gets a gradient must be frozen: DistributedDataParallel would wait for that gradient.

    Args:
        parts: names or patterns, see `CoCa.freeze`; or a single one.
        trained: parts that get a gradient from some loss, which stay trainable unless `parts` names them.
    """
    from coca_lit.models.coca import OUTPUTS

    parts = [parts] if isinstance(parts, str) else parts
    modules = dict.fromkeys(part.partition(".")[0] for part in net.parts_for(OUTPUTS))
    unused = [part for module in modules for part in _without(net, module, trained)]
    for reason, names in (("as configured", parts), ("no loss with a weight above 0 says that it trains them", unused)):
        if names:
            frozen = net.freeze(*names)
            print_rank_zero(f"frozen, {reason}: {', '.join(names)} ({len(frozen)} tensors)")


def _without(net: "CoCa", part: str, trained: Collection[str]) -> Iterator[str]:
    """The part itself, or its parts that are not trained; nothing if all of it is trained."""
    if any(f"{part}.".startswith(f"{name}.") for name in trained):
        return
    if not any(name.startswith(f"{part}.") for name in trained):
        yield part
        return
    inside = (n.removeprefix(f"{part}.") for n, _ in net.named_parameters() if n.startswith(f"{part}."))
    for child in dict.fromkeys(name.partition(".")[0] for name in inside):  # modules and parameters
        yield from _without(net, f"{part}.{child}", trained)
