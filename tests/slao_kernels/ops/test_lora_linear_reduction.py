"""The sum of the parts that lora_linear's Triton kernels leave, interpreted and on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from on_triton import DTYPES, close, draw, interpreted, on_device

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops.lora_linear import triton_kernels as kernels

test_under_the_interpreter = interpreted(__file__, at_least=60)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1,), (255,), (4, 64), (257, 3)], ids=str)
@pytest.mark.parametrize("parts", [2, 3, 16, 17, 40])
def test_a_sum_of_parts(parts, size, dtype):
    """Fewer parts than are read at once, as many, and remainders; nothing beside the sum is written."""
    workspace, whole = draw(parts, *size), draw(2 * math.prod(size), dtype=dtype, seed=1)
    out, beside = (half.view(size) for half in whole.chunk(2))
    old = beside.clone()
    kernels.gather(workspace, out)
    close(out, workspace.double().sum(0), workspace.sum(0).to(dtype))
    assert torch.equal(beside, old)
    found = out.clone()
    kernels.gather(workspace, out)
    assert torch.equal(out, found)
