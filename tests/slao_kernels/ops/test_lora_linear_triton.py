"""lora_linear at real sizes on a GPU: value and gradients, CUDA graphs, another device. Else test_training_gpu.py."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from on_triton import DTYPES, mask_of_the_next_call
from oracle import NAMES, check, compare, exact, make, ours
from places import Place
from torch import Tensor

import slao_kernels
from slao_kernels.testing import TOLERANCE, error_ratio

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops.lora_linear import gemm

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.gpu]
LARGE = [
    ((8192,), 4096, 4096, 16),
    ((2, 2048), 4096, 14336, 64),
    ((1,), 4096, 4096, 8),
    ((4095,), 1536, 2560, 128),
    ((513,), 4096, 1024, 256),
]


@pytest.mark.parametrize(("backend", "p"), [("triton", 0.0), ("triton", 0.1), ("eager", 0.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(shape, dtype, backend, p):
    inputs = make(*shape, dtype, device="cuda")
    mask = {"mask": mask_of_the_next_call(inputs["x"], p)} if p else {}
    found, again = ((torch.manual_seed(3), ours("linear", inputs, dropout=p, backend=backend))[1] for _ in range(2))
    # dA and dB add up thousands of rows of rounded t and g; fp32 sums of that length lose a few more bits.
    compare(found, exact("linear", {**inputs, **mask}), (4 if dtype == torch.float32 else 1.5) * TOLERANCE[dtype])
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("tile", gemm.CANDIDATES, ids=str)
@pytest.mark.parametrize("shape", [((8192,), 4096, 4096, 16), ((2, 2048), 4096, 14336, 64), ((4095,), 1536, 2560, 8)])
def test_large_in_the_gemm(shape, tile, gemm_runs):
    if tile.tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no descriptors in this GPU's hardware")
    inputs, names = make(*shape, torch.bfloat16, device="cuda"), ("x", "A", "B")
    with gemm.tiles.force("gemm", tile):
        found = ours("linear", inputs, names, backend="triton")
        again = ours("linear", inputs, names, backend="triton")
    assert gemm_runs == 2 * ["nk", "kn"]
    compare(found, exact("linear", inputs, names), 1.5 * TOLERANCE[torch.bfloat16])
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("in_the_gemm", [False, True])
def test_cuda_graph(in_the_gemm, gemm_runs):
    """Forward and backward in one graph, bitwise the same at each replay."""
    inputs = make((512,), 512, 384, 16, torch.bfloat16, device="cuda")
    leaves = [inputs[name].requires_grad_() for name in NAMES]

    def step() -> list[Tensor]:
        y = slao_kernels.lora_linear(*leaves, 0.7, backend="triton")
        return [y.detach(), *torch.autograd.grad(y, leaves, inputs["y"])]

    tma = torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)
    tile = next(tile for tile in gemm.CANDIDATES if tile.tma is tma)
    with gemm.tiles.force("gemm", tile) if in_the_gemm else nullcontext():
        plain, replay, found = [value.clone() for value in step()], Place("cuda", "triton").captured(step), []
        for _ in range(2):
            captured = replay()
            torch.empty(1 << 24, device="cuda").fill_(float("nan"))  # whoever's memory a descriptor may have been in
            torch.cuda.synchronize()
            found.append([value.clone() for value in captured])
    assert set(gemm_runs) == ({"nk", "kn"} if in_the_gemm else set())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for value, expected in zip(found[0], plain, strict=True):  # cuBLAS may pick another GEMM under capture
        assert error_ratio(value, expected) <= (1 if in_the_gemm else 2) * TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_on_a_device_that_is_not_the_current_one():
    inputs = make((70,), 40, 24, 8, torch.float32, device="cuda:1")
    check("linear", ours("linear", inputs, backend="triton"), exact("linear", inputs), inputs)
