"""Measures lora_linear's Triton kernels on the GPU here and writes their tables for it:

    python bench/tune_lora_gemm.py --device-json OUT [--seconds 540]

The tiles of the rank-r products that read x or dy, and one pass over dy against two; the GEMM with the rank-r term
inside, against torch's two products, for the layers of shapes.py in both directions. OUT is, unless it is given, the
file in which lora_linear looks for this device; it is written after every row. Every candidate's result is compared
with fp64 on a sample first: one that is wrong, spills or does not fit is left out. The status is 1 where one was wrong,
or raised. After --seconds no candidate begins any more, half of them for the tiles. Under TRITON_INTERPRET=1 everything
runs on a CPU, to see that it runs: its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from shapes import GEOMETRIES
from torch import Tensor
from tune_plan import Product, Skinny, products, skinny_products, skinny_tiles, table, write

from slao_kernels.testing import TOLERANCE, error_ratio

TOKENS, RANKS = (2048, 8192, 16384), (8, 16, 64)
STAGES = (2, 3, 4)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# More than any cache. Emptying it also takes the GPU longer than the CPU needs to hand it the next call.
FLUSHED = 0 if INTERPRETED else 512 << 20

wrong: list[str] = []  # candidates that computed something else, or raised
ends = float("inf")  # when no candidate begins any more, by time.monotonic


def in_time(candidates: Iterable[Any]) -> Iterator[Any]:
    """The first of them, and the others while there is time."""
    for index, candidate in enumerate(candidates):
        if index and time.monotonic() > ends:
            return
        yield candidate


# On the GPU


def race(contestants: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """µs of every call, all contestants in every round, another one first each time; caches are emptied before each."""
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device=DEVICE)
    names, times = list(contestants), {name: [] for name in contestants}
    for _ in range(rounds):
        laps = []
        for name in names:
            flushed.zero_()
            start = mark()
            contestants[name]()
            laps.append((name, start, mark()))
        if not INTERPRETED:
            torch.cuda.synchronize()
        for name, start, end in laps:
            times[name].append((end - start) * 1e6 if INTERPRETED else start.elapsed_time(end) * 1e3)
        names.append(names.pop(0))
    return times


def mark() -> Any:
    """Now, on the GPU's clock; interpreted, on the host's."""
    if INTERPRETED:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles."""
    low, _, high = quantiles(times, n=4)
    return (high - low) / 2


def fits(what: object, call: Callable[[], object], kernel: str) -> bool:
    """Whether a candidate compiles into what the GPU has, spills nothing, and is the kernel that the call takes."""
    from triton.runtime.errors import OutOfResources

    from slao_kernels.ops.lora_linear import triton_kernels

    triton_kernels.last = None
    try:
        call()
    except OutOfResources:
        return False
    except Exception as problem:  # whatever a compiler raises
        leave_out(f"{what} raises {type(problem).__name__}: {str(problem).strip().splitlines()[:1]}")
        return False
    if INTERPRETED:
        return True
    torch.cuda.synchronize()
    last = triton_kernels.last
    return last is not None and last.name == kernel and not last.n_spills


def right(what: object, results: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Whether each (found, exact) agree; a candidate that does not is told and left out."""
    for found, exact in results:
        error = error_ratio(found, exact)
        if not error <= TOLERANCE[found.dtype]:
            leave_out(f"{what} is wrong by {error:.1e}")
            return False
    return True


def leave_out(why: str) -> None:
    wrong.append(why)
    print(f"LEFT OUT: {why}", flush=True)


def draw(*size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(size, device=DEVICE) * scale).to(dtype)


def some(size: int) -> Tensor:
    """Indices of a sample, the last one among them."""
    return torch.cat([torch.randint(size, (min(size, 63),), device=DEVICE), torch.tensor([size - 1], device=DEVICE)])


def tune_gemm(of: Product, dtype: torch.dtype, rounds: int) -> Any:
    """The measurement of a product with the best tile; None where no tile fits."""
    from slao_kernels.ops.lora_linear import gemm
    from slao_kernels.ops.lora_linear.products import TorchProducts

    P, T = draw(of.m, of.k, dtype=dtype), draw(of.m, of.r, dtype=dtype)
    Q, S = draw(of.k, of.n, dtype=dtype, scale=of.k**-0.5), draw(of.r, of.n, dtype=dtype, scale=of.r**-0.5)
    if of.layout == "nk":
        Q, S = Q.t().contiguous().t(), S.t().contiguous().t()
    out = torch.empty(of.m, of.n, dtype=dtype, device=DEVICE)
    torchs = partial(TorchProducts().linear_, out, P, Q.t(), T, S.t(), 0.7, None)
    assert gemm.layout_of(out, P, Q, T, S, None) == of.layout
    rows, columns = some(of.m), some(of.n)
    exact = P[rows].double() @ Q[:, columns].double() + 0.7 * T[rows].double() @ S[:, columns].double()
    without = bool(torch.version.hip) or INTERPRETED or torch.cuda.get_device_capability() < (9, 0)
    calls: dict[Any, Callable[[], object]] = {}
    for tile in in_time(tile for tile in gemm.CANDIDATES if not (tile.tma and without)):
        call = partial(gemm.run, tile, out, P, Q, T, S, 0.7)
        out.fill_(float("nan"))
        if fits((of, tile), call, "gemm_kernel") and right((of, tile), [(out[rows][:, columns], exact)]):
            calls[tile] = call
    if not calls:
        return None
    times = race(calls, rounds)
    best = min(calls, key=lambda tile: median(times[tile]))
    # Once more, alone with torch: the fastest of several was partly lucky.
    ours, torch_times = race({"ours": calls[best], "torch": torchs}, 2 * rounds).values()
    found = {"ours_us": median(ours), "torch_us": median(torch_times), "noise_us": spread(ours) + spread(torch_times)}
    found = {name: round(us, 2) for name, us in found.items()}
    return gemm.Measurement(**of._asdict(), dtype=str(dtype).removeprefix("torch."), **found, tile=best)


@contextmanager
def passes_over_dy(one: bool) -> Iterator[None]:
    """Within, grad_t makes one pass or two, whatever the count of bytes says."""
    from slao_kernels.ops.lora_linear import triton

    rule = triton.one_pass_pays
    triton.one_pass_pays = lambda *_: one
    try:
        yield
    finally:
        triton.one_pass_pays = rule


def tune_skinny(of: Skinny, dtype: torch.dtype, rounds: int) -> Any:
    """The fastest tile for a rank-r product, first of the blocks and warps, then with other stages; None where none
    fits or the product is not done by its kernel. Of grad_t it is said what one pass and two passes take."""
    from slao_kernels.ops.lora_linear import tiles, triton

    x, t = draw(of.m, of.k, dtype=dtype), draw(of.m, of.r, dtype=dtype)
    A, products = draw(of.r, of.k, dtype=dtype, scale=of.k**-0.5), triton.products()
    rows, columns = some(of.m), some(of.k)
    shrunk, outer = x[rows].double() @ A.t().double(), x[:, columns].double().t() @ t.double()
    exact = {"shrink": [shrunk], "outer": [outer], "grad_t": [shrunk, outer]}[of.kernel]

    def product() -> list[tuple[Any, Tensor]]:
        """(result, indices of the sampled rows), ..."""
        if of.kernel == "shrink":
            return [(products.shrink(x, A), rows)]
        if of.kernel == "outer":
            return [(products.grad_A(t, x).t(), columns)]
        g, dB = products.grad_t(x, t, A.t(), 1.0, True, True)
        return [(g, rows), (dB, columns)]

    def call(tile: Any) -> list[tuple[Any, Tensor]]:
        with tiles.force(of.kernel, tile), passes_over_dy(one=True):
            return product()

    def fastest(tried: Iterable[Any]) -> Any:
        calls: dict[Any, Callable[[], object]] = {}
        for tile in in_time(tried):
            if not fits((of, tile), partial(call, tile), f"{of.kernel}_kernel"):
                continue
            sampled = [found[sample] for found, sample in call(tile)]
            if right((of, tile), zip(sampled, exact, strict=True)):
                calls[tile] = partial(call, tile)
        times = race(calls, rounds) if calls else {}
        return min(calls, key=lambda tile: median(times[tile]), default=None)

    best = fastest(skinny_tiles(of, dtype))
    if best is None:
        return None
    best = fastest([best, *(dataclasses.replace(best, stages=count) for count in STAGES if count != best.stages)])
    if of.kernel == "grad_t" and best is not None:
        two = passes_over_dy(one=False)(product)
        two()  # compiled
        one_us, two_us = (median(times) for times in race({"one": partial(call, best), "two": two}, rounds).values())
        print(f"{of}: one pass over dy {one_us:.1f} µs, two {two_us:.1f} µs", flush=True)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device-json", type=Path, help="the file to write (default: this device's own)")
    parser.add_argument("--models", nargs="+", default=list(GEOMETRIES), choices=list(GEOMETRIES), metavar="MODEL")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after these no candidate begins any more")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or INTERPRETED):
        sys.exit("tune_lora_gemm: torch sees no CUDA or ROCm device here, and there is nothing to measure without one")
    import triton

    from slao_kernels.ops.lora_linear import tiles as tables

    global ends
    began, dtype = time.monotonic(), getattr(torch, options.dtype)
    device = "interpreter" if INTERPRETED else torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    about = f"Measured by bench/tune_lora_gemm.py on {device} ({versions}), {options.dtype}, {options.rounds} rounds."
    path = options.device_json or tables.path_of(device)
    tiles: list[Any] = []
    measured: list[Any] = []
    wrong.clear()

    def keep() -> None:  # after every row: a run that is cut short leaves what it has
        write(path, table(about, tiles, measured))

    keep()  # before anything is measured: the path may be no place to write to
    torch.manual_seed(0)
    ends, rows = began + options.seconds / 2, skinny_products(options.models, options.tokens, options.ranks)
    for skinny in in_time(rows):
        if (tile := tune_skinny(skinny, dtype, options.rounds)) is not None:
            tiles.append(tile)
            keep()
            print(f"{skinny}: {tile.block_m} x {tile.block_k}, {tile.warps} warps, {tile.stages} stages", flush=True)
    ends, gemms = began + options.seconds, products(options.models, options.tokens, options.ranks)
    for one in in_time(gemms):
        if (row := tune_gemm(one, dtype, options.rounds)) is not None:
            measured.append(row)
            keep()
            verdict = "ours" if row.wins else "torch"
            print(f"{one}: {row.ours_us} µs, torch {row.torch_us} (± {row.noise_us}): {verdict}", flush=True)
    wins = sum(row.wins for row in measured)
    print(f"{path}: {len(tiles)} tiles for {len(rows)} products, the GEMM measured for {len(measured)} of {len(gemms)}")
    print(f"the GEMM wins {wins} of them; {len(wrong)} candidates were wrong or raised")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
