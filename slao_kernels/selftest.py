"""Every kernel on this machine against fp64: each op, on each backend that serves it here, in each dtype.

The formulas are written out here and run in fp64 on the CPU, so that nothing that is checked checks itself. Inputs and
bounds are those of the tests; testing.py has the reasons of the bounds.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import dispatch
from .environment import devices
from .ops.exact_fold import Kept, unfold_
from .ops.expert_linear import expert_linear
from .ops.fold import fold_
from .ops.lora_linear import lora_linear
from .ops.orthogonal_init import orthogonal_init_
from .ops.scaled_merge import scaled_merge_
from .testing import ONCE, STORAGE, TOLERANCE, error_ratio

# fp32 first: where Triton has to compile its kernels and the time runs out, each has been met in one dtype.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SECONDS = 8.0  # after which no check is begun, so that all ends within ten where no kernel has to be compiled
_SCALING = 0.7
_R = 16


@dataclass(frozen=True)
class Check:
    """One op on one backend in one dtype. result: the one of its results that is nearest to its bound. error: its
    distance from fp64, RMS(x - ref) / RMS(ref) unless `result` says otherwise. bound: what that may be. problem: why
    there is no error: the kernel raised, or was not run."""

    op: str
    backend: str
    device: str
    dtype: str
    result: str = ""
    error: float = math.nan
    bound: float = math.nan
    problem: str | None = None
    run: bool = True

    @property
    def part(self) -> float:
        """How much of its bound the error takes."""
        return _part(self.error, self.bound)

    @property
    def passed(self) -> bool:
        """Whether it is not known to be wrong: a check that was not run passes, and says that it was not."""
        return not self.run or (self.problem is None and self.error <= self.bound)


Results = dict[str, tuple[float, float]]  # name -> (error, bound)
Draw = Callable[..., Tensor]


def checks(seconds: float = SECONDS) -> Iterator[Check]:
    """Check after check, as they are made; those that `seconds` leave no time for are named, not run."""
    end = time.monotonic() + seconds
    for dtype, device, op in itertools.product(DTYPES, devices(), _MEASURED):
        for backend in dispatch.BACKENDS[1:]:
            if dispatch.why_not(op, backend, device) is None:
                where = op, backend, device, str(dtype).removeprefix("torch.")
                if time.monotonic() < end:
                    yield _checked(where, dtype)
                else:
                    yield Check(*where, problem=f"not run: {seconds:.0f} s were over", run=False)


def _checked(where: tuple[str, str, str, str], dtype: torch.dtype) -> Check:
    op, backend, device, _ = where
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(size, generator=generator, dtype=torch.float64) * scale
        return drawn.to(dtype).to(device)

    try:
        results = _MEASURED[op](draw, dtype, backend)
    except Exception as error:
        return Check(*where, problem=f"{type(error).__name__}: {' '.join(str(error).split())}")
    worst = max(results, key=lambda name: _part(*results[name]))
    return Check(*where, worst, *results[worst])


def _part(error: float, bound: float) -> float:
    """How much of its bound an error takes; NaN is the worst."""
    if math.isnan(error):
        return math.inf
    return error / bound if bound else error * math.inf if error else 0.0


def _compared(found: dict[str, Tensor], exact: dict[str, Tensor], bound: float) -> Results:
    return {name: (error_ratio(found[name].cpu(), value), bound) for name, value in exact.items()}


def _exactly(tensors: dict[str, Tensor], trained: tuple[str, ...], formula: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The formula's y, and the gradients of what is trained, in fp64 on the CPU."""
    return _run({name: value.cpu().double() for name, value in tensors.items()}, trained, formula)


def _run(tensors: dict[str, Tensor], trained: tuple[str, ...], op: Callable[..., Tensor]) -> dict[str, Tensor]:
    leaves = {n: value.detach().clone().requires_grad_(n in trained) for n, value in tensors.items() if n != "dy"}
    with torch.enable_grad():
        y = op(**leaves)
        grads = torch.autograd.grad(y, [leaves[name] for name in trained], tensors["dy"])
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(trained, grads, strict=True)}


def _lora_linear(draw: Draw, dtype: torch.dtype, backend: str) -> Results:
    rows, k, n = 130, 96, 80
    tensors = {
        "x": draw(rows, k),
        "weight": draw(n, k, scale=k**-0.5),
        "bias": draw(n),
        "A": draw(_R, k, scale=k**-0.5),
        "B": draw(n, _R, scale=_R**-0.5 / 3),
        "dy": draw(rows, n),
    }
    trained = "x", "weight", "bias", "A", "B"
    found = _run(tensors, trained, lambda **t: lora_linear(**t, scaling=_SCALING, backend=backend))
    exact = _exactly(tensors, trained, lambda x, weight, bias, A, B: x @ weight.T + bias + _SCALING * (x @ A.T @ B.T))
    return _compared(found, exact, TOLERANCE[dtype])


def _expert_linear(draw: Draw, dtype: torch.dtype, backend: str) -> Results:
    counts, k, n = (20, 0, 44), 64, 48
    ends = torch.tensor(counts).cumsum(0).int()
    tensors = {
        "x": draw(sum(counts), k),
        "weight": draw(len(counts), n, k, scale=k**-0.5),
        "A": draw(len(counts), _R, k, scale=k**-0.5),
        "B": draw(len(counts), n, _R, scale=_R**-0.5 / 3),
        "dy": draw(sum(counts), n),
    }
    trained = "x", "A", "B"
    there = ends.to(tensors["x"].device)

    def exactly(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        rows = x.split(counts)
        return torch.cat([x @ W.T + _SCALING * (x @ a.T @ b.T) for x, W, a, b in zip(rows, weight, A, B, strict=True)])

    found = _run(tensors, trained, lambda **t: expert_linear(**t, scaling=_SCALING, ends=there, backend=backend))
    return _compared(found, _exactly(tensors, trained, exactly), TOLERANCE[dtype])


def _orthogonal_init(draw: Draw, dtype: torch.dtype, backend: str) -> Results:
    """Aᵀ = Q R by LAPACK with diag(R) > 0, as entries (of a Gaussian A, whose rows are nearly orthogonal); and that the
    rows are orthonormal."""
    A = draw(_R, 768)
    Q, R = torch.linalg.qr(A.cpu().double().T)
    exact = (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).T
    orthogonal_init_([A], backend=backend).check()
    found = A.cpu().double()
    apart = torch.linalg.matrix_norm(found @ found.T - torch.eye(_R, dtype=torch.float64), 2).item()
    entries = (1e-12 if dtype == torch.float64 else 1e-5) + torch.finfo(dtype).eps
    return {
        "|A A^T - I|": (apart, STORAGE[dtype] * math.sqrt(_R)),
        "max |A - Q|": ((found - exact).abs().max().item(), entries),
    }


def _scaled_merge(draw: Draw, dtype: torch.dtype, backend: str) -> Results:
    merged, tuned, lam = draw(300, 200), draw(300, 200), 0.5**0.5
    exact = merged.cpu().double() + lam * (tuned.cpu().double() - merged.cpu().double())
    scaled_merge_([merged], [tuned], lam, backend=backend)
    return _compared({"merged": merged}, {"merged": exact}, ONCE[dtype])


def _deltas(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, A, B, and W + s B A in fp64."""
    n, k = 100, 200
    W, A, B = draw(n, k), draw(_R, k), draw(n, _R, scale=_R**-0.5)
    return W, A, B, W.cpu().double() + _SCALING * B.cpu().double() @ A.cpu().double()


def _fold(draw: Draw, dtype: torch.dtype, backend: str) -> Results:
    W, A, B, exact = _deltas(draw)
    fold_([W], [A], [B], _SCALING, backend=backend)
    return _compared({"W": W}, {"W": exact}, ONCE[dtype])


def _exact_fold(draw: Draw, dtype: torch.dtype, backend: str) -> Results:
    """The fold, whose delta is rounded by itself (one rounding more), and the bits of W after the way back."""
    W, A, B, exact = _deltas(draw)
    before, keep = W.clone(), Kept()
    fold_([W], [A], [B], _SCALING, keep=keep, backend=backend)
    folded = _compared({"W": W}, {"W": exact}, 2 * ONCE[dtype])
    unfold_([W], keep)
    changed = (W.view(torch.uint8) != before.view(torch.uint8)).sum().item()
    return folded | {"bytes changed": (float(changed), 0.0)}


_MEASURED: dict[str, Callable[[Draw, torch.dtype, str], Results]] = {
    "lora_linear": _lora_linear,
    "expert_linear": _expert_linear,
    "orthogonal_init": _orthogonal_init,
    "scaled_merge": _scaled_merge,
    "fold": _fold,
    "exact_fold": _exact_fold,
}
