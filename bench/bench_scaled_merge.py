"""scaled_merge_ of a whole model's B against loops, torch's foreach, and the copy floor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from race import race, triton_too

import slao_kernels

RANK = 16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("case", ["fp32", "bf16", "fp16", "fp32<-bf16"])
def test_scaled_merge(case: str, benchmark: Any, device: str, layers: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    target, _, source = case.partition("<-")
    tuned = [torch.randn(n, RANK, device=device).to(DTYPES[source or target]) for n, _ in layers]
    ours, again, loop, foreach = ([f.to(DTYPES[target], copy=True) for f in tuned] for _ in range(4))
    flat = torch.cat([f.flatten() for f in ours])
    other = flat.clone()
    lam = 0.3
    peers: dict[str, Any] = {"copy floor": lambda: other.copy_(flat)}
    if source:
        peers["loop lerp_(.float())"] = lambda: [m.lerp_(f.float(), lam) for m, f in zip(loop, tuned, strict=True)]
    else:
        peers["loop lerp_"] = lambda: [m.lerp_(f, lam) for m, f in zip(loop, tuned, strict=True)]
        peers["_foreach_lerp_"] = lambda: torch._foreach_lerp_(foreach, tuned, lam)
    triton, left_out = triton_too(
        "scaled_merge", device, lambda name: slao_kernels.scaled_merge_(again, tuned, lam, backend=name)
    )
    benchmark.extra_info["left out"] = left_out
    race(benchmark, lambda: slao_kernels.scaled_merge_(ours, tuned, lam), peers | triton, device, rounds=15)
