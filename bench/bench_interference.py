"""interference of three adapters against r×r traces in a loop of fp32 products, one dense layer, and the copy floor."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import torch
from bench_weighted_merge import adapters
from race import race
from torch import Tensor

import slao_kernels


def test_interference(benchmark: Any, device: str, layers: list[tuple[int, int]]) -> None:
    given = adapters(layers, device)
    flat = torch.cat([tensor.flatten() for As, Bs, _ in given for tensor in As + Bs])
    other = flat.clone()

    def traces() -> list[Tensor]:
        return [
            ((Bs[index].T @ Ds[index]) * (As[index] @ Cs[index].T)).sum()
            for (As, Bs, _), (Cs, Ds, _) in combinations_with_replacement(given, 2)
            for index in range(len(layers))
        ]

    def dense() -> Tensor:  # of one block's seven layers only
        rows = [
            torch.stack([(B @ A).flatten() for A, B in zip(column_A, column_B, strict=True)])
            for column_A, column_B in (
                ([As[index] for As, _, _ in given], [Bs[index] for _, Bs, _ in given]) for index in range(7)
            )
        ]
        return torch.stack([row @ row.T for row in rows])

    peers = {"traces in a loop": traces, "dense, one block": dense, "copy floor": lambda: other.copy_(flat)}
    race(benchmark, lambda: slao_kernels.interference(given), peers, device, rounds=5)
