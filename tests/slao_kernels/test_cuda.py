"""The GPU kernels on a GPU, CUDA's and Triton's, through the public functions: graphs, streams, devices, no waiting.

What they compute is tested there by ops/test_orthogonal_init.py, test_scaled_merge.py and test_fold.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from on_lists import Public, bits, conditioned
from torch import Tensor

import slao_kernels

pytestmark = pytest.mark.gpu
Lists = dict[str, list[Tensor]]


@pytest.fixture(autouse=True, params=["native", "triton"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    missing = Public(request.param, "cuda").why_not()
    if missing is not None:
        pytest.skip(missing)
    with slao_kernels.use_backend(request.param):
        yield


def model() -> Lists:
    """Tensors of a small model in all dtypes, some of them for every path of every kernel."""
    As = [torch.randn(16, 4096), torch.randn(16, 1000).bfloat16(), torch.randn(64, 2048), torch.randn(9, 77).double()]
    As += [conditioned(16, 3000, 1e5).float(), conditioned(16, 3000, 1e5).half(), torch.zeros(8, 100)]
    As += [torch.randn(16, 8) @ torch.randn(8, 600), torch.randn(130, 1025)]
    Ws = [torch.randn(512, 1024).bfloat16(), torch.randn(300, 200), torch.randn(130, 77).double().t()]
    ups = [torch.randn(16, 1024), torch.randn(64, 200), torch.randn(3, 130)]
    downs = [torch.randn(512, 16), torch.randn(300, 64).half(), torch.randn(77, 3)]
    return {"As": As, "Ws": Ws, "ups": ups, "downs": downs, "Fs": [torch.randn(W.shape) for W in Ws]}


def on_gpu(tensors: Lists, device: str = "cuda") -> Lists:
    return {name: [tensor.to(device) for tensor in group] for name, group in tensors.items()}


def all_three(m: Lists) -> slao_kernels.OrthogonalInitReport:
    report = slao_kernels.orthogonal_init_(m["As"], return_r=True)
    slao_kernels.scaled_merge_(m["Ws"], m["Fs"], 0.3)
    slao_kernels.fold_(m["Ws"], m["ups"], m["downs"], 0.5)
    return report


def written(m: Lists) -> list[Tensor]:
    return [bits(tensor) for tensor in m["As"] + m["Ws"]]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_five_runs_are_bitwise_equal():
    start, results = model(), []
    for _ in range(5):
        m = on_gpu(start)
        report = all_three(m)
        results.append(written(m) + [bits(R) for R in report.r])
        assert report.deficient == [6, 7]
    assert all(same(results[0], other) for other in results[1:])


@pytest.fixture
def start() -> Lists:
    return model()


@pytest.fixture
def expected(start: Lists) -> list[Tensor]:
    m = on_gpu(start)
    all_three(m)
    torch.cuda.synchronize()
    return written(m)


def test_captured_and_replayed(start, expected):
    """A graph keeps its own table, and what it computes is what the calls compute."""
    m = on_gpu(start)
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
        assert same(written(m), expected)
    assert report.deficient == [6, 7]


def test_on_a_side_stream(start, expected):
    m = on_gpu(start)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        all_three(m)
    torch.cuda.current_stream().wait_stream(side)
    assert same(written(m), expected)


@pytest.mark.parametrize("finite", [True, False])
def test_nothing_waits_for_the_device(finite, start):
    """Nor for a NaN, of which the report tells when it is read."""
    m = on_gpu(start)
    if not finite:
        m["As"][1][2, 3] = float("nan")
    torch.cuda.set_sync_debug_mode("error")
    try:
        report = all_three(m)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if not finite:
        with pytest.raises(ValueError, match=r"As\[1\]: has NaN or infinite"):
            _ = report.deficient


def test_every_device(start, expected):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    m = on_gpu(start, "cuda:1")
    all_three(m)
    assert torch.cuda.current_device() == 0
    assert same(written(m), expected)
