"""lora_linear on Triton at real sizes on a GPU: value and gradients, CUDA graphs, Inductor, another device."""

from __future__ import annotations

import pytest
import torch
from on_triton import mask_of_the_next_call
from oracle import NAMES, check, compare, exact, make, ours
from torch import Tensor

import slao_kernels
from slao_kernels.testing import TOLERANCE, error_ratio

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops.lora_linear import gemm

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.gpu]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

LARGE = [
    ((8192,), 4096, 4096, 16),
    ((2, 2048), 4096, 14336, 64),
    ((1,), 4096, 4096, 8),
    ((4095,), 1536, 2560, 128),
    ((513,), 4096, 1024, 256),
]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(shape, dtype, p):
    inputs = make(*shape, dtype, device="cuda")
    mask = {"mask": mask_of_the_next_call(inputs["x"], p)} if p else {}
    found, again = ((torch.manual_seed(3), ours("linear", inputs, dropout=p, backend="triton"))[1] for _ in range(2))
    # dA and dB add up thousands of rows of rounded t and g; fp32 sums of that length lose a few more bits.
    compare(found, exact("linear", {**inputs, **mask}), (4 if dtype == torch.float32 else 1.5) * TOLERANCE[dtype])
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.fixture
def step(request: pytest.FixtureRequest):
    """A training step of one layer as a function of the dropout: y and all gradients."""
    inputs = make((512,), 512, 384, 16, torch.bfloat16, device="cuda")
    leaves = [inputs[name].requires_grad_() for name in NAMES]

    def step(p: float = 0.0, function=slao_kernels.lora_linear) -> list[Tensor]:
        y = function(*leaves, 0.7, dropout=p, backend="triton")
        return [y.detach(), *torch.autograd.grad(y, leaves, inputs["y"])]

    return step


def replays(step) -> tuple[list[Tensor], list[list[Tensor]]]:
    """What `step` gives, and what two replays of it as a CUDA graph give."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            plain = [value.clone() for value in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    found = []
    for _ in range(2):
        graph.replay()
        torch.empty(1 << 24, device="cuda").fill_(float("nan"))  # whoever's memory a descriptor may have been in
        torch.cuda.synchronize()
        found.append([value.clone() for value in captured])
    return plain, found


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_cuda_graph(p, step):
    """Forward and backward in one graph; each replay draws new masks."""
    plain, found = replays(lambda: step(p))
    assert all(value.isfinite().all() for replay in found for value in replay)
    if p:
        assert not torch.equal(found[0][0], found[1][0])
        return
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for value, expected in zip(found[0], plain, strict=True):  # cuBLAS may pick another GEMM under capture
        assert error_ratio(value, expected) <= 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compiled_by_inductor(p, step):
    found = step(p, torch.compile(slao_kernels.lora_linear, fullgraph=True))
    assert all(value.isfinite().all() for value in found)
    if not p:
        for value, expected in zip(found, step(p), strict=True):
            assert error_ratio(value, expected) <= 2 * TOLERANCE[torch.bfloat16]


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


def test_cuda_graph_of_the_gemm(step, gemm_runs):
    tma = torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)
    with gemm.tiles.force("gemm", next(tile for tile in gemm.CANDIDATES if tile.tma is tma)):
        plain, found = replays(step)
    assert set(gemm_runs) == {"nk", "kn"}
    for replay in found:
        assert all(error_ratio(a, b) <= TOLERANCE[torch.bfloat16] for a, b in zip(replay, plain, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_on_a_device_that_is_not_the_current_one():
    inputs = make((70,), 40, 24, 8, torch.float32, device="cuda:1")
    check("linear", ours("linear", inputs, backend="triton"), exact("linear", inputs), inputs)
