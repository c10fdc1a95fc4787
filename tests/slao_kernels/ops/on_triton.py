"""What the tests of Triton's kernels share: where they run, inputs, the comparison with torch's own products, masks.

On a GPU such a file runs there. Elsewhere its `test_under_the_interpreter` runs it once more in a process of its own,
in which Triton interprets its kernels on CPU tensors: the variable that says so is read when triton is imported, and
torch.compile imports it too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from slao_kernels.testing import error_ratio

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = (lambda test: test) if INTERPRETED else pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def interpreted(file: str, few: int, rest: int) -> Callable[[str, int], None] | None:
    """The test that runs `file` under the interpreter and sees that many tests pass; None where it is that run.

    few: those of its tests that are not exhaustive (conftest.py). rest: the others, run by a test that is exhaustive.
    """
    if INTERPRETED:
        return None

    @pytest.mark.slow
    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
    @pytest.mark.skipif(torch.cuda.is_available(), reason="the tests of Triton's kernels run on the GPU here")
    @pytest.mark.parametrize(
        ("which", "count"), [("not exhaustive", few), pytest.param("exhaustive", rest, marks=pytest.mark.exhaustive)]
    )
    def test(which: str, count: int) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, file]
        env = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=590, cwd=Path(file).parent)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        (passed,) = re.findall(r"(\d+) passed", done.stdout)
        assert int(passed) >= count, done.stdout[-2000:]

    return test


def draw(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


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
