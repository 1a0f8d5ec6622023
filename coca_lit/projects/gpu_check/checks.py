"""The checks and measurements of `coca-gpu-check`."""

import contextlib
import copy
import io
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import coca_lit
from coca_lit.cli.command import compose
from coca_lit.cli.train import run
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, create_model
from coca_lit.runs.run_folder import commit, machine
from coca_lit.tools.plan.estimate import GPUS, Recipe, measure, memory, per_sample
from coca_lit.tools.plan.trace import cost, on_gpu
from coca_lit.tools.report.tables import Table, markdown

CAPTIONS = [5, 9, 17, 6, 7, 12, 24, 4]  # tokens of the captions of a small batch
TOLERANCE = {"fp32": 1e-4, "TF32": 2e-2, "bf16": 6e-2}  # of gradients, by the largest of them
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
TINY = (
    *("experiment=scenes", "trainer=smoke", "trainer.accelerator=gpu", "trainer.devices=1"),
    *("data.batch_size=8", "data.train_count=32", "trainer.max_steps=3", "trainer.limit_train_batches=null"),
    *("trainer.limit_val_batches=0", "evals=[]", "logger=csv"),
)


class Line(NamedTuple):
    name: str
    outcome: str  # PASS or FAIL
    detail: str


def check_gpu(output: Path, quick: bool = False) -> int:
    """Makes all checks and measurements, writes both files, and returns how many checks failed.

    Args:
        output: folder for JSON and Markdown, which exists.
        quick: measure the smallest model alone.
    """
    lines = list(_checks())
    rows: list[dict[str, Any]] = []
    for name in ["coca_tiny"] if quick else ["coca_vit_b32", "coca_vit_l14"]:
        torch.manual_seed(0)
        net = create_model(name).to("cuda").train()
        for size in (64, 128, 256) if name != "coca_tiny" else (16,):
            try:
                speed = _step_speed(net, size)
            except torch.cuda.OutOfMemoryError:
                speed = {"samples/s": "out of memory"}
            rows.append({"model": name, "batch": size} | speed)
        rows.append({"model": name, "batch": 16} | _caption_speed(net.eval()))
    found: dict[str, Any] = {"device": environment(), "checks": [line._asdict() for line in lines]}
    (output / "gpu_check.json").write_text(json.dumps(found | {"measurements": rows}, indent=2) + "\n")
    device = ", ".join(f"{key} {value}" for key, value in found["device"].items())
    columns = list(dict.fromkeys(key for row in rows for key in row))
    measured = [[str(row.get(key, "")) for key in columns] for row in rows]
    tables = Table("checks", ["check", "outcome", "detail"], lines), Table("measurements", columns, measured)
    page = "\n\n".join([f"Measured. {device}", *map(markdown, tables)]) + "\n"
    (output / "gpu_check.md").write_text(page, encoding="utf-8")
    failed = sum(line.outcome == "FAIL" for line in lines)
    print(f"{len(lines)} checks, {failed} failed; JSON and Markdown are in {output}")
    return failed


def environment() -> dict[str, Any]:
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "memory_gb": round(device.total_memory / 1e9, 1),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "coca_lit": coca_lit.__version__,
        "commit": commit(),
        "machine": machine(),
    }


def _checks() -> Iterator[Line]:
    """Makes all checks and prints each."""
    checks: dict[str, Callable[[], str]] = {"environment": lambda: json.dumps(environment())}
    for pooler, mask, kind in product(("single", "parallel", "cascade"), ("correct", "legacy"), TOLERANCE):
        name = f"step equals the CPU: {pooler} pooler, {mask} mask, {kind}"
        checks[name] = partial(equals_cpu, kind, pooler=pooler, cls_mask=mask)
    checks |= {
        "step equals the CPU: sigmoid loss": partial(equals_cpu, "fp32", contrastive="siglip"),
        "captions equal those of the CPU": same_captions,
        "attention in bf16": attention_kernels,
        "no synchronisation in a step": no_synchronisation,
        "collectives of NCCL": collectives,
    }
    checks |= {f"three steps in {kind}": partial(trains, f"trainer.precision={kind}") for kind in PRECISIONS}
    mixed = partial(trains, "trainer.precision=bf16-mixed")
    checks |= {
        "three steps, compiled": partial(mixed, "+model.compile=true"),
        # Frozen, as batch norms do not go with micro-batches.
        "three steps in micro-batches": partial(mixed, "trainer.micro_batch_size=4", "model.freeze=[image_encoder]"),
        "three steps with recomputation": partial(mixed, "+model.grad_checkpointing=blocks"),
        "a broken run resumes with equal weights": resumes,
    }
    for name, check in checks.items():
        try:
            line = Line(name, "PASS", check())
        except Exception as error:  # any error of a device: the other checks continue
            said = str(error).strip().splitlines() or ["no message"]
            line = Line(name, "FAIL", f"{type(error).__name__}: {said[-1][:300]}")
        print(f"{line.outcome}  {line.name}: {line.detail}", flush=True)
        yield line


# Equality


def _batch(net: CoCa, device: str, lengths: Sequence[int] = CAPTIONS) -> tuple[Tensor, Tensor, Tensor]:
    """Images and tokens on the device, lengths on the host."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), 3, net.image_size, net.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    rows = torch.tensor(lengths)
    tokens = torch.randint(4, 40, (len(lengths), max(lengths)), generator=generator)
    tokens[torch.arange(max(lengths)) >= rows[:, None]] = net.tokenizer.pad_id
    return images.to(device), tokens.to(device), rows


def _small(**overrides: Any) -> CoCa:
    torch.manual_seed(0)
    vit = {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return create_model("coca_tiny", image_encoder="vit_tiny_patch16_224", image_encoder_args=vit, **overrides).train()


def _loss(net: CoCa, batch: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(list(loss_terms(net(*batch)).values())).sum()


def _step(net: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A training step in bf16 as a run makes it."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _difference(found: Tensor, expected: Tensor, largest: float | None = None) -> float:
    """The largest difference, as a share of the largest expected value or of `largest`."""
    expected = expected.detach().cpu().float()
    scale = expected.abs().max().item() if largest is None else largest
    return (found.detach().cpu().float() - expected).abs().max().item() / scale


def _largest(differences: Iterable[float]) -> float:
    """NaN if one is, which `max` drops."""
    return torch.tensor([*differences], dtype=torch.float64).max().item()


def _within(allowed: float, **apart: float) -> str:
    """What was found; raises `ValueError` if a difference is larger than what is allowed, or no number."""
    said = ", ".join(f"{name} within {value:.1e}" for name, value in apart.items())
    if not all(value <= allowed for value in apart.values()):
        raise ValueError(f"{said}, allowed is {allowed:.0e}")
    return said


def equals_cpu(kind: str, **overrides: Any) -> str:
    cpu = _small(**overrides)
    gpu = copy.deepcopy(cpu).to("cuda")
    expected = _loss(cpu, _batch(cpu, "cpu"))
    expected.backward()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = kind == "TF32"
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=kind == "bf16"):
            found = _loss(gpu, _batch(gpu, "cuda"))
        found.backward()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    expected_grads = {name: q.grad for name, q in cpu.named_parameters() if q.grad is not None}
    largest = _largest(grad.abs().max().item() for grad in expected_grads.values())
    grads = {name: p.grad for name, p in gpu.named_parameters() if p.grad is not None}
    if missing := expected_grads.keys() - grads.keys():
        raise ValueError(f"{len(missing)} gradients are missing, e.g. of {min(missing)}")
    apart = _largest(_difference(grads[name], grad, largest) for name, grad in expected_grads.items())
    return _within(TOLERANCE[kind], loss=_difference(found, expected), gradients=apart)


class _Operations(TorchDispatchMode):
    """Counts the operators that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def attention_kernels() -> str:
    """Which kernels a step takes, forward and backward, by the name that PyTorch gives their operators."""
    net = _small().to("cuda")
    with _Operations() as operations:
        with torch.autocast("cuda", torch.bfloat16):
            loss = _loss(net, _batch(net, "cuda"))
        loss.backward()
    found = {name: count for name, count in operations.names.items() if "attention" in name or "attn" in name}
    if not found:
        raise ValueError("no fused kernel: attention runs as products and softmax")
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items()))


def same_captions() -> str:
    cpu = _small().eval()
    gpu = copy.deepcopy(cpu).to("cuda")
    images = _batch(cpu, "cpu")[0]
    strategies: list[dict[str, Any]] = [{"strategy": "greedy"}, {"strategy": "beam", "num_beams": 3}]
    for options in strategies:
        if not torch.equal(gpu.generate(images.to("cuda"), **options).cpu(), cpu.generate(images, **options)):
            raise ValueError(f"{options['strategy']}: other ids than on the CPU")
    return "greedy and beam search, token for token"


# Waiting, collectives


def no_synchronisation() -> str:
    net = _small().to("cuda")
    batch = _batch(net, "cuda")
    step = _step(net, lambda: _loss(net, batch))
    step()  # warms up
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    found = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    if found:
        raise ValueError(f"{len(found)} in a step: {found[0]}")
    return "forward, backward, clipping and optimizer"


def collectives() -> str:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            x = torch.ones(4, 2, device="cuda")
            out = torch.empty_like(x)
            dist.all_reduce(x)
            dist.all_gather_into_tensor(out, x)
            dist.reduce_scatter_tensor(out, x)
            box: list[Any] = [None]
            gloo = dist.new_group(backend="gloo")
            assert isinstance(gloo, dist.ProcessGroup)  # of which this process is a member
            dist.all_gather_object(box, "sent", group=gloo)
            if not torch.equal(out, x) or box != ["sent"]:
                raise ValueError("other values came back than were sent")
        finally:
            dist.destroy_process_group()
    return "all_reduce, all_gather_into_tensor, reduce_scatter_tensor, objects over gloo; one process"


# Runs


class StopAt(L.Callback):
    """Breaks a run before one of its steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("broken on purpose")


def _run(folder: str | Path, *overrides: str) -> dict[str, Any]:
    """A training in the folder; returns its last checkpoint."""
    with contextlib.redirect_stdout(io.StringIO()):
        run(compose("train", [*TINY, "name=gpu_check", f"output_dir={folder}", *overrides]))
    return torch.load(Path(folder) / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)


def trains(*overrides: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        state = _run(folder, *overrides)["state_dict"]
    if not all(x.isfinite().all() for x in state.values() if x.is_floating_point()):
        raise ValueError("a weight is not finite")
    return "weights are finite"


def resumes() -> str:
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as broken:
        precision = "trainer.precision=32-true"
        expected = _run(whole, precision)
        with contextlib.suppress(KeyError):
            _run(broken, precision, "+callbacks.stop={_target_: coca_lit.projects.gpu_check.checks.StopAt, step: 2}")
        found = _run(broken, precision)
    apart = _largest(_difference(x, expected["state_dict"][name], 1.0) for name, x in found["state_dict"].items())
    return _within(1e-5, weights=apart)


# Measurements


def _lengths(size: int, longest: int) -> list[int]:
    """Tokens of captions as the web has them: most are short, a few fill the context."""
    return [min(8 + i % 9 + 40 * (i % 50 == 0), longest) for i in range(size)]


def _timed(step: Callable[[], None], steps: int = 5) -> dict[str, Any]:
    """Seconds and memory of a step, and the share of them in which the device computes nothing."""
    torch.cuda.reset_peak_memory_stats()
    began = 0.0
    for number in range(steps + 2):
        if number == 2:
            torch.cuda.synchronize()
            began = time.perf_counter()
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / steps
    gigabytes = round(torch.cuda.max_memory_allocated() / 1e9, 2)  # before the profiler takes some
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:  # it slows the host down, not the kernels
        step()
        torch.cuda.synchronize()
    busy = sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6
    return {"seconds": seconds, "GB": gigabytes, "idle": round(max(0.0, 1 - busy / seconds), 2)}


def _step_speed(net: CoCa, size: int) -> dict[str, Any]:
    lengths = _lengths(size, net.config.context_length)
    batch = _batch(net, "cuda", lengths)
    measured = _timed(_step(net, lambda: _loss(net, batch)))
    seconds = measured.pop("seconds")
    tokens = sum(lengths) // size
    with torch.device("meta"):
        shape = type(net)(net.config)
    spent = on_gpu(shape, cost(shape, {"contrastive": 1, "caption": 1}, tokens, torch.bfloat16), tokens, 2)
    recipe, model = Recipe(size, 1), measure(net)
    planned = sum(memory(model, spent, recipe).values()) + size * sum(
        per_sample(model, spent, recipe, 3 * net.image_size**2)
    )
    peak = next((gpu.bf16 for key, gpu in GPUS.items() if key in torch.cuda.get_device_name()), None)
    return {
        "tokens per caption": tokens,
        "samples/s": round(size / seconds, 1),
        **measured,
        "GB, planned": round(planned / 1e9, 2),
        "share of the peak": round(spent.total * size / seconds / peak / 1e12, 3) if peak else None,
    }


def _caption_speed(net: CoCa, count: int = 16) -> dict[str, Any]:
    images = torch.zeros(count, 3, net.image_size, net.image_size, dtype=torch.uint8, device="cuda")
    seconds = 0.0
    for _ in range(3):  # the last one counts
        torch.cuda.synchronize()
        began = time.perf_counter()
        net.generate(images)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return {"captions/s": round(count / seconds, 1)}
