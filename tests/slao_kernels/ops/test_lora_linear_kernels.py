"""The rank-r products in Triton against fp64, and lora_linear on them: value, gradients, workspaces, layouts."""

from __future__ import annotations

import pytest
import test_lora_linear as eager_tests
import torch
from on_triton import DTYPES, NAMES, close, draw, empty, interpreted, make, on_device
from torch import Tensor

import slao_kernels
from slao_kernels.ops.lora_linear import skinny
from slao_kernels.testing import TOLERANCE, error_ratio

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops.lora_linear import kernels

pytestmark = pytest.mark.usefixtures("poisoned")
test_under_the_interpreter = interpreted(__file__, at_least=150)

RANKS = [1, 8, 12, 16, 24, 64, 100, 256]
# (M, K): one row, odd sizes, sums split into parts, several blocks of rows
SIZES = [(1, 2112), (3, 33), (70, 130), (300, 48), (1030, 17)]


def layouts(x: Tensor) -> dict[str, Tensor]:
    wide = torch.cat([x, x, x[:, :3]], 1)
    return {"dense": x, "transposed": x.t().contiguous().t(), "columns of a wider one": wide[:, : x.shape[1]]}


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, r, dtype):
    """shrink, grad_A and grad_t, both orders of its passes, each against fp64 and against torch's own."""
    (m, k), s = size, 0.7
    x, t, A = draw(m, k, dtype=dtype), draw(m, r, dtype=dtype, seed=1), draw(r, k, dtype=dtype, seed=2, scale=k**-0.5)
    close(kernels.shrink(x, A), x.double() @ A.double().t(), skinny.shrink(x, A))
    dA, torchs = empty(r, k, dtype=dtype), empty(r, k, dtype=dtype)
    kernels.grad_A(t, x, dA)
    skinny.grad_A(t, x, torchs)
    close(dA, t.double().t() @ x.double(), torchs)
    g, dB = empty(m, r, dtype=dtype), empty(k, r, dtype=dtype)
    torchs_g, torchs_dB = torch.empty_like(g), torch.empty_like(dB)
    B = A.t().contiguous()
    kernels.grad_t(x, t, B, s, g, dB)
    skinny.grad_t(x, t, B, s, torchs_g, torchs_dB)
    close(g, s * x.double() @ B.double(), torchs_g)
    close(dB, s * x.double().t() @ t.double(), torchs_dB)


@on_device
@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("r", [5, 32, 128, 256])
@pytest.mark.parametrize("size", [(1, 720), (300, 1104), (65, 16)], ids=str)
def test_one_pass_and_two_passes(size, r, one_pass, monkeypatch):
    """The byte count chooses one of them; here each has every shape, and each subset of the outputs."""
    chosen = []
    monkeypatch.setattr(kernels, "one_pass_pays", lambda *args: chosen.append(args) or one_pass)
    (m, n), dtype = size, torch.float16
    dy, t, B = draw(m, n, dtype=dtype), draw(m, r, dtype=dtype, seed=1), draw(n, r, dtype=dtype, seed=2)
    exact_g, exact_dB = 0.3 * dy.double() @ B.double(), 0.3 * dy.double().t() @ t.double()
    for wanted in ((True, True), (True, False), (False, True)):
        g = empty(m, r, dtype=dtype) if wanted[0] else None
        dB = empty(n, r, dtype=dtype) if wanted[1] else None
        kernels.grad_t(dy, t, B, 0.3, g, dB)
        assert g is None or error_ratio(g, exact_g) <= TOLERANCE[dtype]
        assert dB is None or error_ratio(dB, exact_dB) <= TOLERANCE[dtype]
    assert len(chosen) == 1


@on_device
@pytest.mark.parametrize("layout", ["dense", "transposed", "columns of a wider one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout, dtype):
    x = layouts(draw(70, 130, dtype=dtype))[layout]
    A = layouts(draw(12, 130, dtype=dtype, seed=1))[layout]
    g = layouts(draw(70, 12, dtype=dtype, seed=2))[layout]
    assert error_ratio(kernels.shrink(x, A), x.double() @ A.double().t()) <= TOLERANCE[dtype]
    dA = empty(12, 130, dtype=dtype)
    kernels.grad_A(g, x, dA)
    assert error_ratio(dA, g.double().t() @ x.double()) <= TOLERANCE[dtype]
    out, dB = empty(70, 12, dtype=dtype), empty(130, 12, dtype=dtype)
    kernels.grad_t(x, g, A.t(), 0.5, out, dB)
    assert error_ratio(out, 0.5 * x.double() @ A.double().t()) <= TOLERANCE[dtype]
    assert error_ratio(dB, 0.5 * x.double().t() @ g.double()) <= TOLERANCE[dtype]


@on_device
def test_sums_are_split_and_repeatable(monkeypatch):
    """Small batches cut K, large ones cut M; bitwise the same each time."""
    seen = []
    split = kernels.tiles.split
    monkeypatch.setattr(kernels.tiles, "split", lambda *args: seen.append(split(*args)) or seen[-1])
    for m, k in ((2, 3000), (2000, 40)):
        x, A, g = draw(m, k), draw(8, k, seed=1), draw(m, 8, seed=2)
        results = []
        for _ in range(2):
            dA, dB = empty(8, k, dtype=x.dtype), empty(k, 8, dtype=x.dtype)
            kernels.grad_A(g, x, dA)
            kernels.grad_t(x, g, A.t(), 1.0, torch.empty_like(g), dB)
            results.append((kernels.shrink(x, A), dA, dB))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert max(parts for parts, _ in seen) > 1
    assert min(parts for parts, _ in seen) == 1


@pytest.mark.parametrize("kernel", ["shrink", "outer"])
@pytest.mark.parametrize("r", [24, 100, 200, 256])
def test_one_block_holds_the_rank(kernel, r):
    """So x is read once; ranks that are no multiple of 16 too."""
    tile, _ = kernels._tile(kernel, torch.zeros(512, 4096, dtype=torch.bfloat16), r)
    assert tile.block_r >= r


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 4096, 11008])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("programs", [1, 7, 500])
def test_parts_cover_the_sum_exactly(size, block, programs):
    parts, per_part = kernels.tiles.split(size, block, programs, 132)
    assert per_part % block == 0
    assert (parts - 1) * per_part < size <= parts * per_part
    assert parts == 1 or per_part >= 4 * block


# The whole operation


@on_device
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("shape", eager_tests.SHAPES, ids=str)
def test_value_and_gradients(shape, dtype):
    inputs = make(*shape, dtype)
    found = eager_tests.ours(inputs, NAMES, backend="triton")
    assert all(found[name].dtype == dtype for name in ("y", *NAMES))
    eager_tests.compare(found, eager_tests.oracle(inputs, NAMES), TOLERANCE[dtype])
    again = eager_tests.ours(inputs, NAMES, backend="triton")
    assert all(torch.equal(found[name], again[name]) for name in found)


@on_device
@pytest.mark.parametrize("wanted", [("x",), ("A",), ("B",), ("A", "B"), ("weight",)], ids="+".join)
def test_subsets_of_gradients(wanted):
    inputs = make((70,), 40, 24, 8, torch.float32)
    leaves = {name: inputs[name].requires_grad_(name in wanted) for name in NAMES}
    with slao_kernels.use_backend("triton"):
        y = slao_kernels.lora_linear(*leaves.values(), 0.7)
    exact = eager_tests.oracle({name: value.detach() for name, value in inputs.items()}, NAMES)
    for name, grad in zip(wanted, torch.autograd.grad(y, [leaves[n] for n in wanted], inputs["dy"]), strict=True):
        assert error_ratio(grad, exact[name]) <= TOLERANCE[torch.float32]


@on_device
@pytest.mark.parametrize("cores", [("core", "core_delta"), ("core_delta",), ("core",)], ids="+".join)
def test_routing_core(cores):
    names = ("x", "weight", "A", "B", *cores)
    inputs = make((5, 7), 48, 40, 8, torch.float32)
    found = eager_tests.ours(inputs, names, backend="triton")
    eager_tests.compare(found, eager_tests.oracle(inputs, names), 1.5 * TOLERANCE[torch.float32])


@on_device
def test_a_rank_beyond_the_kernels_is_torchs():
    inputs = make((9,), 300, 280, 270, torch.float32)
    found = eager_tests.ours(inputs, NAMES, backend="triton")
    eager_tests.compare(found, eager_tests.oracle(inputs, NAMES), TOLERANCE[torch.float32])


@on_device
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [((1,), 64, 48, 8), ((2, 5), 33, 17, 1), ((70,), 96, 80, 12), ((20,), 130, 110, 100)])
def test_fp32_adapters(shape, narrow, monkeypatch):
    """precision="adapter": t, g, dA and dB in fp32 by the kernels, at three times the rank (a tile has up to 256)."""

    def refuse(*args: object) -> None:
        raise AssertionError("not computed by the kernels")

    monkeypatch.setattr(skinny, "shrink_wide", refuse)
    monkeypatch.setattr(skinny, "outer_wide", refuse)
    inputs = make(*shape, narrow)
    (k, n, r) = shape[1:]
    inputs |= {"A": draw(r, k, seed=1, scale=k**-0.5), "B": draw(n, r, seed=2, scale=3 * r**-0.5)}
    found = eager_tests.ours(inputs, NAMES, backend="triton", precision="adapter")
    for name, value in eager_tests.oracle(inputs, NAMES).items():
        dtype = torch.float32 if name in ("A", "B") else narrow
        assert found[name].dtype == dtype
        assert error_ratio(found[name], value) <= TOLERANCE[dtype], name
