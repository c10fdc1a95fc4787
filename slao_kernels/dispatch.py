"""Which implementation an op takes on a device, and why not another.

A backend is a module of an op's folder: `slao_kernels.ops.<op>.<module>`. All modules of one op offer the same
functions, so whoever asks gets a module back and calls it. The choice is made from the device alone, never from
the data; an explicit wish (`use_backend`, the SLAO_KERNELS_BACKEND variable, `patch(backend=...)`) that cannot
be met is an error, never a silent fallback.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

# backend -> module in the op's folder
_MODULES = {"reference": "reference", "eager": "eager", "native": "native", "triton": "kernels"}

# Per op: the backends it has, best first. What a device cannot take is sorted out by `why_not`.
_PREFERENCE: dict[str, tuple[str, ...]] = {
    # "eager": one autograd node around torch's own GEMMs (cuBLAS, oneDNN, MKL); torch runs wherever we do.
    "lora_linear": ("eager", "reference"),
    "orthogonal_init": ("reference",),
    "scaled_merge": ("reference",),
    "fold": ("reference",),
}

OPS = tuple(_PREFERENCE)
BACKENDS = ("auto", *_MODULES)

_forced: ContextVar[str | None] = ContextVar("slao_kernels_backend", default=None)


def check_backend(name: str) -> str:
    """`name` if it is a backend, else a ValueError that lists the valid ones."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op takes the backend `name` ("auto" lifts an outer wish).

    Raises ValueError for an unknown name at once, and when an op is called that the backend does not have.
    The wish holds in this thread (or asyncio task) only.
    """
    token = _forced.set(check_backend(name))
    try:
        yield
    finally:
        _forced.reset(token)


def why_not(op: str, backend: str, device_type: str) -> str | None:
    """Why `backend` cannot serve `op` on that kind of device; None if it can."""
    if backend not in _PREFERENCE[op]:
        return "this version has no such implementation"
    return None


def requested(wish: str = "auto") -> str:
    """The backend asked for: `use_backend` wins over `wish` (a layer's own), that over SLAO_KERNELS_BACKEND."""
    forced = _forced.get()
    if forced is not None:
        return forced
    if wish != "auto":
        return check_backend(wish)
    environment = os.environ.get("SLAO_KERNELS_BACKEND")
    if environment is None:
        return "auto"
    if environment not in BACKENDS:
        raise ValueError(f"SLAO_KERNELS_BACKEND={environment!r} is not a backend; choose one of {', '.join(BACKENDS)}")
    return environment


@cache
def _choose(op: str, device_type: str, wish: str) -> str:
    if wish != "auto":
        reason = why_not(op, wish, device_type)
        # "eager" is lora_linear's name for what the other ops call "reference": plain torch calls. Asking a
        # whole model for it must not fail on ops that never had the distinction.
        if reason is not None and wish == "eager":
            return "reference"
        if reason is not None:
            valid = [name for name in _PREFERENCE[op] if why_not(op, name, device_type) is None]
            raise ValueError(
                f"backend {wish!r} cannot run {op} on {device_type}: {reason}; available here: {', '.join(valid)}"
            )
        return wish
    for backend in _PREFERENCE[op]:
        if why_not(op, backend, device_type) is None:
            return backend
    raise RuntimeError(f"no backend for {op} on {device_type}")  # "reference" serves every device


def choose(op: str, device_type: str, wish: str = "auto") -> str:
    """The name of the backend that `op` takes on `device_type` now."""
    return _choose(op, device_type, requested(wish))


@cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module that implements `op` for `backend` (imported when first asked for)."""
    return importlib.import_module(f".ops.{op}.{_MODULES[backend]}", __package__)
