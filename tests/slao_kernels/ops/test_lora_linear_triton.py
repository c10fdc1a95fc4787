"""lora_linear on Triton through torch's machinery (opcheck, torch.compile, CUDA graphs) and at real sizes on a GPU."""

from __future__ import annotations

import pytest
import test_lora_linear as eager_tests
import torch
from on_triton import DEVICE, DTYPES, NAMES, interpreted, make, on_device, philox_mask, with_mask
from torch import Tensor

import slao_kernels
from slao_kernels.testing import TOLERANCE, error_ratio

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops.lora_linear import gemm, kernels

pytestmark = pytest.mark.usefixtures("poisoned")
test_under_the_interpreter = interpreted(__file__, at_least=4)


@on_device
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_operator_contract(p):
    inputs = make((6,), 16, 24, 4, torch.float32)
    dropout = (torch.tensor([7], device=DEVICE) if p else None, p)
    x, weight, bias, A, B = (inputs[name] for name in NAMES)
    ops = torch.ops.slao_kernels
    torch.library.opcheck(ops.lora_linear.default, (x, None, weight, bias, A, B, 0.5, "triton", *dropout))
    t = x @ A.T
    for needs in ((True, False, True, True), (False, False, False, True), (True, False, False, False)):
        backward = (inputs["dy"], x, None, weight, t, A, B, 0.5, *needs, "triton", *dropout)
        torch.library.opcheck(ops.lora_linear_backward.default, backward)


@on_device
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_without_a_graph_break(p):
    inputs = make((12,), 32, 24, 4, torch.float32)
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    results = []
    for function in (
        slao_kernels.lora_linear,
        torch.compile(slao_kernels.lora_linear, fullgraph=True, backend="aot_eager"),
    ):
        torch.manual_seed(4)
        y = function(*leaves, 0.7, dropout=p, backend="triton")
        results.append([y, *torch.autograd.grad(y, leaves, inputs["dy"])])
    for found, expected in zip(*results, strict=True):
        assert error_ratio(found, expected) <= TOLERANCE[torch.float32]


# At real sizes, on a GPU


LARGE = [
    ((8192,), 4096, 4096, 16),
    ((2, 2048), 4096, 14336, 64),
    ((1,), 4096, 4096, 8),
    ((4095,), 1536, 2560, 128),
    ((513,), 4096, 1024, 256),
]


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(shape, dtype, p):
    inputs = {name: value.cuda() for name, value in eager_tests.make(*shape, dtype).items()}
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device="cuda").item()
    mask = torch.ones_like(inputs["x"], dtype=torch.float64)
    if p:
        kept = philox_mask(seed, mask.numel() // shape[1], shape[1], p)
        mask = (torch.from_numpy(kept).cuda() * (65536 / kernels.keep_below(p))).view(inputs["x"].shape)
    expected = with_mask(inputs, mask, NAMES)
    torch.manual_seed(3)
    found = eager_tests.ours(inputs, NAMES, dropout=p, backend="triton")
    torch.manual_seed(3)
    again = eager_tests.ours(inputs, NAMES, dropout=p, backend="triton")
    # dA and dB add up thousands of rows of rounded t and g; fp32 sums of that length lose a few more bits.
    eager_tests.compare(found, expected, (4 if dtype == torch.float32 else 1.5) * TOLERANCE[dtype])
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_cuda_graph(p):
    """Forward and backward in one graph; each replay draws new masks."""
    inputs = {name: value.cuda() for name, value in eager_tests.make((512,), 512, 384, 16, torch.bfloat16).items()}
    leaves = [inputs[name].requires_grad_() for name in NAMES]

    def step() -> list[Tensor]:
        y = slao_kernels.lora_linear(*leaves, 0.7, dropout=p, backend="triton")
        return [y.detach(), *torch.autograd.grad(y, leaves, inputs["dy"])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            plain = [value.clone() for value in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([value.clone() for value in captured])
    torch.cuda.synchronize()
    assert all(value.isfinite().all() for replay in replays for value in replay)
    if p == 0.0:
        assert all(torch.equal(a, b) for a, b in zip(*replays, strict=True))
        # cuBLAS may pick another GEMM under capture.
        for found, expected in zip(replays[0], plain, strict=True):
            assert error_ratio(found, expected) <= 2 * TOLERANCE[torch.bfloat16]
    else:
        assert not torch.equal(replays[0][0], replays[1][0])


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compiled_by_inductor(p):
    inputs = {name: value.cuda() for name, value in eager_tests.make((512,), 512, 384, 16, torch.bfloat16).items()}
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    function = torch.compile(slao_kernels.lora_linear, fullgraph=True)
    y = function(*leaves, 0.7, dropout=p, backend="triton")
    grads = torch.autograd.grad(y, leaves, inputs["dy"])
    assert all(value.isfinite().all() for value in (y, *grads))
    if p == 0.0:
        exact = eager_tests.oracle({name: value.detach() for name, value in inputs.items()}, NAMES)
        found = {"y": y, **dict(zip(NAMES, grads, strict=True))}
        eager_tests.compare(found, exact, TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("tile", gemm.CANDIDATES, ids=str)
@pytest.mark.parametrize("shape", [((8192,), 4096, 4096, 16), ((2, 2048), 4096, 14336, 64), ((4095,), 1536, 2560, 8)])
def test_large_in_the_gemm(shape, tile, gemm_runs):
    if tile.tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no descriptors in this GPU's hardware")
    names = ("x", "A", "B")
    inputs = {name: value.cuda() for name, value in eager_tests.make(*shape, torch.bfloat16).items()}
    with gemm.force(tile):
        found = eager_tests.ours(inputs, names, backend="triton")
        again = eager_tests.ours(inputs, names, backend="triton")
    assert gemm_runs == 2 * ["nk", "kn"]
    eager_tests.compare(found, eager_tests.oracle(inputs, names), 1.5 * TOLERANCE[torch.bfloat16])
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.gpu
def test_cuda_graph_of_the_gemm(gemm_runs):
    inputs = {name: value.cuda() for name, value in eager_tests.make((512,), 512, 384, 16, torch.bfloat16).items()}
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    tma = torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)

    def step() -> list[Tensor]:
        with gemm.force(next(tile for tile in gemm.CANDIDATES if tile.tma is tma)):
            y = slao_kernels.lora_linear(*leaves, 0.7, backend="triton")
            return [y.detach(), *torch.autograd.grad(y, leaves, inputs["dy"])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plain = [value.clone() for _ in range(3) for value in step()][-6:]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        torch.empty(1 << 24, device="cuda").fill_(float("nan"))  # whoever's memory the descriptors were in
        torch.cuda.synchronize()
        assert all(error_ratio(a, b) <= TOLERANCE[torch.bfloat16] for a, b in zip(captured, plain, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_on_a_device_that_is_not_the_current_one():
    inputs = {name: value.to("cuda:1") for name, value in eager_tests.make((70,), 40, 24, 8, torch.float32).items()}
    found = eager_tests.ours(inputs, NAMES, backend="triton")
    eager_tests.compare(found, eager_tests.oracle(inputs, NAMES), TOLERANCE[torch.float32])
