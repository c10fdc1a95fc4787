"""Merges that combine A with A and B with B, entry by entry: cheap, and the rank stays. PEFT's linear, ties, dare_ties.

Each takes the T adapters' A (r, n) and B (m, r) of one layer and returns the merged A and B in the arithmetic's dtype:
fp32, or fp64 where an adapter has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from slao_kernels import scaled_merge_

from ..schedules import MergeStats, Schedule

Pair = tuple[Tensor, Tensor]


def slao(pairs: Sequence[Pair], schedule: Schedule, name: str = "") -> Pair:
    """B <- B + λ(i) (B_i - B) in the given order, A of the last; bitwise what the method SLAO merges after training in
    fp32 (arXiv 2512.23017, algorithm 1). Adapters in 16 bits are merged in fp32.

    schedule: asked for every adapter but the first, with the weights of this one layer `name` in that arithmetic.
    """
    dtype = arithmetic([tensor for pair in pairs for tensor in pair])
    wide = [(A.to(dtype), B.to(arithmetic([B for _, B in pairs]))) for A, B in pairs]
    last, merged = wide[0][0], wide[0][1].clone()
    lambdas: list[float | list[float]] = [1.0]
    for i, (A, B) in enumerate(wide[1:], start=2):
        stats = MergeStats(i, f"adapter {i}", [name], [A], [B], [last], [merged], list(lambdas))
        lam = schedule(i, stats)
        lambdas.append(lam if isinstance(lam, int | float) else list(lam))
        scaled_merge_([merged], [B], lam if isinstance(lam, int | float) else list(lam))
        last = A
    return pairs[-1][0], merged


def linear(pairs: Sequence[Pair], factors: Sequence[float]) -> Pair:
    """A = Σ ±√|f| A_t, B = Σ √|f| B_t with f = weight · scaling: PEFT's "linear". It holds cross terms B_i A_j, so it
    is not the sum of the task vectors; that is svd's."""
    A, B = _stacks(pairs)
    left, right = _roots(factors, A.dtype)
    return (A * left).sum(0), (B * right).sum(0)


def ties(pairs: Sequence[Pair], factors: Sequence[float], density: float) -> Pair:
    """TIES (arXiv 2306.01708) on A and on B, as PEFT's "ties": of each tensor the `density` largest entries are kept,
    a sign elected for each entry by their unweighted sum (0 counts as +), and those of that sign averaged, weighted
    with √|f|, f = weight · scaling, over their number."""
    A, B = _stacks(pairs)
    left, right = _roots(factors, A.dtype)
    return disjoint_mean(trimmed(A, density), left), disjoint_mean(trimmed(B, density), right)


def dare_ties(pairs: Sequence[Pair], factors: Sequence[float], density: float, seed: int, name: str) -> Pair:
    """DARE (arXiv 2311.03099) before TIES' sign election, as PEFT's "dare_ties": entries are kept with probability
    `density`, drawn at random, and divided by it.

    Drawn for each layer from `layer_seed(seed, name)`: first the A of all adapters, then the B, so that
    torch.manual_seed with it makes PEFT draw the same.
    """
    A, B = _stacks(pairs)
    left, right = _roots(factors, A.dtype)
    generator = torch.Generator().manual_seed(layer_seed(seed, name))
    A, B = (_dropped(stack, density, generator) for stack in (A, B))
    return disjoint_mean(A, left), disjoint_mean(B, right)


def layer_seed(seed: int, name: str) -> int:
    """A layer's own: what it draws does not depend on which layers come before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")


def trimmed(stack: Tensor, density: float) -> Tensor:
    """(T, ...) with zeros but for the int(density · entries) largest magnitudes of each of the T."""
    flat = stack.flatten(1)
    keep = int(density * flat.shape[1])
    if density >= 1:
        return stack
    largest = torch.stack([row.abs().topk(keep).indices for row in flat])
    return torch.zeros_like(flat).scatter_(1, largest, flat.gather(1, largest)).view_as(stack)


def disjoint_mean(stack: Tensor, weights: Tensor) -> Tensor:
    """(...) of (T, ...): per entry the weighted sum of those with the elected sign, over their number. A zero has no
    sign and is neither counted nor added. weights: (T, 1, ...)."""
    elected = torch.where(stack.sum(0) >= 0, 1, -1)
    agree = stack.sign() == elected
    return (stack * weights * agree).sum(0) / agree.sum(0).clamp(min=1)


def arithmetic(tensors: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, [tensor.dtype for tensor in tensors], torch.float32)


def _stacks(pairs: Sequence[Pair]) -> Pair:
    dtype = arithmetic([tensor for pair in pairs for tensor in pair])
    A, B = (torch.stack([tensor.to(dtype) for tensor in tensors]) for tensors in zip(*pairs, strict=True))
    return A, B


def _roots(factors: Sequence[float], dtype: torch.dtype) -> Pair:
    """(T, 1, 1) each: f = left · right, the sign on A's side."""
    given = torch.tensor(factors, dtype=torch.float64).view(-1, 1, 1)
    root = given.abs().sqrt()
    return torch.where(given < 0, -root, root).to(dtype), root.to(dtype)


def _dropped(stack: Tensor, density: float, generator: torch.Generator) -> Tensor:
    if density >= 1:
        return stack
    keep = [torch.bernoulli(torch.full_like(tensor, density), generator=generator) for tensor in stack]
    return stack * torch.stack(keep) / density
