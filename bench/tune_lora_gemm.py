"""Measures lora_linear's Triton kernels on the GPU here and writes their tables for it:

    python bench/tune_lora_gemm.py --device-json OUT

The GEMM with the rank-r term inside, against torch's two products, for the layers of shapes.py in both directions; the
tiles of the rank-r products that read x or dy. OUT is, unless it is given, the file in which lora_linear looks for this
device. Every candidate's result is compared with fp64 on a sample first; one that spills or does not fit is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from shapes import GEOMETRIES
from torch import Tensor

from slao_kernels.testing import TOLERANCE, error_ratio

TOKENS, RANKS = (2048, 8192, 16384), (8, 16, 64)
# A tile serves all ranks up to its own, so there is one for each padded rank up to the largest that is measured.
TILE_RANKS = (16, 32, 64)
BLOCKS = ((32, 128), (64, 64), (64, 128), (128, 64))
DEVICE = "cuda"
# More than any cache. Emptying it also takes the GPU longer than the CPU needs to hand it the next call.
FLUSHED = 512 << 20


class Product(NamedTuple):
    """out (m, n) <- P (m, k) Q (k, n) + T (m, r) S (r, n); layout says how Q lies in memory, as in gemm.py."""

    layout: str
    m: int
    n: int
    k: int
    r: int


class Skinny(NamedTuple):
    """A rank-r product that reads a matrix (m, k)."""

    kernel: str
    m: int
    k: int
    r: int


def pairs(models: Iterable[str]) -> list[tuple[int, int]]:
    """(out_features, in_features) of the models' layers, each once."""
    return sorted({(n, k) for model in models for _, n, k in GEOMETRIES[model].layers})


def products(models: Iterable[str], tokens: Iterable[int], ranks: Iterable[int]) -> list[Product]:
    """Forward and dx of every layer, each product once."""
    both = {(layout, *sizes) for n, k in pairs(models) for layout, sizes in (("nk", (n, k)), ("kn", (k, n)))}
    return [Product(layout, m, n, k, r) for (layout, n, k), m, r in product(sorted(both), tokens, ranks)]


def skinny_products(models: Iterable[str], tokens: Iterable[int]) -> list[Skinny]:
    """x of every width for shrink and outer, dy of every width for grad_t; each once."""
    inner = {width for _, width in pairs(models)}
    widths = {"shrink": inner, "outer": inner, "grad_t": {width for width, _ in pairs(models)}}
    return [
        Skinny(kernel, m, k, r)
        for kernel, all_k in widths.items()
        for m, k, r in product(tokens, sorted(all_k), TILE_RANKS)
    ]


def skinny_tiles(of: Skinny, dtype: torch.dtype) -> list[Any]:
    """The tiles to try, the default one first."""
    from slao_kernels.ops.lora_linear import tiles

    default = tiles.find(of.kernel, dtype, of.m, of.k, of.r)
    assert default is not None
    default = dataclasses.replace(default, r=of.r, m=of.m, k=of.k)
    tried = [
        dataclasses.replace(default, block_m=m, block_k=k, warps=warps, stages=3)
        for (m, k), warps in product(BLOCKS, (4, 8))
    ]
    return [default, *(tile for tile in tried if tile != default)]


def table(about: str, tiles: Iterable[Any], measurements: Iterable[Any]) -> str:
    """The file's text, a row a line."""

    def rows(of: Iterable[Any]) -> str:
        return ",\n".join("    " + json.dumps(dataclasses.asdict(row)) for row in of)

    lists = ",\n".join(f'  "{name}": [\n{rows(of)}\n  ]' for name, of in (("tiles", tiles), ("gemm", measurements)))
    return f'{{\n  "about": {json.dumps(about)},\n{lists}\n}}\n'


def write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


# On the GPU


def race(contestants: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """µs of every call, all contestants in every round, another one first each time; caches are emptied before each."""
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device=DEVICE)
    names, times = list(contestants), {name: [] for name in contestants}
    for _ in range(rounds):
        laps = []
        for name in names:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flushed.zero_()
            start.record()
            contestants[name]()
            end.record()
            laps.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in laps:
            times[name].append(start.elapsed_time(end) * 1e3)
        names.append(names.pop(0))
    return times


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles."""
    low, _, high = quantiles(times, n=4)
    return (high - low) / 2


def fits(call: Callable[[], object], kernel: str) -> bool:
    """Whether a candidate compiles into what the GPU has, spills nothing, and is the kernel that the call takes."""
    from triton.runtime.errors import OutOfResources

    from slao_kernels.ops.lora_linear import launch

    launch.last = None
    try:
        call()
    except OutOfResources:
        return False
    torch.cuda.synchronize()
    return launch.last is not None and launch.last.name == kernel and not launch.last.n_spills


def draw(*size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(size, device=DEVICE) * scale).to(dtype)


def some(size: int) -> Tensor:
    """Indices of a sample, the last one among them."""
    return torch.cat([torch.randint(size, (min(size, 63),), device=DEVICE), torch.tensor([size - 1], device=DEVICE)])


def agree(what: object, found: Tensor, exact: Tensor) -> None:
    error = error_ratio(found, exact)
    if not error <= TOLERANCE[found.dtype]:
        sys.exit(f"{what} is wrong by {error:.1e}: stopped, and its row was not written")


def tune_gemm(of: Product, dtype: torch.dtype, rounds: int) -> Any:
    """The measurement of a product with the best tile; None where no tile fits."""
    from slao_kernels.ops.lora_linear import gemm, skinny

    P, T = draw(of.m, of.k, dtype=dtype), draw(of.m, of.r, dtype=dtype)
    Q, S = draw(of.k, of.n, dtype=dtype, scale=of.k**-0.5), draw(of.r, of.n, dtype=dtype, scale=of.r**-0.5)
    if of.layout == "nk":
        Q, S = Q.t().contiguous().t(), S.t().contiguous().t()
    out = torch.empty(of.m, of.n, dtype=dtype, device=DEVICE)
    torchs = partial(skinny.linear_, skinny, out, P, Q, T, S.t(), 0.7)
    assert gemm.layout_of(out, P, Q, T, S, None) == of.layout
    rows, columns = some(of.m), some(of.n)
    exact = P[rows].double() @ Q[:, columns].double() + 0.7 * T[rows].double() @ S[:, columns].double()
    without = bool(torch.version.hip) or torch.cuda.get_device_capability() < (9, 0)
    calls: dict[Any, Callable[[], object]] = {}
    for tile in gemm.CANDIDATES:
        if tile.tma and without:  # no descriptors in the hardware
            continue
        call = partial(gemm.run, tile, out, P, Q, T, S, 0.7)
        out.fill_(float("nan"))
        if fits(call, "gemm_kernel"):
            agree((of, tile), out[rows][:, columns], exact)
            calls[tile] = call
    if not calls:
        return None
    times = race(calls, rounds)
    best = min(calls, key=lambda tile: median(times[tile]))
    # Once more, alone with torch: the fastest of several was partly lucky.
    ours, torch_times = race({"ours": calls[best], "torch": torchs}, 2 * rounds).values()
    found = {"ours_us": median(ours), "torch_us": median(torch_times), "noise_us": spread(ours) + spread(torch_times)}
    found = {name: round(value, 2) for name, value in found.items()}
    return gemm.Measurement(**of._asdict(), dtype=str(dtype).removeprefix("torch."), **found, tile=best)


def tune_skinny(of: Skinny, dtype: torch.dtype, rounds: int) -> Any:
    """The fastest tile for a rank-r product; None where none fits or the product is not done by its kernel."""
    from slao_kernels.ops.lora_linear import kernels, tiles

    x, t = draw(of.m, of.k, dtype=dtype), draw(of.m, of.r, dtype=dtype)
    A = draw(of.r, of.k, dtype=dtype, scale=of.k**-0.5)
    g, dA, dB = torch.empty_like(t), torch.empty_like(A), torch.empty(of.k, of.r, dtype=dtype, device=DEVICE)
    rows, columns = some(of.m), some(of.k)
    shrunk, outer = x[rows].double() @ A.t().double(), t.t().double() @ x[:, columns].double()
    exact = {"shrink": (shrunk,), "outer": (outer.t(),), "grad_t": (shrunk, outer.t())}[of.kernel]

    def call(tile: Any) -> tuple[tuple[Tensor, Tensor], ...]:
        """(result, indices of the sampled rows), ..."""
        with tiles.force(tile):
            if of.kernel == "shrink":
                return ((kernels.shrink(x, A), rows),)
            if of.kernel == "outer":
                kernels.grad_A(t, x, dA)
                return ((dA.t(), columns),)
            kernels.grad_t(x, t, A.t(), 1.0, g, dB)
            return (g, rows), (dB, columns)

    calls: dict[Any, Callable[[], object]] = {}
    for tile in skinny_tiles(of, dtype):
        if fits(partial(call, tile), f"{of.kernel}_kernel"):
            for (found, sample), right in zip(call(tile), exact, strict=True):
                agree((of, tile), found[sample], right)
            calls[tile] = partial(call, tile)
    times = race(calls, rounds) if calls else {}
    return min(calls, key=lambda tile: median(times[tile]), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device-json", type=Path, help="the file to write (default: this device's own)")
    parser.add_argument("--models", nargs="+", default=list(GEOMETRIES), choices=list(GEOMETRIES), metavar="MODEL")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS, help="of the GEMM")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_lora_gemm: torch sees no CUDA or ROCm device here, and there is nothing to measure without one")
    import triton

    from slao_kernels.ops.lora_linear import tiles as tables

    device, dtype = torch.cuda.get_device_name(), getattr(torch, options.dtype)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    about = f"Measured by bench/tune_lora_gemm.py on {device} ({versions}), {options.dtype}, {options.rounds} rounds."
    path = options.device_json or tables.path_of(device)
    tiles, measured = [], []

    def keep() -> None:  # after every row: a run that is cut short leaves what it has
        write(path, table(about, tiles, measured))

    keep()  # before anything is measured: the path may be no place to write to
    torch.manual_seed(0)
    for one in products(options.models, options.tokens, options.ranks):
        if (row := tune_gemm(one, dtype, options.rounds)) is not None:
            measured.append(row)
            keep()
            verdict = "ours" if row.wins else "torch"
            print(f"{one}: {row.ours_us} µs, torch {row.torch_us} (± {row.noise_us}): {verdict}", flush=True)
    for skinny in skinny_products(options.models, options.tokens):
        if (tile := tune_skinny(skinny, dtype, options.rounds)) is not None:
            tiles.append(tile)
            keep()
            print(f"{skinny}: {tile.block_m} x {tile.block_k}, {tile.warps} warps", flush=True)
    print(f"{path}: {len(tiles)} tiles, the GEMM for {sum(row.wins for row in measured)} of {len(measured)} products")


if __name__ == "__main__":
    main()
