"""Set-ups of several processes that cannot work, or would train something else: each stops with one sentence."""

from typing import Any

SUPPORTED = "use trainer=ddp, or trainer=fsdp if the model does not fit one GPU"


def check_strategy(
    strategy: Any,
    precision: str,
    ema: float | None,
    micro_batch_size: int | None,
    lora: bool = False,
    auxiliary: bool = False,
    self_critical: bool = False,
) -> None:
    """Raises ValueError.

    Args:
        strategy: Lightning's name of a strategy, or the strategy.
        precision: of Lightning's trainer.
        ema: decay of averaged weights.
        lora: whether low-rank updates are trained.
        auxiliary: whether there are losses with parameters of their own.
        self_critical: whether captions are written in the training step.
    """
    from coca_lit.training.sharding import FullySharded

    sharded = isinstance(strategy, FullySharded)
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if "deepspeed" in name.lower():
        raise ValueError(f"DeepSpeed is not supported: {SUPPORTED}")
    if not sharded and ("fsdp" in name.lower() or name == "ModelParallelStrategy"):
        raise ValueError(f"the strategy {name} does not know how to shard the network: use trainer=fsdp")
    if sharded and ema is not None:
        raise ValueError("averaged weights do not work with sharded ones: set ema=null, or use trainer=ddp")
    if sharded and auxiliary:
        raise ValueError("auxiliary losses do not work with sharded weights: set model.auxiliary=null, or trainer=ddp")
    if sharded and micro_batch_size is not None:
        raise ValueError(
            "micro_batch_size does not work with sharded weights: use trainer=ddp, or save memory with "
            "model.grad_checkpointing=blocks"
        )
    if sharded and lora:
        raise ValueError("lora does not work with sharded weights: use trainer=ddp, its gradients need little memory")
    if sharded and self_critical:
        raise ValueError("self-critical training writes captions, which sharded weights cannot: use trainer=ddp")
    if precision == "16-mixed" and micro_batch_size is not None:
        raise ValueError(
            "micro_batch_size does not work with fp16, whose loss scale comes after its gradients: use "
            "trainer.precision=bf16-mixed"
        )


def expect_texts(decoder: bool, strategy: Any) -> None:
    """For batches that are texts alone: they need a decoder, and leave the image half of the network out, for which
    DistributedDataParallel would wait for ever if it did not look. Raises ValueError.
    """
    from lightning.pytorch.strategies import DDPStrategy

    if not decoder:
        raise ValueError(
            "texts without images train the decoder, which a CLIP (decoder_layers=0) lacks: data.text=null"
        )
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs.setdefault("find_unused_parameters", True)


def check_batch_size(batch_size: int, world: int, micro_batch_size: int | None) -> None:
    """Raises ValueError; `batch_size` is that of all `world` processes together."""
    if batch_size % world:
        raise ValueError(
            f"the global batch of {batch_size} cannot be split evenly over {world} processes: choose a multiple of "
            f"{world}"
        )
    if micro_batch_size is not None and batch_size // world % micro_batch_size:
        raise ValueError(
            f"a process gets {batch_size // world} of the {batch_size} pairs of a batch, which is no multiple of "
            f"trainer.micro_batch_size={micro_batch_size}"
        )
