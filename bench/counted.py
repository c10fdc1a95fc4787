"""What a first run on a GPU is held against: Triton's launches, counted, and the time that the bytes and FLOPs need.

    python bench/counted.py [--copy 4.3 --gemm 800]        # TB/s of a copy, TFLOP/s of a GEMM, as measured there

Nothing here is measured. Launches are counted while Triton's interpreter runs the real host code on a CPU, the products
of `lora_linear` at the sizes of the table (bf16, r = 16), the whole-model operations on MiniLM's layers, whose number
does not matter to them. Bytes are each input and each output once, for the whole-model operations those of
Llama-3-8B's 224 layers (fp32 adapters, r = 16; fold into bf16). The time is what the nearer of two roofs allows.
Where a card's many processors share a sum, shrink and outer take one launch of reduce_kernel more.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is loaded

import tables as text
import torch
from bench_lora_kernels import PRODUCTS, READ, bytes_of
from shapes import GEOMETRIES
from torch import Tensor

import slao_kernels
from slao_kernels.ops import tables
from slao_kernels.ops.operators import products_of

M, K, R = 8192, 4096, 16
MODEL, COUNTED_ON = "llama-3-8b", "minilm"


def counted(call: Callable[[], object]) -> Counter[str]:
    """Kernel -> launches of one call."""
    found: Counter[str] = Counter()
    launch = tables.launch

    def counting(kernel: Any, *arguments: Any, **options: Any) -> Any:
        found[kernel.fn.__name__] += 1
        return launch(kernel, *arguments, **options)

    tables.launch = counting
    try:
        call()
    finally:
        tables.launch = launch
    return found


def of_products() -> list[tuple[str, Counter[str], int, int]]:
    """(what, launches, bytes, FLOPs) of each of Triton's rank-r products."""
    shapes = {"x": (M, K), "t": (M, R), "A": (R, K), "B": (K, R)}
    rows = []
    for product in ("shrink", "outer", "grad_t"):  # expand is torch's GEMM
        read = {name: torch.randn(shapes[name]).bfloat16() for name in READ[product].split()}
        written: list[Tensor] = []

        def run(product: str = product, read: Any = read, written: list[Tensor] = written) -> None:
            written += PRODUCTS[product](products_of("triton"), read)

        launches = counted(run)
        rows.append((product, launches, bytes_of(read, written), (4 if product == "grad_t" else 2) * M * K * R))
    return rows


def of_models() -> list[tuple[str, Counter[str], int, int]]:
    """The same of the operations on all layers of a model."""
    small = GEOMETRIES[COUNTED_ON].all_layers()[:6]  # one block: every shape
    As, Bs = [torch.randn(R, k) for _, k in small], [torch.randn(n, R) for n, _ in small]
    merged, weights = [B.clone() for B in Bs], [torch.randn(n, k).bfloat16() for n, k in small]
    large = GEOMETRIES[MODEL].all_layers()
    A, B, W = (sum(size) for size in zip(*((R * k * 4, n * R * 4, n * k * 2) for n, k in large), strict=True))
    flops_qr = sum(4 * R * R * k for _, k in large)
    calls: list[tuple[str, Callable[[], object], int, int]] = [
        ("scaled_merge_", lambda: slao_kernels.scaled_merge_(merged, Bs, 0.5, backend="triton"), 3 * B, 0),
        ("orthogonal_init_", lambda: slao_kernels.orthogonal_init_(As, backend="triton"), 2 * A, flops_qr),
        (
            "fold_",
            lambda: slao_kernels.fold_(weights, As, Bs, 1.0, backend="triton"),
            2 * W + A + B,
            sum(2 * n * k * R for n, k in large),
        ),
    ]
    return [(name, counted(call), moved, flops) for name, call, moved, flops in calls]


def table(copy: float, gemm: float) -> str:
    """copy in TB/s, gemm in TFLOP/s."""
    body = []
    for name, launches, moved, flops in of_products() + of_models():
        told = ", ".join(f"{count} × {kernel}" if count > 1 else kernel for kernel, count in launches.items())
        microseconds = 1e6 * max(moved / (copy * 1e12), flops / (gemm * 1e12))
        body.append([f"`{name}`", str(launches.total()), told, f"{moved / 1e6:,.1f}", text.digits(microseconds)])
    head = ["", "launches", "kernels", "MB", f"µs at {copy:g} TB/s, {gemm:g} TFLOP/s"]
    return text.markdown(head, body, text=3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copy", type=float, default=4.3, metavar="TB/S", help="90 %% of an H200's 4.8 unless said")
    parser.add_argument("--gemm", type=float, default=800.0, metavar="TFLOP/S", help="80 %% of an H200's 989 in bf16")
    options = parser.parse_args()
    print(table(options.copy, options.gemm))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
