"""weighted_merge of three adapters against a loop of QRs, the copy floor and, on request, PEFT's dense SVD.

    pytest bench/bench_weighted_merge.py --peft-svd 1024x4096,4096x4096

runs add_weighted_adapter(combination_type="svd") once on one layer of each of these shapes (half a minute for 4096x4096
on two cores, minutes for 14336x4096) and counts it for all layers of that shape.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from race import checker, clock, race
from torch import Tensor, nn

import slao_kernels

RANK, WEIGHTS = 16, [0.5, 0.3, 0.2]
SCALING = 2.0

Lists = tuple[list[Tensor], list[Tensor], float]


def adapters(layers: list[tuple[int, int]], device: str, count: int = len(WEIGHTS)) -> list[Lists]:
    """Of the sizes that training leaves: A as PEFT draws it, B about a tenth of that."""
    torch.manual_seed(0)
    return [
        (
            [torch.empty(RANK, k, device=device).uniform_(-(k**-0.5), k**-0.5) for _, k in layers],
            [0.1 * torch.empty(n, RANK, device=device).uniform_(-(n**-0.5), n**-0.5) for n, _ in layers],
            SCALING,
        )
        for _ in range(count)
    ]


def qr_loop(given: list[Lists]) -> list[tuple[Tensor, Tensor]]:
    """The same recipe layer by layer, as one would write it, in the adapters' own dtype."""
    merged = []
    for index in range(len(given[0][0])):
        Qa, Ra = torch.linalg.qr(torch.cat([As[index] for As, _, _ in given]).T)
        scaled = [w * s * Bs[index] for w, (_, Bs, s) in zip(WEIGHTS, given, strict=True)]
        Qb, Rb = torch.linalg.qr(torch.cat(scaled, dim=1))
        U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
        merged.append((Vh[:RANK] @ Qa.T, Qb @ (U[:, :RANK] * S[:RANK])))
    return merged


def worst_residual(merge: slao_kernels.WeightedMerge, given: list[Lists], indices: list[int]) -> float:
    """How far (A, B) are from leading singular vectors of the sum D, which is applied factor by factor in fp64:
    ‖D Aᵀ − B‖, ‖Bᵀ D − S² A‖, ‖A Aᵀ − I‖, and what D − B A has beyond the smallest value kept, all as parts."""
    worst = 0.0
    for index in indices:
        A, B = (tensor.double() for tensor in merge.pairs[index])
        As = torch.cat([As[index] for As, _, _ in given]).double()
        Bs = torch.cat([w * s * Bs[index] for w, (_, Bs, s) in zip(WEIGHTS, given, strict=True)], dim=1).double()
        S2 = B.square().sum(0)
        identity = torch.eye(RANK, dtype=torch.float64, device=A.device)
        parts = [
            (Bs @ (As @ A.T) - B).norm() / B.norm(),
            ((B.T @ Bs) @ As - S2[:, None] * A).norm() / S2.norm(),
            (A @ A.T - identity).norm(),
        ]
        v = torch.randn(A.shape[1], 1, dtype=torch.float64, device=A.device)
        for _ in range(200):  # the largest singular value of D - B A, from below
            v /= v.norm()
            u = Bs @ (As @ v) - B @ (A @ v)
            v = As.T @ (Bs.T @ u) - A.T @ (B.T @ u)
        parts.append(u.norm() / S2[-1].sqrt() - 1)
        worst = max(worst, *(float(part) for part in parts))
    return worst


def peft_seconds(shape: tuple[int, int], device: str) -> float:
    """One layer through PEFT: its sum, its dense SVD, its new adapter."""
    n, k = shape
    model: Any = nn.Sequential(nn.Linear(k, n, bias=False, device=device))
    config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["0"], init_lora_weights=False)
    names = [f"task {t}" for t in range(len(WEIGHTS))]
    model = get_peft_model(model, config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return clock(lambda: model.add_weighted_adapter(names, WEIGHTS, "merged", "svd", svd_rank=RANK), device)


def test_weighted_merge(
    benchmark: Any, device: str, layers: list[tuple[int, int]], request: pytest.FixtureRequest
) -> None:
    given = adapters(layers, device)
    flat = torch.cat([tensor.flatten() for As, Bs, _ in given for tensor in As + Bs])
    other = flat.clone()
    peers = {"qr loop": lambda: qr_loop(given), "copy floor": lambda: other.copy_(flat)}
    race(benchmark, lambda: slao_kernels.weighted_merge(given, WEIGHTS, RANK), peers, device, rounds=5)
    merge = slao_kernels.weighted_merge(given, WEIGHTS, RANK)
    first_of_each = [layers.index(shape) for shape in Counter(layers)]
    benchmark.extra_info["worst residual"] = worst_residual(merge, given, first_of_each)
    worst = benchmark.extra_info["worst residual"]
    checker(benchmark, device)("ours", worst <= 1e-5, f"is off by {worst:.1e}")
    wanted = [word.split("x") for word in request.config.getoption("--peft-svd").split(",") if word]
    counts = Counter(layers)
    for n, k in [(int(first), int(second)) for first, second in wanted]:
        if (n, k) not in counts:
            raise ValueError(f"--peft-svd: no layer of this model is {n}x{k}; it has {sorted(counts)}")
        name, seconds = f"PEFT {counts[n, k]} times {n}x{k}", counts[n, k] * peft_seconds((n, k), device)
        ours = benchmark.extra_info["ours_ms"]
        benchmark.extra_info |= {f"{name} ms": seconds * 1e3, f"{name} / ours": seconds * 1e3 / ours}
