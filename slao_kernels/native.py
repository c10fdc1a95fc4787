"""The compiled core: whether it can be used, and tables of raw pointers for it.

The operators have checked shapes, dtypes, devices and overlap (ops/checks.py) before anything here is called; this
module turns tensors into the records of csrc/tensor_table.h, passes torch's thread count or CUDA stream, and bumps the
version counters that a write behind torch's back would leave as they were. Importing it makes no CUDA call.
"""

from __future__ import annotations

import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch  # before the extension: its OpenMP runtime is then the one that both use
from torch import Tensor

ABI = 8
# Tensor cores for fp64, which the Gram matrices take, and the oldest that the binary holds code for.
_CAPABILITY = (8, 0)
_DRIVER = 12010  # CUDA 12.1
# The words of records, and which of a call's tensors each record is of.
Tables = tuple["array.array[int]", list[int]]
_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def _load() -> ModuleType | str:
    """The extension, or why there is none."""
    try:
        from . import _C  # type: ignore[attr-defined]
    except ImportError as error:
        if "_C" in str(error):
            return "the extension was not built (no C++ compiler at install, or SLAO_KERNELS_BUILD=0)"
        return f"the extension does not load: {error}"
    if _C.abi != ABI:
        return f"the extension is of another version (ABI {_C.abi}, expected {ABI}): install slao_kernels again"
    return _C


# Once and here, not at the first call: torch.compile, tracing into that, cannot follow an import that fails.
_LOADED = _load()


@cache
def _gpu() -> str | None:
    """Why the GPUs that torch sees cannot be served; None if they can."""
    if torch.version.hip is not None:
        return "the extension serves CUDA, not ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < _CAPABILITY:
            name = torch.cuda.get_device_name(index)
            return f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    return _driver(core().cuda_driver())


def why_not(device_type: str) -> str | None:
    """Why the compiled core cannot serve that kind of device; None if it can."""
    if device_type not in ("cpu", "cuda"):
        return "CPU and CUDA only"
    if isinstance(_LOADED, str):
        return _LOADED
    if device_type == "cpu":
        return None
    return _gpu() if _LOADED.cuda else "the extension was built without CUDA"


def _driver(version: int) -> str | None:
    """Why the kernels, whose parameters hold the tables, cannot be launched by a driver of that version."""
    if version >= _DRIVER:
        return None
    return f"the driver is CUDA {version // 1000}.{version % 1000 // 10}'s, the kernels need 12.1's (R530) or later"


def why_not_lora(device_type: str) -> str | None:
    """Why the compiled core, where there is one, has no rank-r products for `lora_linear`; None if it has."""
    if device_type != "cpu":
        return "the core's rank-r products are for CPUs"
    return (
        None
        if core().lora_rank
        else "the core has no rank-r products for this processor (it takes AVX-512 BF16 or AMX)"
    )


def core() -> ModuleType:
    """The extension module. RuntimeError with the reason when there is none."""
    if isinstance(_LOADED, str):
        raise RuntimeError(_LOADED)
    return _LOADED


def instruction_set() -> str:
    """The best that the CPU kernels use here: "amx", "avx512bf16", "avx512", "avx2", "base"; "" without the core."""
    return "" if isinstance(_LOADED, str) else str(_LOADED.best_isa())


@contextmanager
def launching(device: torch.device) -> Iterator[tuple[int, int]]:
    """Makes a CUDA device the current one; gives its index and the handle of torch's current stream on it."""
    with torch.cuda.device(device):
        yield torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


def matrix(tensor: Tensor) -> tuple[int, int, int, int, int, int]:
    """The record of a 2-D tensor."""
    (rows, cols), (row_stride, col_stride) = tensor.shape, tensor.stride()
    return tensor.data_ptr(), rows, cols, row_stride, col_stride, _CODES[tensor.dtype]


def row(tensor: Tensor) -> tuple[int, int, int, int, int, int]:
    """The record of a contiguous tensor of any shape, as one row; no view is made, a model has hundreds."""
    count = tensor.numel()
    return tensor.data_ptr(), 1, count, count, 1, _CODES[tensor.dtype]


def table(records: Iterable[tuple[int, ...]]) -> array.array[int]:
    """Records as one buffer of 64-bit integers."""
    return array.array("q", [word for record in records for word in record])


def pairs(target: Tensor, source: Tensor) -> Iterator[tuple[int, ...]]:
    """Two tensors of one shape and any strides as records of two matrices each, as few as the strides allow."""
    if target.is_contiguous() and source.is_contiguous():
        yield row(target) + row(source)
    elif target.dim() == 1:
        yield matrix(target[None]) + matrix(source[None])
    elif target.dim() == 2:
        flip = target.stride(0) < target.stride(1)
        yield matrix(target.t()) + matrix(source.t()) if flip else matrix(target) + matrix(source)
    else:
        for part, other in zip(target.unbind(0), source.unbind(0), strict=True):
            yield from pairs(part, other)


def numbered(tables: Tables, numbers: Sequence[float]) -> tuple[array.array[int], array.array[float]]:
    """The words of `tables`, and for each record the number of the tensor that it is of."""
    words, owners = tables
    return words, array.array("d", [numbers[owner] for owner in owners])


def run(op: str, changed: Sequence[Tensor], tables: Tables, numbers: Sequence[float]) -> None:
    """The core's kernel of that name over records with a number each: on a CPU with torch's threads; on a GPU one
    launch for each few hundred records (and precision), of which nothing is waited for."""
    if changed and changed[0].is_cuda:
        with launching(changed[0].device) as (device, stream):
            getattr(core(), f"cuda_{op}")(*numbered(tables, numbers), device, stream)
    else:
        getattr(core(), op)(*numbered(tables, numbers), torch.get_num_threads(), "auto")
    written(changed)


def written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that these were changed."""
    torch.autograd.graph.increment_version(list(tensors))
