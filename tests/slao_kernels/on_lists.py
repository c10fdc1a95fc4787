"""The three ops on lists of tensors, orthogonal_init_, scaled_merge_ and fold_, by one face wherever they run.

`at(PUBLIC, CORES, EMULATED, GPU)` runs a test there: it takes `ops` (a fixture of ops/conftest.py) and calls
`ops.init`, `ops.merge` and `ops.fold` on tensors of the CPU, which are written in place.
"""

from __future__ import annotations

import array
import math
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import slao_kernels
from slao_kernels import dispatch, native
from slao_kernels.ops.fold import native as native_fold
from slao_kernels.ops.scaled_merge import native as native_merge
from slao_kernels.testing import ONCE, STORAGE  # noqa: F401 (the tests on lists take them from here)

DTYPES, INTERPRETED = oracle.DTYPES, oracle.INTERPRETED
FINE, COMPLETED, NOT_FINITE = 0, 1, 2


class Public:
    """The public functions on a backend; where that is on a GPU, on copies there, which are copied back."""

    def __init__(self, backend: str, device: str = "cpu") -> None:
        self.backend, self.device = backend, device

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend} on a GPU"

    def why_not(self) -> str | None:
        reasons = [
            dispatch.why_not(op, self.backend, self.device) for op in ("orthogonal_init", "scaled_merge", "fold")
        ]
        return next((reason for reason in reasons if reason is not None), None)

    def _run(self, call: Callable[..., Any], written: Sequence[Tensor], *read: Sequence[Tensor]) -> Any:
        if self.device == "cpu":
            return call(written, *read)
        there = [[tensor.to(self.device) for tensor in tensors] for tensors in (written, *read)]
        found = call(*there)
        for tensor, its in zip(written, there[0], strict=True):
            tensor.copy_(its)
        return found

    def init(self, As: Sequence[Tensor], triangles: bool = False) -> tuple[list[int], list[Tensor]]:
        """The states, and R of each; of matrices that are not all finite no R."""

        def call(As: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
            try:  # a GPU's report does not wait until it is read
                report = slao_kernels.orthogonal_init_(As, return_r=triangles, backend=self.backend)
                return [int(i in report.deficient) for i in range(len(As))], [R.cpu() for R in report.r or ()]
            except ValueError as error:
                offenders, said, _ = str(error).partition("Nothing was written")
            bad = {int(i) for i in re.findall(r"As\[(\d+)\]: has NaN or infinite", offenders)} if said else set()
            return [NOT_FINITE if i in bad else FINE for i in range(len(As))], []

        return self._run(call, As)

    def merge(self, merged: Sequence[Tensor], tuned: Sequence[Tensor], lam: list[float]) -> None:
        self._run(lambda m, t: slao_kernels.scaled_merge_(m, t, lam, backend=self.backend), merged, tuned)

    def fold(self, Ws: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: list[float]) -> None:
        self._run(lambda W, A, B: slao_kernels.fold_(W, A, B, scalings, backend=self.backend), Ws, As, Bs)


class Core:
    """The compiled core with one instruction set, on one thread; what it leaves to Householder stays as it is."""

    SETS = ("base", "avx2", "avx512")  # and more for lora_linear alone
    FLAGGED = 3

    def __init__(self, isa: str) -> None:
        self.isa = isa

    def __str__(self) -> str:
        return self.isa

    def why_not(self) -> str | None:
        missing = native.why_not("cpu")
        if missing is not None:
            return f"no compiled core: {missing}"
        best = native.instruction_set()
        known = self.isa == "auto" or best not in self.SETS or self.SETS.index(self.isa) <= self.SETS.index(best)
        return None if known else f"this processor has {best}, not {self.isa}"

    def init(self, As: Sequence[Tensor], triangles: bool = False) -> tuple[list[int], list[Tensor]]:
        states, Rs = array.array("i", [0]) * len(As), triangles_for(As) if triangles else []
        tables = [native.table(map(native.matrix, tensors)) for tensors in (As, Rs, ())]
        native.core().orthogonal_init(*tables, states, 1, self.isa)
        return list(states), Rs

    def merge(self, merged: Sequence[Tensor], tuned: Sequence[Tensor], lam: list[float]) -> None:
        found = native.numbered(native_merge.tables(list(merged), list(tuned)), lam)
        native.core().scaled_merge(*found, 1, self.isa)

    def fold(self, Ws: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: list[float]) -> None:
        found = native.numbered(native_fold.tables(list(Ws), list(As), list(Bs)), scalings)
        native.core().fold(*found, 1, self.isa)


class Emulated:
    """csrc/cuda on the CPU (the fixture `emulated`)."""

    core: ModuleType

    def __str__(self) -> str:
        return "emulated"

    def init(self, As: Sequence[Tensor], triangles: bool = False) -> tuple[list[int], list[Tensor]]:
        """The workspace holds garbage before, and nothing is written behind it."""
        Rs = triangles_for(As) if triangles else []
        table, of_r = native.table(map(native.matrix, As)), native.table(map(native.matrix, Rs))
        size = self.core.cuda_orthogonal_init_workspace(table)
        whole = torch.full((size + 512,), 0xFF, dtype=torch.uint8)
        start = -whole.data_ptr() % 256
        states = torch.full((len(As),), 77, dtype=torch.int32)
        self.core.cuda_orthogonal_init(table, of_r, states.data_ptr(), whole.data_ptr() + start, 0, 0)
        assert (whole[start + size :] == 0xFF).all()
        return states.tolist(), Rs

    def merge(self, merged: Sequence[Tensor], tuned: Sequence[Tensor], lam: list[float]) -> None:
        self.core.cuda_scaled_merge(*native.numbered(native_merge.tables(list(merged), list(tuned)), lam), 0, 0)

    def fold(self, Ws: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: list[float]) -> None:
        self.core.cuda_fold(*native.numbered(native_fold.tables(list(Ws), list(As), list(Bs)), scalings), 0, 0)


class Seen(TorchDispatchMode):
    """The operators that are called, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


# In the process where Triton interprets, the others have had their turn.
PUBLIC: list[Any] = [Public("triton")] if INTERPRETED else [Public("native"), Public("reference")]
CORES: list[Any] = [] if INTERPRETED else [Core(isa) for isa in Core.SETS]
EMULATED: list[Any] = [] if INTERPRETED else [Emulated()]
GPU = (
    []
    if INTERPRETED
    else [pytest.param(p, marks=pytest.mark.gpu, id=str(p)) for p in map(Public, ("native", "triton"), ("cuda",) * 2)]
)


def at(*groups: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("ops", [place for group in groups for place in group], indirect=True, ids=str)


def triangles_for(As: Sequence[Tensor]) -> list[Tensor]:
    dtypes = [torch.float64 if A.dtype == torch.float64 else torch.float32 for A in As]
    return [torch.full((len(A), len(A)), math.nan, dtype=dtype) for A, dtype in zip(As, dtypes, strict=True)]


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().reshape(-1).view(torch.uint8)


def orthogonality(A: Tensor) -> float:
    """‖A Aᵀ − I‖₂."""
    wide = A.detach().cpu().double()
    return torch.linalg.matrix_norm(wide @ wide.T - torch.eye(wide.shape[0], dtype=torch.float64), 2).item()


def exact_qr(A: Tensor) -> tuple[Tensor, Tensor]:
    """(Qᵀ, R) of Aᵀ = Q R with diag(R) > 0, in fp64, by LAPACK."""
    Q, R = torch.linalg.qr(A.detach().double().T)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * sign).T, R * sign[:, None]


def orthonormal(r: int, n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, r, dtype=torch.float64)).Q.T


def conditioned(r: int, n: int, kappa: float) -> Tensor:
    """(r, n) in fp64 with singular values from 1 down to 1/kappa, spread evenly in the exponent."""
    sizes = torch.logspace(0, -math.log10(kappa), r, dtype=torch.float64)
    return orthonormal(r, r) @ torch.diag(sizes) @ orthonormal(r, n)
