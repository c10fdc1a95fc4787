"""precision="adapter": the LoRA branch in the adapter's wider dtype, without a wide copy of x or y.

PEFT's default (a 16-bit base with fp32 adapters) copies all of x to fp32 and adds an fp32 M×N tensor. Here t and g
are fp32, and x, dy, y and dx are read and written in their own dtype: by splitting the other operand into 16-bit
terms, or, where no GEMM gives an fp32 result from 16-bit operands (CPU, ROCm, fp64 adapters), by widening a block of
rows at a time, which then lives in the cache (CPU) or in a few megabytes (GPU).

**The split.** An fp32 matrix of rank r is hi + lo + lo2, each term what the ones before it leave of it, rounded to 16
bits. Side by side the terms are a matrix of rank 3r, so the large matrix is read once, in its own dtype. A product of
two 16-bit numbers is exact in fp32: what is lost is lost by the split and by the order of the GEMM's sums. RMS error
of a split against the fp32 matrix, for one, two, three terms: bf16 1.7e-3, 2.4e-6, 0; fp16 2.1e-4, 4.4e-8, 0.
Not finite: the terms after the first are zero there, and a low term's product never meets an infinity, so inf and NaN
come out where fp32 arithmetic has them. fp16's exponents are few: a matrix is scaled by powers of two, rank by rank,
and the result scaled back.

The base GEMM comes first, as in PEFT, and is rounded before the branch joins it. LoRA first, as in products.py, errs
less only while the branch is the smaller of the two, and here it may have any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# (M, K) and (K, n) of one 16-bit dtype -> their product in fp32, (M, n).
Product = Callable[[Tensor, Tensor], Tensor]

_NARROW = (torch.bfloat16, torch.float16)
# For results that stay fp32: two terms of fp16 already err more than PEFT's dB of a single token does (2.5e-8).
# Where the result is 16-bit (`add_split_`), its own rounding hides what two terms lose.
_TERMS = 3
# Any fp32 number between this and 2^127 can be divided by 2^-14 times its own power of two.
_SMALLEST = 2.0**-112
# Elements of one widened block. CPU: half a million; shrink and outer at (2048, 4096), (2048, 1024) and (1024, 384)
# took up to 1.6 times as long with a quarter million (2 threads, 2 MiB of L2 each). A GPU wants fewer, larger launches.
_BLOCK = {"cpu": 1 << 19}
_BLOCK_ELSEWHERE = 1 << 24
# (dx, dA, dB, g), None where not needed.
Grads = tuple["Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]


class WideProducts:
    """x (M, K) and y (M, N) are narrow, all else has the adapters' dtype, any strides. Here by torch's own GEMMs."""

    mask: Tensor | None  # of torch's dropout, and what it scaled by
    scale: float

    def shrink_wide(self, x: Tensor, A: Tensor, scaling: float) -> Tensor:
        """scaling x Aᵀ, a fresh (M, r): A (r, K)."""
        if has_fp32_products(x, A):
            t = shrink_split(x, A, _mm)
            return t if scaling == 1.0 else t.mul_(scaling)
        t = A.new_empty((x.shape[0], A.shape[0]))
        for x_block, out in by_rows(x, t):
            torch.addmm(out, x_block.to(A.dtype), A.t(), beta=0, alpha=scaling, out=out)
        return t

    def outer_wide(self, t: Tensor, x: Tensor, scaling: float) -> Tensor:
        """scaling tᵀ x, a fresh (r, K): t (M, r)."""
        if has_fp32_products(x, t):
            out = outer_split(t, x, _mm)
            return out if scaling == 1.0 else out.mul_(scaling)
        total = t.new_zeros((t.shape[1], x.shape[1]))
        for x_block, own in by_rows(x, t):
            total.addmm_(own.t(), x_block.to(t.dtype), alpha=scaling)
        return total

    def add_wide_(self, y: Tensor, t: Tensor, B: Tensor, scaling: float) -> None:
        """y += scaling t Bᵀ, rounded once: t (M, r), B (N, r)."""
        if adds_split(y, B):
            add_split_(y, t, B, scaling)
            return
        for out, own in by_rows(y, t):
            out.copy_(torch.addmm(out.to(t.dtype), own, B.t(), alpha=scaling))

    def grad_source_wide(self, x: Tensor, g: Tensor, A: Tensor) -> Tensor:
        """g A where dropout kept x, in x's dtype and shape (..., K): g (M, r), A (r, K)."""
        dx = x.new_zeros(x.shape)
        self.add_wide_(rows_of(dx), g, A.t(), self.scale)
        return dx if self.mask is None else dx.mul_(self.mask)

    def wide_forward(
        self,
        x: Tensor,
        source: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        """(y, t) of the operator `lora_linear` with t in the adapters' dtype; see operators.py."""
        y = torch.nn.functional.linear(x, weight, bias)
        t = self.shrink_wide(rows_of(x if source is None else source), A, 1.0)
        self.add_wide_(rows_of(y), t, B, scaling)
        return y, t

    def wide_backward(
        self,
        dy: Tensor,
        source: Tensor,
        weight: Tensor,
        t: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        needs: tuple[bool, bool, bool],
    ) -> Grads:
        """What the operator `lora_linear_backward` computes, gradients of A and B and g in the adapters' dtype."""
        (need_x, need_A, need_B), dy2, dx = needs, rows_of(dy), None
        g = self.shrink_wide(dy2, B.t(), scaling) if need_x or need_A else None
        dA = self.outer_wide(g, rows_of(source), 1.0) if g is not None and need_A else None
        dB = self.outer_wide(t, dy2, scaling).t().contiguous() if need_B else None
        if g is not None and need_x:
            # The base product first, which is rounded before the branch joins.
            dx = torch.mm(dy2, weight).view(source.shape)
            if self.mask is None:
                self.add_wide_(rows_of(dx), g, A.t(), 1.0)
            else:
                dx += self.grad_source_wide(source, g, A)
        return dx, dA, dB, g


def rows_of(x: Tensor) -> Tensor:
    """(..., K) as (M, K), a view where there is one."""
    # reshape(-1, K) does not know M where K is 0.
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def splits(narrow: Tensor, wide: Tensor) -> bool:
    """Whether the split has the dtypes, and anything to do."""
    return narrow.dtype in _NARROW and wide.dtype == torch.float32 and narrow.numel() > 0 and wide.numel() > 0


def adds_split(y: Tensor, B: Tensor) -> bool:
    """Whether splitting t and B beats widening y. For fp16 on a CPU it does not: a forward pass at (M, K, N) =
    (1024, 384, 384) took 1.53 ms against 1.36, for bf16 0.58 against 0.63, at (2048, 4096, 4096) 37.9 against 43.4."""
    return splits(y, B) and (y.is_cuda or y.dtype == torch.bfloat16)


def has_fp32_products(narrow: Tensor, wide: Tensor) -> bool:
    """Whether torch multiplies 16-bit matrices into an fp32 one there: on CUDA alone, torch 2.11 to 2.13."""
    return narrow.is_cuda and not torch.version.hip and splits(narrow, wide)


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32)


def by_rows(*matrices: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """All of them a block of rows at a time, of so few elements of the first that a widened copy of it is small."""
    rows, columns = matrices[0].shape
    step = max(16, _BLOCK.get(matrices[0].device.type, _BLOCK_ELSEWHERE) // max(columns, 1))
    return (matrices,) if rows <= step else zip(*(matrix.split(step) for matrix in matrices), strict=True)


def terms_of(matrix: Tensor, dtype: torch.dtype, terms: int) -> list[Tensor]:
    """`terms` matrices of `dtype` that add up to (nearly) the fp32 `matrix`; all but the first are finite."""
    parts = [matrix.to(dtype)]
    rest = matrix
    while len(parts) < terms:
        rest = rest - parts[-1]
        if len(parts) == 1:
            rest.nan_to_num_(0.0, 0.0, 0.0)
        parts.append(rest.to(dtype))
    return parts


def shrink_split(x: Tensor, A: Tensor, product: Product) -> Tensor:
    """x Aᵀ in fp32: x (M, K) 16-bit, A (r, K) fp32; (M, r)."""
    A, scale = _in_range(A, 1, x.dtype)
    stacked = _side_by_side(terms_of(A, x.dtype, _TERMS), 0)
    t = _sum_of_terms(product(x, stacked.t()), A.shape[0], 1)
    return t if scale is None else t.mul_(scale.t())


def outer_split(t: Tensor, x: Tensor, product: Product) -> Tensor:
    """tᵀ x in fp32: t (M, r) fp32, x (M, K) 16-bit; (r, K)."""
    t, scale = _in_range(t, 0, x.dtype)
    stacked = _side_by_side(terms_of(t, x.dtype, _TERMS), 1)
    out = _sum_of_terms(product(stacked.t(), x), t.shape[1], 0)
    return out if scale is None else out.mul_(scale.t())


def add_split_(y: Tensor, t: Tensor, B: Tensor, scaling: float) -> None:
    """y += scaling t Bᵀ, added in the GEMM's fp32 and rounded once: y (M, N) 16-bit, t (M, r) and B (N, r) fp32."""
    t = t * scaling
    if y.dtype == torch.float16:
        # Both sides of a rank as large as each other: their largest product has to fit into y anyway.
        shift = _power_of_two((_largest(B, 0) / _largest(t, 0)).sqrt())
        t, B = t * shift, B / shift
    t_hi, t_lo = terms_of(t, y.dtype, 2)
    B_hi, B_lo = terms_of(B, y.dtype, 2)
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
