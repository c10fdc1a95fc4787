"""Each rank-r product of lora_linear alone: Triton's kernels on a GPU, the compiled core's on a CPU, and torch's own.

Two roofs, measured in the same run: a copy of a large tensor (bytes read and written), and a bare GEMM of the same
dtype. A product's bytes are each input once and each output once, its FLOPs those of the matrix product; so a kernel
that reads something twice is further from the roof, not nearer. `% roof` is the time that the nearer of the roofs
would allow over the time taken. On a GPU all calls of a lap are one CUDA graph: the host's time is not in it.

"torch" is skinny.py's GEMM; of "…_dropped" that GEMM and one multiplication by a mask that is already there, which
is less than dropout costs; of "reduce" a sum over the first dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from race import capped, clock, graphed, interleave, machine
from torch import Tensor

from slao_kernels import dispatch
from slao_kernels.ops.lora_linear import skinny
from slao_kernels.ops.lora_linear.group import products_of
from slao_kernels.testing import TOLERANCE, error_ratio

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIZES = {"1024x384": ("cpu", 1024, 384), "2048x4096": ("cpu", 2048, 4096), "8192x4096": ("cuda", 8192, 4096)}
RANKS = [8, 16, 48, 64]  # 48: q, k and v of rank 16, stacked
P, SCALING = 0.1, 0.7
ROW_BLOCKS = 128  # parts of a sum over 8192 tokens, 64 at a time

# A lap goes through so many bytes, so that nothing is still in the cache nearest to the arithmetic when it is read
# again (a GPU's L2 holds about 50 MB, a CPU core's 2).
ROTATED = {"cpu": 64 << 20, "cuda": 512 << 20}
GEMM = {"cpu": (2048, 4096, 4096), "cuda": (8192, 8192, 8192)}
COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}

Tensors = dict[str, Tensor]
# x and y (M, K), t and g (M, r), A and dA (r, K), B and dB (K, r). What each product reads and what it writes.
TOUCHED = {"shrink": "x A t", "expand": "t B y", "outer": "t x dA", "grad_t": "x t B g dB"}


def shrink(p: Any, s: Tensors) -> list[Tensor]:
    return [p.shrink(s["x"], s["A"])]


def expand(p: Any, s: Tensors) -> list[Tensor]:
    p.expand_(s["y"], s["t"], s["B"], SCALING)
    return [s["y"]]


def outer(p: Any, s: Tensors) -> list[Tensor]:
    p.grad_A(s["t"], s["x"], s["dA"])
    return [s["dA"]]


def grad_t(p: Any, s: Tensors) -> list[Tensor]:
    p.grad_t(s["x"], s["t"], s["B"], SCALING, s["g"], s["dB"])
    return [s["g"], s["dB"]]


PRODUCTS = {"shrink": shrink, "expand": expand, "outer": outer, "grad_t": grad_t}


def draw(product: str, m: int, k: int, r: int, dtype: torch.dtype, device: str) -> list[Tensors]:
    """As many sets of a product's tensors as a lap goes through."""
    shapes = {"x": (m, k), "y": (m, k), "t": (m, r), "g": (m, r), "A": (r, k), "dA": (r, k), "B": (k, r), "dB": (k, r)}
    sets = max(2, -(-ROTATED[device] // (m * k * dtype.itemsize)))
    names = TOUCHED[product].split()
    return [{name: torch.randn(shapes[name], device=device).to(dtype) for name in names} for _ in range(sets)]


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
        call()
        seconds.append(min(clock(call, device) for _ in range(capped(7))))
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
    run, theirs, sets = PRODUCTS[product], products_of(backend), draw(product, m, k, r, DTYPES[dtype], device)
    exact = run(skinny, {name: tensor.double() for name, tensor in sets[0].items()})
    for found, expected in zip(run(theirs, sets[0]), exact, strict=True):  # a fast wrong answer is no benchmark
        assert error_ratio(found, expected) <= TOLERANCE[DTYPES[dtype]]
    ours, torchs = ([lambda s=s, p=p: run(p, s) for s in sets] for p in (theirs, skinny))
    moved = sum(tensor.nbytes for tensor in sets[0].values())
    measure(benchmark, ours, torchs, moved, (4 if product == "grad_t" else 2) * m * k * r, dtype, device)


# What Triton alone has


class Masked:
    """torch's products on x with a mask of dropout, and their gradient masked by it."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask  # (M, K), scaled

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        return skinny.shrink(x * self.mask, A)

    def grad_A(self, g: Tensor, x: Tensor, dA: Tensor) -> None:
        skinny.grad_A(g, x * self.mask, dA)

    def expand_(self, y: Tensor, t: Tensor, B: Tensor, scaling: float) -> None:
        skinny.expand_(y, t, B, scaling)
        y.mul_(self.mask)


def drawn(products: Any, m: int, k: int, device: str) -> Tensor:
    """The scaled mask (m, k) that Triton's products draw, read off by `grad_A`, 64 rows at a time."""
    ones, unit, rows = torch.ones(m, k, device=device), torch.eye(m, device=device), []
    for first in range(0, m, 64):
        picked = unit[:, first : first + 64]
        rows.append(torch.empty(picked.shape[1], k, device=device))
        products.grad_A(picked, ones, rows[-1])
    return torch.cat(rows)


def dropped(product: str, m: int, k: int, r: int, dtype: torch.dtype, device: str) -> tuple[Any, Any, list[Tensors]]:
    """(Triton's products, torch's on the same mask, the tensors) of a product with dropout; checked on one set."""
    from slao_kernels.ops.lora_linear import kernels

    seed = torch.tensor([12345], device=device)
    forward = kernels.TritonProducts(seed, P)
    theirs = kernels._DroppedBackward(seed, P) if product == "expand" else forward
    mask, sets, run = drawn(forward, m, k, device), draw(product, m, k, r, dtype, device), PRODUCTS[product]
    exact = run(Masked(mask.double()), {name: tensor.double() for name, tensor in sets[0].items()})
    for found, expected in zip(run(theirs, sets[0]), exact, strict=True):
        assert error_ratio(found, expected) <= TOLERANCE[dtype]
    # Not rounded to the dtype: what counts here is the time.
    return theirs, Masked(mask.to(dtype)), sets


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("product", ["shrink", "outer", "expand"])
def test_dropped(product: str, dtype: str, r: int, benchmark: Any, device: str) -> None:
    if device == "cpu":
        pytest.skip("Triton's alone")
    _, m, k = SIZES["8192x4096"]
    theirs, masked, sets = dropped(product, m, k, r, DTYPES[dtype], device)
    ours, torchs = ([lambda s=s, p=p: PRODUCTS[product](p, s) for s in sets] for p in (theirs, masked))
    moved = sum(tensor.nbytes for tensor in sets[0].values())
    measure(benchmark, ours, torchs, moved, 2 * m * k * r, dtype, device)


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
    assert error_ratio(outs[0], parts[0].double().sum(0)) <= TOLERANCE[DTYPES[dtype]]
    ours, torchs = ([lambda w=w, o=o, f=f: f(w, o) for w, o in zip(parts, outs, strict=True)] for f in (gather, total))
    measure(benchmark, ours, torchs, parts[0].nbytes + outs[0].nbytes, parts[0].numel(), dtype, device)


def reducers() -> tuple[Callable[[Tensor, Tensor], object], Callable[[Tensor, Tensor], object]]:
    """out <- the sum of the parts: as Triton's products take it, and torch's."""
    from slao_kernels.ops.lora_linear import triton_kernels

    return lambda parts, out: triton_kernels.gather(parts, out, out), lambda parts, out: out.copy_(parts.sum(0))
