"""Each rank-r product of lora_linear alone: Triton's kernels on a GPU, the compiled core's on a CPU, and torch's own.

Two roofs, measured in the same run: a copy of a large tensor (bytes read and written), and a bare GEMM of the same
dtype. A product's bytes are each input once and each output once, its FLOPs those of the matrix product; so a kernel
that reads something twice is further from the roof, not nearer. `% roof` is the time that the nearer of the roofs
would allow over the time taken. On a GPU all calls of a lap are one CUDA graph: the host's time is not in it.

"torch" is the GEMM of products.py; of "dropped" that GEMM and one multiplication by a mask that is already there,
which is less than dropout costs; of "reduce" a sum over the first dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from race import Check, capped, checker, clock, graphed, interleave, machine
from torch import Tensor

from slao_kernels import dispatch
from slao_kernels.ops.lora_linear.products import TorchProducts
from slao_kernels.ops.operators import products_of
from slao_kernels.testing import TOLERANCE, error_ratio

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIZES = {"1024x384": ("cpu", 1024, 384), "2048x4096": ("cpu", 2048, 4096), "8192x4096": ("cuda", 8192, 4096)}
RANKS = [8, 16, 48, 64]  # 48: q, k and v of rank 16, stacked
P, SCALING, TORCH = 0.1, 0.7, TorchProducts()
ROW_BLOCKS = 128  # parts of a sum over 8192 tokens, 64 at a time

# A lap goes through so many bytes, so that nothing is still in the cache nearest to the arithmetic when it is read
# again (a GPU's L2 holds about 50 MB, a CPU core's 2).
ROTATED = {"cpu": 64 << 20, "cuda": 512 << 20}
GEMM = {"cpu": (2048, 4096, 4096), "cuda": (8192, 8192, 8192)}
COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}

Tensors = dict[str, Tensor]
# What each product reads: x (M, K), t (M, r), A (r, K), B (K, r).
READ = {"shrink": "x A", "expand": "t A", "outer": "t x", "grad_t": "x t B"}


def shrink(p: TorchProducts, s: Tensors) -> list[Tensor]:
    return [p.shrink(s["x"], s["A"])]


def expand(p: TorchProducts, s: Tensors) -> list[Tensor]:
    return [p.grad_source(s["t"], s["A"])]


def outer(p: TorchProducts, s: Tensors) -> list[Tensor]:
    return [p.grad_A(s["t"], s["x"])]


def grad_t(p: TorchProducts, s: Tensors) -> list[Tensor]:
    g, dB = p.grad_t(s["x"], s["t"], s["B"], SCALING, True, True)
    assert g is not None
    assert dB is not None
    return [g, dB]


PRODUCTS = {"shrink": shrink, "expand": expand, "outer": outer, "grad_t": grad_t}


def draw(product: str, m: int, k: int, r: int, dtype: torch.dtype, device: str) -> list[Tensors]:
    """As many sets of what a product reads as a lap goes through."""
    shapes = {"x": (m, k), "t": (m, r), "A": (r, k), "B": (k, r)}
    sets = max(2, -(-ROTATED[device] // (m * k * dtype.itemsize)))
    names = READ[product].split()
    return [{name: torch.randn(shapes[name], device=device).to(dtype) for name in names} for _ in range(sets)]


def bytes_of(read: Tensors, written: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in (*read.values(), *written))


@cache
def roofs(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes/s of a copy, FLOP/s of a bare GEMM), each the best of seven laps."""
    source = torch.randn(COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    m, n, k = GEMM[device]
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
    product = torch.empty(m, n, device=device, dtype=dtype)
    seconds = []
    for call in (lambda: target.copy_(source), lambda: torch.mm(a, b, out=product)):
        one = clock(call, device)
        seconds.append(min(clock(call, device) for _ in range(capped(7, one, device))))
    return 2 * source.nbytes / seconds[0], 2 * m * n * k / seconds[1]


def figures(us: float, torchs: float, moved: int, flops: int, copy: float, gemm: float) -> dict[str, float]:
    """The row of one product: us and torchs in seconds, the roofs in bytes/s and FLOP/s."""
    return {
        "us": us * 1e6,
        "torch us": torchs * 1e6,
        "torch / ours": torchs / us,
        "GB/s": moved / us / 1e9,
        "% copy": 100 * moved / us / copy,
        "TFLOP/s": flops / us / 1e12,
        "% GEMM": 100 * flops / us / gemm,
        "% roof": 100 * max(moved / copy, flops / gemm) / us,
    }


def measure(
    benchmark: Any,
    ours: list[Callable[[], object]],
    torchs: list[Callable[[], object]],
    moved: int,
    flops: int,
    dtype: str,
    device: str,
) -> None:
    """Both sides make a call for each set of tensors; the figures of one call go into extra_info."""

    def lap(calls: list[Callable[[], object]]) -> Callable[[], object]:
        together = lambda: [call() for call in calls] and None  # noqa: E731
        return graphed(together) if device == "cuda" else together

    (times,) = interleave(benchmark, {"torch": lap(torchs), "ours": lap(ours)}, device, rounds=11)
    copy, gemm = roofs(device, DTYPES[dtype])
    row = figures(times["ours"] / len(ours), times["torch"] / len(torchs), moved, flops, copy, gemm)
    benchmark.extra_info |= {"rows": [row], "bytes": moved, "FLOPs": flops, **machine(device)}
    benchmark.extra_info |= {"ours_ms": row["us"] / 1e3, "copy GB/s": copy / 1e9, "GEMM TFLOP/s": gemm / 1e12}


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("product", list(PRODUCTS))
def test_product(product: str, size: str, dtype: str, r: int, benchmark: Any, device: str) -> None:
    where, m, k = SIZES[size]
    backend = "triton" if device == "cuda" else "native"
    if where != device:
        pytest.skip("a size for the other kind of device")
    if product == "expand" and device == "cuda":
        pytest.skip("torch's own there")
    if missing := dispatch.why_not("lora_linear", backend, device):
        pytest.skip(missing)
    if dtype == "fp32" and device == "cpu":
        pytest.skip("torch's own there: the core has loops over bf16 alone")
    run, theirs, sets = PRODUCTS[product], products_of(backend), draw(product, m, k, r, DTYPES[dtype], device)
    exact = run(TORCH, {name: tensor.double() for name, tensor in sets[0].items()})
    found = run(theirs, sets[0])
    agree(found, exact, DTYPES[dtype], checker(benchmark, device))
    ours, torchs = ([lambda s=s, p=p: run(p, s) for s in sets] for p in (theirs, TORCH))
    flops = (4 if product == "grad_t" else 2) * m * k * r
    measure(benchmark, ours, torchs, bytes_of(sets[0], found), flops, dtype, device)


def agree(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype, check: Check) -> None:
    """A fast wrong answer is no benchmark."""
    error = max(map(error_ratio, found, exact))
    check("ours", error <= TOLERANCE[dtype], f"is off by {error:.1e}")


# What Triton alone has


class Masked(TorchProducts):
    """torch's products on x with a mask of dropout, and the gradient masked by it."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept  # (M, K): by how much each element is multiplied

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        return super().shrink(x * self.kept, A)

    def grad_A(self, g: Tensor, x: Tensor) -> Tensor:
        return super().grad_A(g, x * self.kept)

    def grad_source(self, g: Tensor, A: Tensor) -> Tensor:
        return super().grad_source(g, A).mul_(self.kept)


def drawn(products: TorchProducts, m: int, k: int, device: str) -> Tensor:
    """The scaled mask (m, k) that Triton's products draw, read off by `grad_A`, 64 rows at a time."""
    ones, unit = torch.ones(m, k, device=device), torch.eye(m, device=device)
    return torch.cat([products.grad_A(unit[:, first : first + 64], ones) for first in range(0, m, 64)])


def dropped(
    product: str, m: int, k: int, r: int, dtype: torch.dtype, device: str, check: Check
) -> tuple[TorchProducts, TorchProducts, list[Tensors], list[Tensor]]:
    """(Triton's products with dropout, torch's on the same mask, what they read, what they write); checked on one."""
    theirs = products_of("triton", torch.tensor([12345], device=device), P)
    mask, sets, run = drawn(theirs, m, k, device), draw(product, m, k, r, dtype, device), PRODUCTS[product]
    exact = run(Masked(mask.double()), {name: tensor.double() for name, tensor in sets[0].items()})
    found = run(theirs, sets[0])
    agree(found, exact, dtype, check)
    # Not rounded to the dtype: what counts here is the time.
    return theirs, Masked(mask.to(dtype)), sets, found


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("product", ["shrink", "outer", "expand"])
def test_dropped(product: str, dtype: str, r: int, benchmark: Any, device: str) -> None:
    if device == "cpu":
        pytest.skip("Triton's alone")
    _, m, k = SIZES["8192x4096"]
    check = checker(benchmark, device)
    theirs, masked, sets, found = dropped(product, m, k, r, DTYPES[dtype], device, check)
    ours, torchs = ([lambda s=s, p=p: PRODUCTS[product](p, s) for s in sets] for p in (theirs, masked))
    measure(benchmark, ours, torchs, bytes_of(sets[0], found), 2 * m * k * r, dtype, device)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_reduce(dtype: str, r: int, benchmark: Any, device: str) -> None:
    """The parts of dB that grad_t's one pass leaves."""
    if device == "cpu":
        pytest.skip("Triton's alone")
    _, _, k = SIZES["8192x4096"]
    parts = [
        torch.randn(ROW_BLOCKS, k, r, device=device) for _ in range(2 + ROTATED[device] // (ROW_BLOCKS * k * r * 4))
    ]
    outs = [torch.empty(k, r, device=device, dtype=DTYPES[dtype]) for _ in parts]
    gather, total = reducers()
    gather(parts[0], outs[0])
    agree(outs[:1], [parts[0].double().sum(0)], DTYPES[dtype], checker(benchmark, device))
    ours, torchs = ([lambda w=w, o=o, f=f: f(w, o) for w, o in zip(parts, outs, strict=True)] for f in (gather, total))
    measure(benchmark, ours, torchs, parts[0].nbytes + outs[0].nbytes, parts[0].numel(), dtype, device)


def reducers() -> tuple[Callable[[Tensor, Tensor], object], Callable[[Tensor, Tensor], object]]:
    """out <- the sum of the parts: as Triton's products take it, and torch's."""
    from slao_kernels.ops.lora_linear import triton_kernels

    return lambda parts, out: triton_kernels.gather(parts, out), lambda parts, out: out.copy_(parts.sum(0))
