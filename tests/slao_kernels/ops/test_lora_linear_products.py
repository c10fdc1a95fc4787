"""The rank-r products in Triton against fp64: value, workspaces, layouts; and which of two ways grad_t goes.

lora_linear and its siblings on them: test_every_op.py and test_every_node.py, interpreted.
"""

from __future__ import annotations

import math

import pytest
import torch
from on_triton import DEVICE, DTYPES, close, draw, on_device
from oracle import INTERPRETED, check, exact, laid_out, make, ours

from slao_kernels.ops.lora_linear import products
from slao_kernels.testing import TOLERANCE, error_ratio

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops.lora_linear import triton as ours_on_triton
from slao_kernels.ops.lora_linear import triton_kernels

pytestmark = pytest.mark.usefixtures("poisoned")

RANKS = [1, 8, 12, 16, 24, 64, 100, 256]
# (M, K): one row, odd sizes, sums split into parts, several blocks of rows
SIZES = [(1, 2112), (3, 33), (70, 130), (300, 48), (1030, 17)]
kernels, torchs = ours_on_triton.products(), products.products()


def grid() -> list:
    """Every size and every rank at one dtype or another is not exhaustive."""
    found = []
    for i, size in enumerate(SIZES):
        for j, r in enumerate(RANKS):
            for d, dtype in enumerate(DTYPES):
                if INTERPRETED and r > 64 and i not in (1, 2):  # takes ten seconds and more
                    continue
                marks = [] if (i + j) % 3 == d and (r <= 64 or i in (1, 2)) else [pytest.mark.exhaustive]
                found.append(pytest.param(size, r, dtype, marks=marks, id=f"{size}-{r}-{dtype}"))
    return found


@on_device
@pytest.mark.parametrize(("size", "r", "dtype"), grid())
def test_products(size, r, dtype):
    """shrink, grad_A and grad_t, both orders of its passes, each against fp64 and against torch's own."""
    (m, k), s = size, 0.7
    x, t, A = draw(m, k, dtype=dtype), draw(m, r, dtype=dtype, seed=1), draw(r, k, dtype=dtype, seed=2, scale=k**-0.5)
    close(kernels.shrink(x, A), x.double() @ A.double().t(), torchs.shrink(x, A))
    close(kernels.grad_A(t, x), t.double().t() @ x.double(), torchs.grad_A(t, x))
    B = A.t().contiguous()
    g, dB = kernels.grad_t(x, t, B, s, True, True)
    torchs_g, torchs_dB = torchs.grad_t(x, t, B, s, True, True)
    close(g, s * x.double() @ B.double(), torchs_g)
    close(dB, s * x.double().t() @ t.double(), torchs_dB)


@on_device
@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("r", [5, 32, 128, 256])
@pytest.mark.parametrize("size", [(1, 720), (130, 304) if INTERPRETED else (300, 1104), (65, 16)], ids=str)
def test_one_pass_and_two_passes(size, r, one_pass, monkeypatch):
    """The byte count chooses one of them; here each has every shape, and each subset of the outputs."""
    chosen = []
    monkeypatch.setattr(ours_on_triton, "one_pass_pays", lambda *args: chosen.append(args) or one_pass)
    (m, n), dtype = size, torch.float16
    dy, t, B = draw(m, n, dtype=dtype), draw(m, r, dtype=dtype, seed=1), draw(n, r, dtype=dtype, seed=2)
    exact_g, exact_dB = 0.3 * dy.double() @ B.double(), 0.3 * dy.double().t() @ t.double()
    for wanted in ((True, True), (True, False), (False, True)):
        g, dB = kernels.grad_t(dy, t, B, 0.3, *wanted)
        assert (g is not None, dB is not None) == wanted
        assert g is None or error_ratio(g, exact_g) <= TOLERANCE[dtype]
        assert dB is None or error_ratio(dB, exact_dB) <= TOLERANCE[dtype]
    assert len(chosen) == 1


@on_device
@pytest.mark.parametrize("fits", [True, False])
def test_beside_a_large_n_dy_is_read_twice(fits, monkeypatch):
    """The parts of the one-pass dB, ceil(M / block_m) N r of fp32, have a cap."""
    m, n, r, dtype = 1030, 256, 8, torch.float16
    dy, t, B = draw(m, n, dtype=dtype), draw(m, r, dtype=dtype, seed=1), draw(n, r, dtype=dtype, seed=2)
    tile, _ = ours_on_triton._tile("grad_t", dy, r)
    parts = -(-m // tile.block_m) * n * r * 4
    monkeypatch.setattr(ours_on_triton, "_MAX_PARTS", parts if fits else parts - 1)
    monkeypatch.setattr(ours_on_triton, "one_pass_pays", lambda *args: True)
    launched = []
    launch = ours_on_triton.launch
    monkeypatch.setattr(ours_on_triton, "launch", lambda k, *a, **c: launched.append(k.__name__) or launch(k, *a, **c))
    g, dB = kernels.grad_t(dy, t, B, 0.3, True, True)
    assert launched == (["grad_t_kernel"] if fits else ["shrink_kernel", "outer_kernel"])
    assert error_ratio(g, 0.3 * dy.double() @ B.double()) <= TOLERANCE[dtype]
    assert error_ratio(dB, 0.3 * dy.double().t() @ t.double()) <= TOLERANCE[dtype]


def test_the_cap_is_for_a_head_and_not_for_a_block():
    """128,256 words at 8,192 tokens and r = 16 would be half a gigabyte of parts; 8,192 features are within."""
    block_m = ours_on_triton.tiles.find("grad_t", torch.bfloat16, 8192, 128256, 16).block_m
    assert -(-8192 // block_m) * 128256 * 16 * 4 > 4 * ours_on_triton._MAX_PARTS
    assert -(-8192 // block_m) * 8192 * 16 * 4 <= ours_on_triton._MAX_PARTS


@on_device
@pytest.mark.parametrize("layout", ["dense", "transposed", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout, dtype):
    sizes = (70, 130), (12, 130), (70, 12)
    x, A, g = (laid_out(draw(*size, dtype=dtype, seed=i), layout) for i, size in enumerate(sizes))
    assert error_ratio(kernels.shrink(x, A), x.double() @ A.double().t()) <= TOLERANCE[dtype]
    assert error_ratio(kernels.grad_A(g, x), g.double().t() @ x.double()) <= TOLERANCE[dtype]
    out, dB = kernels.grad_t(x, g, A.t(), 0.5, True, True)
    assert error_ratio(out, 0.5 * x.double() @ A.double().t()) <= TOLERANCE[dtype]
    assert error_ratio(dB, 0.5 * x.double().t() @ g.double()) <= TOLERANCE[dtype]


@on_device
def test_sums_are_split_and_repeatable(monkeypatch):
    """Small batches cut K, large ones cut M; bitwise the same each time."""
    seen = []
    split = ours_on_triton.tiles.split
    monkeypatch.setattr(ours_on_triton.tiles, "split", lambda *args: seen.append(split(*args)) or seen[-1])
    for m, k in ((2, 3000), (2000, 40)):
        x, A, g = draw(m, k), draw(8, k, seed=1), draw(m, 8, seed=2)
        results = [
            (kernels.shrink(x, A), kernels.grad_A(g, x), kernels.grad_t(x, g, A.t(), 1.0, True, True)[1])
            for _ in range(2)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert max(parts for parts, _ in seen) > 1
    assert min(parts for parts, _ in seen) == 1


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1,), (255,), (4, 64), (257, 3), (3, 700)], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3, 15, 16, 17, 40])
def test_a_sum_of_parts(parts, size, dtype):
    """Fewer parts than are read at once, as many, and remainders; nothing beside the sum is written."""
    workspace, whole = draw(parts, *size), draw(2 * math.prod(size), dtype=dtype, seed=1)
    out, beside = (half.view(size) for half in whole.chunk(2))
    old = beside.clone()
    triton_kernels.gather(workspace, out)
    close(out, workspace.double().sum(0), workspace.sum(0).to(dtype))
    assert torch.equal(beside, old)
    found = out.clone()
    triton_kernels.gather(workspace, out)
    assert torch.equal(out, found)


@pytest.mark.parametrize("kernel", ["shrink", "outer"])
@pytest.mark.parametrize("r", [24, 100, 200, 256])
def test_one_block_holds_the_rank(kernel, r):
    """So x is read once; ranks that are no multiple of 16 too."""
    tile, _ = ours_on_triton._tile(kernel, torch.zeros(512, 4096, dtype=torch.bfloat16), r)
    assert tile.block_r >= r


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 4096, 11008])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("programs", [1, 7, 500])
def test_parts_cover_the_sum_exactly(size, block, programs):
    parts, per_part = ours_on_triton.tiles.split(size, block, programs, 132)
    assert per_part % block == 0
    assert (parts - 1) * per_part < size <= parts * per_part
    assert parts == 1 or per_part >= 4 * block


@on_device
def test_a_rank_beyond_the_kernels_is_torchs():
    inputs = make((9,), 300, 280, 270, torch.float32, device=DEVICE)
    check("linear", ours("linear", inputs, backend="triton"), exact("linear", inputs), inputs)


@on_device
@pytest.mark.parametrize("narrow", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [((1,), 64, 48, 8), ((2, 5), 33, 17, 1), ((70,), 96, 80, 12), ((20,), 130, 110, 100)])
def test_fp32_adapters(shape, narrow, monkeypatch):
    """precision="adapter": t, g, dA and dB in fp32 by the kernels, at three times the rank (a tile has up to 256)."""

    def refuse(*args: object) -> None:
        raise AssertionError("not computed by the kernels")

    for name in ("shrink_wide", "outer_wide"):
        monkeypatch.setattr(products.TorchProducts, name, refuse)
    inputs = make(*shape, narrow, torch.float32, device=DEVICE)
    inputs["B"] *= 9
    found = ours("linear", inputs, backend="triton", precision="adapter")
    check("linear", found, exact("linear", inputs), inputs, "adapter")
