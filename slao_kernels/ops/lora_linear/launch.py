"""What every launch of a Triton kernel here has to mind: the device, the operands' dtype, and where results land."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from . import device as kernels

INTERPRETED = bool(knobs.runtime.interpret)
COMPUTE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_REDUCE_BLOCK = 1024

last: Any = None  # the compiled kernel that was launched last, for the tuner: it tells its name and its spills


def launch(
    kernel: Any, grid: tuple[int, ...], x: Tensor, warps: int, stages: int, *arguments: Any, **constants: Any
) -> None:
    """Run `kernel` on x's device; its products' operands have x's dtype."""
    stages = min(stages, 2) if torch.version.hip else stages  # a third does not fit in 64 KB there
    compute = tl.float32 if INTERPRETED else COMPUTE[x.dtype]
    global last
    with _on(x):
        # Fused multiply-add, said out loud: its default differs between Triton's versions.
        last = kernel[grid](
            *arguments, **constants, COMPUTE=compute, num_warps=warps, num_stages=stages, enable_fp_fusion=True
        )


def _on(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be x's."""
    return torch.cuda.device_of(x) if x.is_cuda and x.device.index != torch.cuda.current_device() else nullcontext()


def landing(out: Tensor) -> Tensor:
    """Where a kernel writes `out`: itself, but fp32 for bf16 where Triton interprets (it truncates)."""
    rounds_badly = INTERPRETED and out.dtype == torch.bfloat16
    if out.is_contiguous() and not rounds_badly:
        return out
    return torch.empty(out.shape, dtype=torch.float32 if rounds_badly else out.dtype, device=out.device)


def parts_of(out: Tensor, parts: int) -> Tensor:
    """A workspace for the parts of the contiguous `out`; `out` itself where there is but one."""
    return out if parts == 1 else torch.empty((parts, *out.shape), dtype=torch.float32, device=out.device)


def gather(workspace: Tensor, landed: Tensor, out: Tensor) -> None:
    """out <- the sum of its parts, by way of `landed`."""
    if workspace is not landed:
        size = landed.numel()
        with _on(out):
            kernels.reduce_kernel[(-(-size // _REDUCE_BLOCK),)](workspace, landed, size, len(workspace), _REDUCE_BLOCK)
    if landed is not out:
        out.copy_(landed)
