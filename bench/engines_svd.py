"""The engine of `slao extract`, `slao.merging.product.leading` at its tolerance, against power iterations and the dense
SVD: what each leaves over in multiples of the least, and seconds of one thread's processor time.

    python bench/engines_svd.py [ROWSxCOLUMNS ...]

"noise" is the hard case, a flat spectrum. "tuned" is what a fine-tune's difference looks like: singular values that
fall with the power -0.7, and noise of 30 % of their norm.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from slao.merging.dense import TOLERANCE
from slao.merging.product import leading
from slao_kernels import orthogonal_init_

Parts = tuple[Tensor, Tensor, Tensor]
RANKS = (16, 64, 256)


def power(matrix: Tensor, rank: int, iterations: int, more: int = 8) -> Parts:
    """Halko, Martinsson and Tropp 2011, algorithm 4.4: a random range, that many power iterations."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(rank + more, matrix.shape[1], generator=generator)
    for index in range(iterations + 1):
        left = (rows @ matrix.T).contiguous()
        orthogonal_init_([left])
        rows = (left @ matrix).contiguous()
        if index < iterations:
            orthogonal_init_([rows])
    U, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    return left.T @ U[:, :rank], S[:rank], Vh[:rank].T


def sample(kind: str, m: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(m, n, generator=generator)
    if kind == "noise":
        return noise
    falls = (1 + torch.arange(512.0)) ** -0.7
    U, V = (torch.randn(size, 512, generator=generator) / size**0.5 for size in (m, n))
    signal = (U * falls) @ V.T
    return signal + noise * (0.3 * signal.norm() / noise.norm())


def main(shapes: list[str]) -> None:
    torch.set_num_threads(1)
    engines: dict[str, Callable[[Tensor, int], Parts]] = {
        "leading": lambda matrix, rank: leading(matrix, rank, TOLERANCE),
        "power, 1": lambda matrix, rank: power(matrix, rank, 1),
        "power, 2": lambda matrix, rank: power(matrix, rank, 2),
    }
    print("| shape | matrix | rank | dense SVD leaves | " + " | ".join(engines) + " | dense SVD |")
    print("| --- | --- | ---: | ---: |" + " ---: |" * (len(engines) + 1), flush=True)
    for shape in shapes:
        m, n = map(int, shape.split("x"))
        for kind in ("noise", "tuned"):
            matrix = sample(kind, m, n)
            start = time.process_time()
            values = torch.linalg.svdvals(matrix).double()
            dense = time.process_time() - start
            for rank in RANKS:
                least = float(values[rank:].norm())
                cells = []
                for engine in engines.values():
                    start = time.process_time()
                    U, S, V = engine(matrix, rank)
                    spent = time.process_time() - start
                    left = float((matrix.double() - (U * S).double() @ V.double().T).norm())
                    cells.append(f"{left / least:.4f}, {spent:.2f} s")
                part = least / math.sqrt(float(values.square().sum()))
                print(
                    f"| {shape} | {kind} | {rank} | {part:.3f} | " + " | ".join(cells) + f" | {dense:.1f} s |",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:] or ["1024x1024", "4096x1024", "4096x4096"])
