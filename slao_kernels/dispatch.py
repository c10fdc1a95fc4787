"""Which implementation an op takes on a device, and why not another.

A backend is a module of an op's folder: `slao_kernels.ops.<op>.<module>`. All modules of one op offer the same
functions, so whoever asks gets a module back and calls it. The choice is made from the device alone, never from
the data; an explicit wish (`use_backend`, the SLAO_KERNELS_BACKEND variable, `patch(backend=...)`) that cannot
be met is an error, never a silent fallback.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

# backend -> module in the op's folder
_MODULES = {"reference": "reference", "eager": "products", "native": "native", "triton": "kernels"}
# Those of lora_linear, whose compiled core is for CPUs alone.
_LORA_MODULES = {**_MODULES, "native": "cpu", "triton": "triton"}

# Per op: the backends it has, best first. What a device cannot take is sorted out by `why_not`.
_PREFERENCE: dict[str, tuple[str, ...]] = {
    # "eager": one autograd node around torch's own GEMMs (cuBLAS, oneDNN, MKL); torch runs wherever we do. "native":
    # the same with the rank-r products of csrc/cpu/lora_linear.cpp in bf16, faster from 32 tokens up
    # (bench/bench_lora_linear.py); in fp32, where it won 13 of 32 rows, torch's serve.
    # "triton" computes its rank-r products in one pass over x and dy each. Nothing of it has been timed on a GPU yet,
    # so it has to be asked for.
    "lora_linear": ("native", "eager", "triton", "reference"),
    # The same, for a mixture's experts: "eager" is torch's grouped GEMM on a GPU, a loop over the experts elsewhere.
    "expert_linear": ("eager", "triton", "reference"),
    # Of these three "native" is C++ or CUDA and "triton" needs no build: the choice on ROCm and wherever the CUDA build
    # is missing. That "native" comes first is not measured: neither has been timed on a GPU yet.
    "orthogonal_init": ("native", "triton", "reference"),
    "scaled_merge": ("native", "triton", "reference"),
    "fold": ("native", "triton", "reference"),
    # fold_(keep=) and unfold_; the compiled core's is for CPUs.
    "exact_fold": ("native", "triton", "reference"),
}

OPS = tuple(_PREFERENCE)
BACKENDS = ("auto", *_MODULES)

# Plain module state, so that torch.compile can trace the choice and guard on it.
_forced: str | None = None
_environment: str = os.environ.get("SLAO_KERNELS_BACKEND", "auto")
_triton_installed: bool = importlib.util.find_spec("triton") is not None
_triton_interprets: bool = os.environ.get("TRITON_INTERPRET") == "1"


def check_backend(name: str) -> str:
    """`name` if it is a backend, else a ValueError that lists the valid ones."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op takes the backend `name` ("auto" lifts an outer wish).

    Raises ValueError for an unknown name at once, and when an op is called that the backend does not have.
    The wish holds for the whole process.
    """
    global _forced
    before, _forced = _forced, check_backend(name)
    try:
        yield
    finally:
        _forced = before


def why_not(op: str, backend: str, device_type: str) -> str | None:
    """Why `backend` cannot serve `op` on that kind of device; None if it can."""
    if backend not in _PREFERENCE[op]:
        return "this version has no such implementation"
    if backend == "native":
        from . import native

        if op == "exact_fold" and device_type != "cpu":
            return "the core's exact fold is for CPUs"
        return native.why_not(device_type) or (native.why_not_lora(device_type) if op == "lora_linear" else None)
    if backend == "triton":
        if not _triton_installed:
            return "triton is not installed"
        if device_type != "cuda" and not (device_type == "cpu" and _triton_interprets):
            return "Triton has no such device (on CPU tensors only under TRITON_INTERPRET=1, for tests)"
        if op == "orthogonal_init" and device_type == "cuda":
            return _no_fp64_products()
    return None


@cache
def _no_fp64_products() -> str | None:
    """Triton 3.6 and 3.7 cannot compile the init's fp64 products for gfx942 and sm_100; for sm_80 and sm_90 they do."""
    try:
        version = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None  # a build of another name or numbering: its compiler says what it cannot do
    newer = torch.version.hip is not None or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10,))
    if version >= (3, 8) or not newer:
        return None
    return f"Triton {version[0]}.{version[1]} does not compile its fp64 products for this GPU; 3.8 does"


@cache
def cpu_computes(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit dtype by instructions for it, as oneDNN finds; without them
    torch takes several times as long as over fp32. Other dtypes: yes."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return asked is None or (torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, asked)()))


def forced() -> str | None:
    """The backend of the innermost `use_backend`, if there is one."""
    return _forced


def wished() -> str:
    """The backend that `use_backend`, or else SLAO_KERNELS_BACKEND, asks for; "auto" where neither does."""
    return _forced or _environment


def choose(op: str, device_type: str, wish: str = "auto") -> str:
    """The name of the backend that `op` takes on `device_type` now.

    `use_backend` wins over `wish` (a layer's own), that over SLAO_KERNELS_BACKEND, which is read once, when the package
    is imported. Raises ValueError when an explicit wish cannot be met, with the reason and what could.
    """
    if _forced is not None:
        wish = _forced
    elif wish != "auto":
        check_backend(wish)
    elif _environment in BACKENDS:
        wish = _environment
    else:
        raise ValueError(f"SLAO_KERNELS_BACKEND={_environment!r} is not a backend; choose one of {', '.join(BACKENDS)}")
    available = _available(op, device_type)
    if wish == "auto":
        return available[0]
    if wish == "eager" and wish not in _PREFERENCE[op]:
        # Only LoRA layers tell torch's calls in a good order from torch's calls in the plain one.
        wish = "reference"
    elif wish == "native" and wish not in _PREFERENCE[op]:
        wish = "eager"  # experts, for which the core has nothing, beside layers for which it has
    if wish not in available:
        reason = why_not(op, wish, device_type)
        raise ValueError(
            f"backend {wish!r} cannot run {op} on {device_type}: {reason}; available here: {', '.join(available)}"
        )
    return wish


def direct() -> bool:
    """Whether an operator's function may be called as it is: torch's dispatcher costs microseconds, and is needed
    only by what looks on (torch.compile, torch.jit.trace, dispatch modes such as a FakeTensor's or a profiler's).
    """
    compiling = torch.compiler.is_compiling()
    return not (compiling or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None)


@cache
def _available(op: str, device_type: str) -> tuple[str, ...]:
    """The backends that can serve `op` there, best first. What is installed does not change while a process runs.

    On a CPU Triton only interprets, for tests: the last choice.
    """
    found = [name for name in _PREFERENCE[op] if why_not(op, name, device_type) is None]
    return tuple(sorted(found, key=lambda name: name == "triton" and device_type == "cpu"))


@cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module that implements `op` for `backend` (imported when first asked for)."""
    module = (_LORA_MODULES if op == "lora_linear" else _MODULES)[backend]
    return importlib.import_module(f".ops.{op}.{module}", __package__)
