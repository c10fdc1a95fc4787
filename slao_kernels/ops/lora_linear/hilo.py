"""Products of a 16-bit matrix with an fp32 one of rank r, by 16-bit GEMMs: the fp32 one is split into hi + lo + lo2.

Each term is what the ones before it leave of the matrix, rounded to 16 bits. Side by side the terms are a matrix of
rank 3r, so the large matrix is read once, in its own dtype, and nothing wide of its size exists. A product of two
16-bit numbers is exact in fp32: what is lost is lost by the split and by the order of the GEMM's sums.
RMS error of a split against the fp32 matrix, for one, two, three terms: bf16 1.7e-3, 2.4e-6, 0; fp16 2.1e-4, 4.4e-8, 0.

Not finite: the terms after the first are zero there, and a low term's product never meets an infinity, so inf and NaN
come out where fp32 arithmetic has them.
fp16's exponents are few: a matrix is scaled by powers of two, rank by rank, and the result scaled back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (M, K) and (K, n) of one 16-bit dtype -> their product in fp32, (M, n).
Product = Callable[[Tensor, Tensor], Tensor]

DTYPES = (torch.bfloat16, torch.float16)
# For results that stay fp32: two terms of fp16 already err more than PEFT's dB of a single token does (2.5e-8).
# Where the result is 16-bit (`add_`), its own rounding hides what two terms lose.
_TERMS = 3
# Any fp32 number between this and 2^127 can be divided by 2^-14 times its own power of two.
_SMALLEST = 2.0**-112


def split(matrix: Tensor, dtype: torch.dtype, terms: int) -> list[Tensor]:
    """`terms` matrices of `dtype` that add up to (nearly) the fp32 `matrix`; all but the first are finite."""
    parts = [matrix.to(dtype)]
    rest = matrix
    while len(parts) < terms:
        rest = rest - parts[-1]
        if len(parts) == 1:
            rest.nan_to_num_(0.0, 0.0, 0.0)
        parts.append(rest.to(dtype))
    return parts


def shrink(x: Tensor, A: Tensor, product: Product) -> Tensor:
    """x Aᵀ in fp32: x (M, K) 16-bit, A (r, K) fp32; (M, r)."""
    A, scale = _in_range(A, 1, x.dtype)
    stacked = _side_by_side(split(A, x.dtype, _TERMS), 0)
    t = _sum_of_terms(product(x, stacked.t()), A.shape[0], 1)
    return t if scale is None else t.mul_(scale.t())


def outer(t: Tensor, x: Tensor, product: Product) -> Tensor:
    """tᵀ x in fp32: t (M, r) fp32, x (M, K) 16-bit; (r, K)."""
    t, scale = _in_range(t, 0, x.dtype)
    stacked = _side_by_side(split(t, x.dtype, _TERMS), 1)
    out = _sum_of_terms(product(stacked.t(), x), t.shape[1], 0)
    return out if scale is None else out.mul_(scale.t())


def add_(y: Tensor, t: Tensor, B: Tensor, scaling: float) -> None:
    """y += scaling t Bᵀ, added in the GEMM's fp32 and rounded once: y (M, N) 16-bit, t (M, r) and B (N, r) fp32."""
    t = t * scaling
    if y.dtype == torch.float16:
        # Both sides of a rank as large as each other: their largest product has to fit into y anyway.
        shift = _power_of_two((_largest(B, 0) / _largest(t, 0)).sqrt())
        t, B = t * shift, B / shift
    t_hi, t_lo = split(t, y.dtype, 2)
    B_hi, B_lo = split(B, y.dtype, 2)
    left = _side_by_side([t_hi, t_lo, _finite(t_hi)], 1)
    y.addmm_(left, _side_by_side([B_hi, _finite(B_hi), B_lo], 1).t())


def _side_by_side(parts: list[Tensor], dim: int) -> Tensor:
    """`parts` along `dim`, and zeros up to a multiple of 16: rows that do not start at 16 bytes make GEMMs slow."""
    rank = parts[0].shape[dim] * len(parts)
    if rank % 16:
        shape = list(parts[0].shape)
        shape[dim] = -rank % 16
        parts = [*parts, parts[0].new_zeros(shape)]
    return torch.cat(parts, dim)


def _sum_of_terms(stacked: Tensor, rank: int, dim: int) -> Tensor:
    """The products of hi, lo, lo2 as one. An infinity in x makes NaN of lo's (0 · inf), while hi's has it right."""
    hi, lo, lo2 = (stacked.narrow(dim, i * rank, rank) for i in range(_TERMS))
    return (lo + lo2).nan_to_num_(0.0, 0.0, 0.0).add_(hi)


def _in_range(matrix: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(matrix / scale, scale), the scale of a rank making its largest value 2^14 to 2^15; (matrix, None) for bf16."""
    if dtype != torch.float16:
        return matrix, None
    scale = _power_of_two(_largest(matrix, dim)) * 2.0**-14
    return matrix / scale, scale


def _largest(matrix: Tensor, dim: int) -> Tensor:
    """The largest finite magnitude along `dim`, at least _SMALLEST; 1 where there is none but zero."""
    largest = matrix.abs().nan_to_num_(0.0, 0.0, 0.0).amax(dim, keepdim=True)
    return torch.where(largest > 0, largest, 1.0).clamp_(min=_SMALLEST)


def _power_of_two(values: Tensor) -> Tensor:
    """Each positive normal fp32 value with its mantissa cleared."""
    return (values.view(torch.int32) & 0x7F800000).view(torch.float32)


def _finite(matrix: Tensor) -> Tensor:
    return matrix.nan_to_num(0.0, 0.0, 0.0)
