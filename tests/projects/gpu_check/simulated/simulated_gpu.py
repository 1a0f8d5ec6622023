"""A GPU without one: tensors on `cuda:0` whose operators run on the CPU, with the same values. With the variable
COCA_SIMULATED=mps they are on `mps:0`, Apple's, which has no float64 and no pinned memory.

It finds what would fail or wait on a GPU: operators that get tensors of two devices, reads that make the host wait for
the device, collectives that NCCL refuses. It knows nothing about time, and its kernels are the CPU's.

Importing it changes PyTorch for the whole process, so the tests with it run in a process of their own, as a plugin that
pytest loads first: `test_simulation.py` starts it. `device.cpp` gives a CPU build of PyTorch what its autograd engine
asks of a device; g++ builds it in a few seconds, once.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import itertools
import os
import subprocess
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

KIND = os.environ.get("COCA_SIMULATED", "cuda")


def _build() -> Path:
    """The library made of device.cpp for this version of PyTorch, from an earlier call if there was one."""
    source = Path(__file__).with_name("device.cpp")
    digest = hashlib.sha256(source.read_bytes() + (version("torch") + KIND).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"coca_lit_simulated_gpu_{digest}.so"
    if not library.exists():
        spec = importlib.util.find_spec("torch")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        torch_folder = Path(spec.submodule_search_locations[0])
        include, libraries = torch_folder / "include", torch_folder / "lib"
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "device.so"
            flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-DKIND={KIND.upper()}", f"-DKIND_{KIND.upper()}"]
            flags += [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
            links = [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
            subprocess.run(["g++", *flags, str(source), *links, "-o", str(made)], check=True)
            made.rename(library) if made.stat().st_dev == library.parent.stat().st_dev else library.write_bytes(
                made.read_bytes()
            )
    return library


ctypes.CDLL(str(_build()))  # before PyTorch, which asks once what devices there are

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device(KIND, 0)
GIGABYTES = 80
TESTS = str(Path(__file__).resolve().parents[3])
aten = torch.ops.aten


class Recorder:
    """What a block of code does on the device.

    Attributes:
        waits: (what, where) -> how often the host waited for the device.
        launches: operator -> how often it was launched.
        attention: (kernel, shapes of queries and keys) -> how often it was chosen.
        bytes: of all tensors that were allocated.
    """

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()
        self.attention: Counter[tuple[Any, ...]] = Counter()
        self.bytes = 0

    def __enter__(self) -> "Recorder":
        _recorders.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _recorders.remove(self)


_recorders: list[Recorder] = []


def _waits(what: str) -> None:
    place = _place() if _recorders else ""
    for recorder in _recorders:
        recorder.waits[what, place] += 1


def _place() -> str:
    """The line of the package, or of a library, that called the operator."""
    frames = [(f.filename, f.lineno) for f in reversed(traceback.extract_stack(limit=60))]
    for package in ("/coca_lit/", "/lightning/", "/open_clip/", "/torch/optim/", "/torch/nn/"):
        for name, line in frames:
            if package in name and not name.startswith(TESTS):
                return f"{name.rpartition(package)[2]}:{line}"
    return "autograd"


class DeviceTensor(torch.Tensor):
    """A tensor on the device, around a tensor on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> "DeviceTensor":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), **layout, layout=inner.layout, device=DEVICE, requires_grad=requires_grad
        )
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.inner})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.detach().__reduce_ex__(protocol)  # a file holds values

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.detach().clone().requires_grad_(self.requires_grad)

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


VIEWS = {
    *("view", "_unsafe_view", "transpose", "t", "permute", "slice", "select", "expand", "unsqueeze", "squeeze"),
    *("detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "diagonal", "unfold", "_reshape_alias"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "chunk", "lift_fresh", "unsafe_split"),
}
WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount", "is_nonzero")
}
MIXING = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "index_put", "set_"}  # take two devices
INDEXING = MIXING - {"copy_", "_to_copy", "set_"}


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator on the tensors within."""
    name = func.overloadpacket.__name__
    leaves = _values(args, kwargs)
    on_device = [x for x in leaves if isinstance(x, DeviceTensor)]
    on_host = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor)]
    to = kwargs.get("device")
    if on_device and name not in MIXING and (mixed := [x for x in on_host if x.dim() and x.is_cpu]):
        shapes = [tuple(x.shape) for x in mixed]
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} got {DEVICE} and cpu {shapes}, at {_place()}"
        )
    if name in INDEXING and on_device and not isinstance(args[0], DeviceTensor):
        raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor: {_place()}")
    on_result = bool(on_device) or (to is not None and torch.device(to).type == KIND)
    if name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        if name == "copy_":
            on_result = isinstance(args[0], DeviceTensor)
        elif to is not None:
            on_result = torch.device(to).type == KIND
        if isinstance(source, torch.Tensor) and isinstance(source, DeviceTensor) != on_result:
            free = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
            if not free or (on_result and not is_pinned(source)):
                _waits("copy to the device" if on_result else "copy to the host")
    elif on_device:
        if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            _waits(name)
        if name == "multinomial":
            _waits("multinomial checks its input")
        for index in args[1] if name in INDEXING else ():
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                _waits("boolean index")
            elif index is not None and not isinstance(index, DeviceTensor):
                _waits("index copied to the device")
    if name in ("_local_scalar_dense", "equal", "is_same_size", "is_nonzero"):
        on_result = False
    if to is not None and torch.device(to).type == KIND:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": None}
    if KIND == "mps" and torch.float64 in (kwargs.get("dtype"), *(x.dtype for x in on_device)) and on_result:
        raise TypeError(
            f"Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64: {_place()}"
        )
    kernel = ATTENTION.get(name)
    inner = {key: _each(_inner, x) for key, x in kwargs.items()}
    result = (kernel or func)(*(_each(_inner, x) for x in args), **inner)
    if name not in VIEWS and (on_device or on_result):
        new = [x for x in _values((result,), {}) if isinstance(x, torch.Tensor)] if not name.endswith("_") else []
        for recorder in _recorders:
            recorder.launches[name] += 1
            recorder.bytes += sum(x.nbytes for x in new)
    if not on_result:
        return result
    if name == "copy_":
        return args[0]
    outer = _each(lambda x: DeviceTensor(x) if type(x) is torch.Tensor else x, result)
    return return_and_correct_aliasing(func, args, kwargs, outer) if on_device else outer


# Operators take and return values and flat lists of them. PyTorch's `tree_map` would take a third of the time.


def _values(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    for x in (*args, *kwargs.values()):
        found.extend(x) if isinstance(x, (list, tuple)) else found.append(x)
    return found


def _each(function: Callable[[Any], Any], x: Any) -> Any:
    return type(x)(map(function, x)) if isinstance(x, (list, tuple)) else function(x)


def _inner(x: Any) -> Any:
    if isinstance(x, DeviceTensor):
        return x.inner
    return x.detach() if isinstance(x, torch.nn.Parameter) else x


class SimulatedGpu(TorchDispatchMode):
    """Within, `device="cuda"` makes tensors on the device."""

    def __enter__(self) -> Any:
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._before)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to = kwargs.get("device")
        on_device = any(isinstance(x, DeviceTensor) for x in _values(args, kwargs))
        if on_device or (to is not None and torch.device(to).type == KIND):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


# Attention: device.cpp chooses the kernel as PyTorch does on an H100; here are the kernels.


def _scores(q: Any, k: Any, mask: Any, causal: bool, scale: float | None) -> Any:
    scores = (q.float() @ k.float().mT) * (scale or q.shape[-1] ** -0.5)
    if causal:
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores if mask is None else scores + mask.float()


def _forward(kernel: str, q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float | None) -> tuple[Any, Any]:
    for recorder in _recorders:
        recorder.attention[kernel, tuple(q.shape), tuple(k.shape), causal] += 1
    scores = _scores(q, k, mask, causal, scale)
    log_sum = scores.logsumexp(-1)
    out = ((scores - log_sum[..., None]).exp() @ v.float()).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), log_sum  # in the layout of the kernels


def _backward(grad: Any, q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float | None) -> tuple[Any, Any, Any]:
    kind, scale = q.dtype, scale or q.shape[-1] ** -0.5
    grad, q, k, v = (x.float() for x in (grad, q, k, v))
    p = _scores(q, k, mask, causal, scale).softmax(-1)
    grad_p = grad @ v.mT
    grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * scale
    return (grad_scores @ k).to(kind), (grad_scores.mT @ q).to(kind), (p.mT @ grad).to(kind)


def _flash(q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, debug: bool = False, scale: Any = None):
    out, log_sum = _forward("flash", q, k, v, None, causal, scale)
    seed = torch.zeros((), dtype=torch.long)
    return out, log_sum, None, None, q.shape[2], k.shape[2], seed, seed, torch.empty(0)


def _flash_backward(grad: Any, q: Any, k: Any, v: Any, *others: Any, scale: Any = None) -> Any:
    return _backward(grad, q, k, v, None, others[7], scale)


def _efficient(
    q: Any, k: Any, v: Any, mask: Any, log_sum: bool, dropout: float = 0.0, causal: bool = False, scale=None
):
    out, sums = _forward("memory-efficient", q, k, v, mask, causal, scale)
    seed = torch.zeros((), dtype=torch.long)
    return out, sums, seed, seed


def _efficient_backward(grad: Any, q: Any, k: Any, v: Any, mask: Any, *others: Any, scale: Any = None) -> Any:
    return (*_backward(grad, q, k, v, mask, others[6] if len(others) > 6 else False, scale), None)


def _texts(q: Any, k: Any, q_ends: Any, k_ends: Any) -> Iterator[tuple[slice, slice]]:
    bounds = zip(*(ends.tolist() for ends in (q_ends, k_ends)), strict=True)
    for (q_start, k_start), (q_end, k_end) in itertools.pairwise(bounds):
        yield slice(q_start, q_end), slice(k_start, k_end)


def _varlen(q: Any, k: Any, v: Any, q_ends: Any, k_ends: Any, q_max: int, k_max: int, causal: bool, *_: Any) -> Any:
    for recorder in _recorders:
        recorder.attention["varlen", tuple(q.shape), tuple(k.shape), causal] += 1
    out, log_sum = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for rows, keys in _texts(q, k, q_ends, k_ends):
        scores = _scores(q[rows].transpose(0, 1), k[keys].transpose(0, 1), None, causal, None)
        log_sum[:, rows] = scores.logsumexp(-1)
        out[rows] = (scores.softmax(-1) @ v[keys].transpose(0, 1).float()).transpose(0, 1).to(q.dtype)
    return out, log_sum, torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(grad: Any, q: Any, k: Any, v: Any, *others: Any) -> Any:
    _, _, q_ends, k_ends, _, _, causal, *_ = others
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for rows, keys in _texts(q, k, q_ends, k_ends):
        parts = [x[place].transpose(0, 1) for x, place in ((grad, rows), (q, rows), (k, keys), (v, keys))]
        found = _backward(*parts, None, causal, None)
        for target, place, part in zip(grads, (rows, keys, keys), found, strict=True):
            target[place] = part.transpose(0, 1)
    return tuple(grads)


ATTENTION: dict[str, Callable[..., Any]] = {
    "_varlen_attn": _varlen,
    "_varlen_attn_backward": _varlen_backward,
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
}


# Pinned memory, and what a program asks of `torch.cuda`

_pinned: set[int] = set()  # addresses of storages


def is_pinned(x: torch.Tensor, *_: Any) -> bool:
    return x.untyped_storage().data_ptr() in _pinned


def _pin(x: torch.Tensor, *_: Any) -> torch.Tensor:
    if is_pinned(x):
        return x
    if isinstance(x, DeviceTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    if torch._debug_has_internal_overlap(x) == 1:  # the copy has the strides of the original
        raise RuntimeError("unsupported operation: more than one element of the written-to tensor refers to a place")
    copy = x.clone()
    _kept.append(copy)  # an address must not be reused by memory that is not pinned
    _pinned.add(copy.untyped_storage().data_ptr())
    return copy


_kept: list[torch.Tensor] = []


class _Event:
    """Everything is done as soon as it is launched; only a wait for all of it counts."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Event") -> float:
        return 1.0


class _Stream(SimpleNamespace):
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def _attention(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False) -> Any:
    """A build for CPUs cannot choose Apple's kernel."""
    assert not dropout_p
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    return (_scores(q, k, mask, is_causal, None).softmax(-1) @ v.float()).to(q.dtype)


def _install() -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    if KIND == "mps":
        torch.backends.mps.is_available = lambda: True
        torch.mps.get_rng_state = lambda *_: torch.get_rng_state()
        torch.mps.set_rng_state = lambda state, *_: torch.set_rng_state(state)
        torch.mps.manual_seed = lambda seed: None
        torch.nn.functional.scaled_dot_product_attention = _attention
        return
    torch.Tensor.pin_memory = _pin  # type: ignore[method-assign]
    torch.Tensor.is_pinned = is_pinned  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
    common = importlib.import_module("torch.cuda.amp.common")
    common.amp_definitely_not_available = lambda: False  # type: ignore[attr-defined]
    cuda: Any = torch.cuda
    properties = SimpleNamespace(
        name="simulated GPU", major=9, minor=0, total_memory=GIGABYTES * 2**30, multi_processor_count=132
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "is_bf16_supported": True,
        "get_device_capability": (9, 0),
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_arch_list": ["sm_90"],
        "memory_stats": {},
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, _answer=answer, **__: _answer)
    for name in (
        *("_lazy_init", "init", "set_device", "manual_seed", "manual_seed_all", "set_rng_state", "empty_cache"),
        *("reset_peak_memory_stats", "reset_max_memory_allocated", "set_sync_debug_mode"),
    ):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.synchronize = lambda *_, **__: _waits("synchronize")
    cuda.Event, cuda.Stream, cuda.stream = _Event, _Stream, lambda *_: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    # One launch for all parameters, of clipping too.
    importlib.import_module("torch.utils._foreach_utils")._foreach_supported_types.append(DeviceTensor)
    accelerator: Any = torch.accelerator
    accelerator.is_available = lambda: True
    accelerator.current_accelerator = lambda *_, **__: torch.device("cuda")
    accelerator.set_device_index = lambda *_: None
    accelerator.current_device_index = lambda: 0
    accelerator.device_count = lambda: 1


_install()


def to_gpu(module: Any) -> Any:
    """`module.to("cuda")` in place, ties of parameters kept."""
    made: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                if id(p) not in made:
                    moved = DeviceTensor(p.detach().clone(memory_format=torch.preserve_format))
                    made[id(p)] = torch.nn.Parameter(moved, requires_grad=p.requires_grad)
                part._parameters[name] = made[id(p)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = DeviceTensor(buffer.detach().clone())
    return module


def on_cpu(x: torch.Tensor) -> torch.Tensor:
    """The values of a tensor."""
    return x.inner if isinstance(x, DeviceTensor) else x.detach()


@contextlib.contextmanager
def counted() -> Iterator[Recorder]:
    """The device, and what happens on it."""
    with SimulatedGpu(), Recorder() as recorder:
        yield recorder


@pytest.fixture(autouse=True)
def plain_settings() -> None:
    """Kernels on, which a run may have switched off."""
    from coca_lit.models import kernels

    kernels.enable()
