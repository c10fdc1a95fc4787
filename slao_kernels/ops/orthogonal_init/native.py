"""orthogonal_init_ in the compiled core: Cholesky QR of all matrices at once, something safer for the few it flags."""

from __future__ import annotations

import array
import logging
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ... import native
from . import reference

logger = logging.getLogger("slao_kernels")

_DONE, _NOT_FINITE, _FLAGGED = 0, 2, 3


def orthogonal_init_(
    As: list[Tensor],
    r: list[Tensor],
    status: Tensor,
    prepared: array.array[int] | None = None,
    keep: Sequence[Tensor] = (),
) -> None:
    """As `reference.orthogonal_init_`; see csrc/cpu/orthogonal_init.cpp and csrc/cuda/orthogonal_init.cu.

    prepared: `tables` of As, which the caller has kept. keep (on a CPU only): tensors like As, which receive them as
    they were, in the pass that overwrites them.
    """
    core, table = native.core(), tables(As) if prepared is None else prepared
    if As and As[0].is_cuda:
        if max(A.shape[0] for A in As) > core.cuda_max_rank:
            # One CTA's Cholesky of so many rows would take seconds.
            logger.warning(
                "orthogonal_init_: a matrix has more than %d rows; this call runs on torch.linalg.qr instead of the "
                "CUDA kernels",
                core.cuda_max_rank,
            )
            reference.orthogonal_init_(As, r, status)
            return
        with native.launching(As[0].device) as (device, stream):
            on_gpu(core, table, r, status, device, stream)
        native.written(As)  # whether or not the device finds a NaN; nobody has waited to know
        return
    states = array.array("i", [0]) * len(As)
    triangles = native.table(map(native.matrix, r))
    kept = native.table(map(native.matrix, keep))
    finite = core.orthogonal_init(table, triangles, kept, states, torch.get_num_threads(), "auto")
    if not finite:
        # A matrix that was only flagged is as unwritten as all the others.
        status.copy_(torch.tensor([_NOT_FINITE if state == _NOT_FINITE else _DONE for state in states]))
        return
    native.written([*As, *keep])
    flagged = [index for index, state in enumerate(states) if state == _FLAGGED]
    status.copy_(torch.tensor(states))
    if flagged:
        found = torch.empty(len(flagged), dtype=torch.int32)
        reference.orthogonal_init_([As[i] for i in flagged], [r[i] for i in flagged] if r else [], found)
        status[flagged] = found


def tables(As: list[Tensor]) -> array.array[int]:
    """The records of csrc/tensor_table.h."""
    return native.table(map(native.matrix, As))


def on_gpu(
    core: ModuleType, table: array.array[int], r: list[Tensor], status: Tensor, device: int, stream: int
) -> None:
    """Four launches for each few hundred matrices; what they find out stays in `status`, nothing is waited for."""
    triangles = native.table(map(native.matrix, r))
    # From torch's allocator on the current stream: capturable, and free for reuse behind the last launch.
    workspace = torch.empty(core.cuda_orthogonal_init_workspace(table), dtype=torch.uint8, device=status.device)
    states = status if status.is_contiguous() else torch.empty_like(status, memory_format=torch.contiguous_format)
    core.cuda_orthogonal_init(table, triangles, states.data_ptr(), workspace.data_ptr(), device, stream)
    if states is not status:
        status.copy_(states)
