"""What the tests of Triton's kernels share: where they run, inputs, the comparison with torch's own products, masks.

On a GPU such a file runs there, elsewhere under Triton's interpreter: test_interpreted.py.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from slao_kernels.testing import error_ratio

INTERPRETED = oracle.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = (lambda test: test) if INTERPRETED else pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return oracle.draws(dtype, seed)(*size, scale=scale).to(DEVICE)


def empty(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device=DEVICE)


def make(*shape, **options) -> dict[str, Tensor]:
    """The inputs of oracle.py, on the device."""
    return oracle.make(*shape, **options, device=DEVICE)


def close(found: Tensor, exact: Tensor, torchs: Tensor) -> None:
    """No further from the exact result than torch's own product is, but for the order of an fp32 sum."""
    assert found.dtype == torchs.dtype
    allowed = 1.1 * error_ratio(torchs, exact) + 16 * torch.finfo(torch.float32).eps
    assert error_ratio(found, exact) <= allowed, (error_ratio(found, exact), allowed)


def philox_mask(seed: int, rows: int, columns: int, p: float) -> np.ndarray:
    """The mask of triton.py's docstring, from Philox4x32-10 as its paper writes it (Salmon et al., SC'11)."""
    groups = -(-columns // 8)
    c = [np.zeros((rows, groups), np.uint64) for _ in range(4)]
    c[0] += np.arange(groups, dtype=np.uint64)[None, :]
    c[1] += np.arange(rows, dtype=np.uint64)[:, None]
    low, key = np.uint64(0xFFFFFFFF), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (second >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]),
            second & low,
            (first >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]),
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    halves = np.stack([half for word in c for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))], -1)
    return halves.reshape(rows, -1)[:, :columns] < max(1, round((1 - p) * 65536))


def mask_of_the_next_call(x: Tensor, p: float) -> Tensor:
    """Seeds torch's generator, and gives what the next call of an op with dropout p multiplies x (..., K) with."""
    from slao_kernels.ops.lora_linear.triton import keep_below

    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE).item()
    torch.manual_seed(3)
    kept = philox_mask(seed, x.numel() // x.shape[-1], x.shape[-1], p)
    return torch.from_numpy(kept).to(DEVICE).view(x.shape) * (65536 / keep_below(p))
