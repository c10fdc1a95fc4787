"""The GPU kernels on a GPU, CUDA's and Triton's, through the public functions.

test_cuda_emulated.py and, in Triton's interpreter, the tests of the ops hold the larger grid of cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import slao_kernels
from slao_kernels import dispatch
from slao_kernels.testing import error_ratio

pytestmark = pytest.mark.gpu
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# As in ops/test_orthogonal_init.py and ops/test_fold.py, with their reasons.
STORAGE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ONCE = {torch.float64: 2e-15, torch.float32: 4e-7, torch.bfloat16: 0.3 * 2**-7, torch.float16: 0.3 * 2**-10}


@pytest.fixture(autouse=True, params=["native", "triton"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    for op in ("orthogonal_init", "scaled_merge", "fold"):
        missing = dispatch.why_not(op, request.param, "cuda")
        if missing is not None:
            pytest.skip(f"{op}: {missing}")
    with slao_kernels.use_backend(request.param):
        yield


def gpu(tensor: Tensor) -> Tensor:
    return tensor.to("cuda")


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def orthogonality(A: Tensor) -> float:
    wide = A.detach().cpu().double()
    return torch.linalg.matrix_norm(wide @ wide.T - torch.eye(wide.shape[0], dtype=torch.float64), 2).item()


def exact(A: Tensor) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(A.detach().cpu().double().T)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * sign).T, R * sign[:, None]


def conditioned(r: int, n: int, kappa: float) -> Tensor:
    U = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64))[0]
    return U @ torch.diag(torch.logspace(0, -math.log10(kappa), r, dtype=torch.float64)) @ V.T


def model() -> dict[str, list[Tensor]]:
    """Tensors of a small model in all dtypes, some of them for every path of every kernel."""
    As = [torch.randn(16, 4096), torch.randn(16, 1000).bfloat16(), torch.randn(64, 2048), torch.randn(9, 77).double()]
    As += [conditioned(16, 3000, 1e5).float(), conditioned(16, 3000, 1e5).half(), torch.zeros(8, 100)]
    As += [torch.randn(16, 8) @ torch.randn(8, 600), torch.randn(130, 1025)]
    Ws = [torch.randn(512, 1024).bfloat16(), torch.randn(300, 200), torch.randn(130, 77).double().t()]
    ups = [torch.randn(16, 1024), torch.randn(64, 200), torch.randn(3, 130)]
    downs = [torch.randn(512, 16), torch.randn(300, 64).half(), torch.randn(77, 3)]
    return {"As": As, "Ws": Ws, "ups": ups, "downs": downs, "Fs": [torch.randn(W.shape) for W in Ws]}


def on_gpu(tensors: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [gpu(tensor) for tensor in group] for name, group in tensors.items()}


def all_three(m: dict[str, list[Tensor]]) -> slao_kernels.OrthogonalInitReport:
    report = slao_kernels.orthogonal_init_(m["As"], return_r=True)
    slao_kernels.scaled_merge_(m["Ws"], m["Fs"], 0.3)
    slao_kernels.fold_(m["Ws"], m["ups"], m["downs"], 0.5)
    return report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (3, 3), (8, 33), (12, 100), (16, 4096), (64, 200), (130, 257), (256, 256)], ids=str
)
def test_orthogonal_init_is_the_unique_qr(shape, dtype):
    A = gpu(torch.randn(shape, dtype=torch.float64).to(dtype))
    Q, R = exact(A)
    report = slao_kernels.orthogonal_init_([A], return_r=True)
    assert report.deficient == []
    slack = 100 if shape[0] == shape[1] else 1
    near = (1e-5 if dtype != torch.float64 else 1e-12 * slack) + torch.finfo(dtype).eps
    assert (A.cpu().double() - Q).abs().max() <= near
    assert orthogonality(A) <= STORAGE[dtype] * math.sqrt(shape[0])
    assert (report.r[0].cpu().double() - R).abs().max() <= 1e-5 * R.abs().max()


@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4, 1e6, 1e7])
@pytest.mark.parametrize("r", [8, 16, 64])
def test_orthonormal_up_to_a_condition_of_1e7(r, kappa):
    A = gpu(conditioned(r, 512, kappa).float())
    slao_kernels.orthogonal_init_([A])
    assert orthogonality(A) <= 1e-6


@pytest.mark.parametrize(
    "case",
    [
        lambda: torch.randn(16, 8) @ torch.randn(8, 300),
        lambda: torch.randn(16, 300).index_fill_(0, torch.tensor([5]), 0),
        lambda: torch.zeros(16, 300),
        lambda: torch.randn(8, 300).repeat(2, 1),
        lambda: conditioned(16, 300, 1e10).float(),
    ],
    ids=["half rank", "zero row", "all zero", "every row twice", "kappa 1e10"],
)
def test_deficient_input_is_completed_and_reported(case):
    start = case()
    A, regular = gpu(start), gpu(torch.randn(16, 300))
    assert slao_kernels.orthogonal_init_([regular, A]).deficient == [1]
    assert orthogonality(A) <= 5e-6
    found = A.cpu().double()
    assert (start - start.double() @ found.T @ found).norm() <= 1e-5 * max(1.0, start.norm())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_is_written_when_any_matrix_is_not_finite(bad):
    As = on_gpu(model())["As"]
    As[1][2, 3] = bad
    before = [bits(A) for A in As]
    report = slao_kernels.orthogonal_init_(As, return_r=True)  # does not wait, so does not raise
    with pytest.raises(ValueError, match=r"As\[1\]: has NaN or infinite"):
        _ = report.deficient
    assert all(torch.equal(bits(A), old) for A, old in zip(As, before, strict=True))


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.8, 1.0])
def test_scaled_merge(target, source, lam):
    sizes = [(33, 7), (5,), (4097,), (300, 200)]
    merged, tuned = [torch.randn(s).to(target) for s in sizes], [torch.randn(s).to(source) for s in sizes]
    found = [gpu(m) for m in merged]
    slao_kernels.scaled_merge_(found, [gpu(t) for t in tuned], lam)
    arithmetic = torch.finfo(torch.float64 if target == torch.float64 else torch.float32)
    for m, t, f in zip(merged, tuned, found, strict=True):
        expected = m.double() + lam * (t.double() - m.double())
        slack = 4 * arithmetic.eps * torch.maximum(m.double().abs(), t.double().abs())
        slack += torch.finfo(target).eps * expected.abs() + torch.finfo(target).tiny
        assert ((f.cpu().double() - expected).abs() <= slack).all()
        if lam == 0.0 or (lam == 1.0 and source == target):
            assert torch.equal(bits(f), bits(t if lam else m))


def test_every_16_bit_value_survives_a_copy():
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = patterns.view(dtype)
        wide, back = torch.empty(65536, device="cuda"), torch.empty(65536, dtype=dtype, device="cuda")
        slao_kernels.scaled_merge_([wide], [gpu(values)], 1.0)
        slao_kernels.scaled_merge_([back], [wide], 1.0)
        nan = values.isnan()
        assert torch.equal(wide.cpu()[~nan].view(torch.int32), values.float()[~nan].view(torch.int32))
        assert torch.equal(back.cpu().view(torch.int16)[~nan], patterns[~nan])
        assert back.cpu()[nan].isnan().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 33, 5), (64, 48, 16), (400, 300, 64), (70, 140, 130)], ids=str)
def test_fold_equals_the_exact_sum_rounded_once(shape, weight, transposed):
    n, k, r = shape
    W = torch.randn(k, n).to(weight).t() if transposed else torch.randn(n, k).to(weight)
    A, B = torch.randn(r, k).bfloat16(), torch.randn(n, r)
    expected = W.double() + 0.7 * B.double() @ A.double()
    found = gpu(W)
    slao_kernels.fold_([found], [gpu(A)], [gpu(B)], 0.7)
    # The sums are in fp32 unless one of the three is fp64.
    assert error_ratio(found.cpu(), expected) <= ONCE[weight] * (4 if r > 64 else 1)


def test_five_runs_are_bitwise_equal():
    start, results = model(), []
    for _ in range(5):
        m = on_gpu(start)
        report = all_three(m)
        results.append([bits(tensor) for tensor in m["As"] + m["Ws"] + report.r])
        assert report.deficient == [6, 7]
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def _expected(start: dict[str, list[Tensor]]) -> list[Tensor]:
    m = on_gpu(start)
    all_three(m)
    torch.cuda.synchronize()
    return [bits(tensor) for tensor in m["As"] + m["Ws"]]


def test_captured_and_replayed():
    """A graph keeps its own table, and what it computes is what the calls compute."""
    start = model()
    expected, m = _expected(start), on_gpu(start)
    all_three(m)  # Triton's kernels are compiled, and their tables go up, before a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = all_three(m)
    for _ in range(3):
        for name in ("As", "Ws"):
            for tensor, value in zip(m[name], start[name], strict=True):
                tensor.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(bits(t), e) for t, e in zip(m["As"] + m["Ws"], expected, strict=True))
    assert report.deficient == [6, 7]


def test_on_a_side_stream():
    start = model()
    expected, m = _expected(start), on_gpu(start)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        all_three(m)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(bits(t), e) for t, e in zip(m["As"] + m["Ws"], expected, strict=True))


def without_waiting(call: Callable[[], object]) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device():
    m = on_gpu(model())
    without_waiting(lambda: all_three(m))


def test_every_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    start = model()
    expected = _expected(start)
    m = {name: [tensor.to("cuda:1") for tensor in group] for name, group in start.items()}
    all_three(m)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(bits(t), e) for t, e in zip(m["As"] + m["Ws"], expected, strict=True))
