"""What methods share that give their layers a core or frozen pairs (slao_kernels/extension.py)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slao_kernels import sharding

from .base import Method

if TYPE_CHECKING:
    from slao_kernels.extension import Extended


def extend_all(method: Method) -> list[Extended]:
    """Every layer of the method, extended for its adapter. ValueError, with none changed, if one cannot be."""
    from slao_kernels import extension  # which loads PEFT

    reasons = {pair.name: extension.why_not(pair.layer, method.adapter) for pair in method.pairs}
    bad = [f"{name}: {why}" for name, why in reasons.items() if why is not None]
    if bad:
        raise ValueError(f"{method.name} cannot treat {len(bad)} layers: {'; '.join(bad[:8])}")
    return [extension.extend(pair.layer, method.adapter) for pair in method.pairs]


def refuse_shards(method: Method) -> None:
    """ValueError where the adapter is sharded now, for methods that work on the model's own parameters."""
    live = sharding.live_pairs(method.pairs, method.adapter)
    sharded = [pair.name for pair in live if not all(map(sharding.is_plain, pair.parameters))]
    if sharded:
        raise ValueError(
            f"{method.name}: A or B of {len(sharded)} layers is sharded ({', '.join(sharded[:4])}); use DDP or ZeRO-2, "
            "or keep the adapter out of FSDP (ignored_params)"
        )


def fresh(like: Tensor, key: str) -> Tensor:
    """PEFT's default init of A, uniform in ±1/√(columns), drawn from `key` alone: the same on every rank and after a
    resume. In fp32, on the CPU, of the shape of `like` (rows, columns)."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
    bound = like.shape[1] ** -0.5
    return (torch.rand(like.shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound
