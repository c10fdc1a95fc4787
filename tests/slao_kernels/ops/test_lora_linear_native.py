"""The compiled core's rank-r products one by one: every instruction set against fp64, and any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import slao_kernels
from slao_kernels import dispatch, native
from slao_kernels.ops.lora_linear import native as ours
from slao_kernels.testing import error_ratio

MISSING = dispatch.why_not("lora_linear", "native", "cpu")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

# One fp32 sum of thousands of products errs by some 3e-7; a bf16 result is rounded once, 1.7e-3 RMS.
RATIO = {torch.float32: 4e-7, torch.bfloat16: 2e-3}
# (M, K, r): K and r stand for any large and small side. The last: more columns than one strip, more rows than a block.
SHAPES = [
    (1, 8, 1),
    (3, 2, 2),
    (3, 1, 1),
    (7, 33, 12),
    (50, 35, 3),
    (33, 96, 16),
    (65, 130, 17),
    (5, 1000, 32),
    (40, 64, 64),
    (300, 700, 8),
]


@pytest.fixture(params=["avx2", "avx512", "avx512bf16", "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        native.core().use_lora_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    ours.codes.cache_clear()
    yield request.param
    native.core().use_lora_isa("auto")
    ours.codes.cache_clear()


@pytest.fixture
def torchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's versions are out of reach: what is computed, the core has computed."""

    def refuse(*args: object) -> None:
        raise AssertionError("not computed by the core")

    for name in ("shrink", "expand_", "grad_t", "grad_A"):
        monkeypatch.setattr(ours.skinny, name, refuse)


def has(dtype: torch.dtype, r: int, isa: str) -> None:
    if dtype not in ours.codes() or (isa == "avx2" and r > 32):
        pytest.skip(f"{isa} has no code for {dtype} at r = {r}: torch's products serve it (tested as lora_linear)")


def strided(rows: int, columns: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Unit columns in rows that lie further apart; NaN between them."""
    whole = torch.full((rows, columns + 3), torch.nan, dtype=dtype)
    whole[:, 1 : columns + 1] = torch.randn(rows, columns, generator=g, dtype=torch.float64).to(dtype)
    return whole[:, 1 : columns + 1]


@pytest.mark.parametrize("dtype", list(RATIO), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(isa, shape, dtype, torchs_products):
    m, k, r = shape
    has(dtype, r, isa)
    g = torch.Generator().manual_seed(m)
    x, A, t = strided(m, k, dtype, g), strided(r, k, dtype, g), strided(m, r, dtype, g)
    B, bias = strided(k, r, dtype, g), torch.randn(k, generator=g).to(dtype)
    X, AA, T, BB = x.double(), A.double(), t.double(), B.double()

    def close(found: Tensor, exact: Tensor) -> None:
        few = dtype == torch.bfloat16 and exact.numel() < 64  # no average: the worst rounding of one element
        assert error_ratio(found.double(), exact) <= (2**-8 if few else RATIO[dtype])

    close(ours.shrink(x, A), X @ AA.T)
    for b in (None, bias):
        y = torch.full_like(x, torch.nan)
        ours.expand_(y, t, B, 0.7, b)
        close(y, 0.7 * T @ BB.T + (0 if b is None else b.double()))
    ours.expand_(y, t, A.t(), 1.0)
    close(y, T @ AA)
    grad, dB, dA = (torch.full(size, torch.nan, dtype=dtype) for size in ((m, r), (k, r), (r, k)))
    ours.grad_t(x, t, B, 0.7, grad, dB)
    close(grad, 0.7 * X @ BB)
    close(dB, 0.7 * X.T @ T)
    ours.grad_A(t, x, dA)
    close(dA, T.T @ X)


@pytest.mark.parametrize("dtype", list(RATIO), ids=str)
def test_small_matrices_without_a_unit_stride(isa, dtype):
    """The core's tiles assume one; such an A or B is torch's. NaN between the elements shows what is read instead."""

    def spread(matrix: Tensor) -> Tensor:
        return torch.stack([matrix, torch.full_like(matrix, torch.nan)], -1)[..., 0]

    x, A, B, t = (torch.randn(size).to(dtype) for size in ((20, 64), (4, 64), (64, 4), (20, 4)))
    torch.testing.assert_close(ours.shrink(x, spread(A)), ours.shrink(x, A))
    for b, dense in ((spread(B), B), (spread(A).t(), A.t())):
        found, expected = torch.empty_like(x), torch.empty_like(x)
        ours.expand_(found, t, b, 0.7)
        ours.expand_(expected, t, dense, 0.7)
        torch.testing.assert_close(found, expected)
    found, expected = torch.empty_like(t), torch.empty_like(t)
    ours.grad_t(x, t, spread(B), 0.7, found, None)
    ours.grad_t(x, t, B, 0.7, expected, None)
    torch.testing.assert_close(found, expected)


def test_neighbours_are_not_written(isa):
    """Results that are views of a wider matrix, as the slices of a group's stacked ranks are."""
    dtype = torch.bfloat16 if torch.bfloat16 in ours.codes() else torch.float32
    x, B, t = torch.ones(9, 22, dtype=dtype), torch.ones(22, 5, dtype=dtype), torch.ones(9, 5, dtype=dtype)
    stacked = torch.full((9, 16), -1.0, dtype=dtype)
    ours.grad_t(x, t, B, 1.0, stacked[:, 5:10], None)
    assert (stacked[:, 5:10] == 22).all()
    assert (stacked[:, :5] == -1).all()
    assert (stacked[:, 10:] == -1).all()
    wide = torch.full((9, 30), -1.0, dtype=dtype)
    ours.expand_(wide[:, 3:25], t, B, 1.0)
    assert (wide[:, 3:25] == 5).all()
    assert (wide[:, :3] == -1).all()
    assert (wide[:, 25:] == -1).all()


@pytest.mark.parametrize("dtype", list(RATIO), ids=str)
def test_the_answer_does_not_depend_on_the_threads(isa, dtype, torchs_products):
    has(dtype, 16, isa)
    x, A, B = torch.randn(700, 600).to(dtype), torch.randn(16, 600).to(dtype), torch.randn(600, 16).to(dtype)
    w, dy = torch.eye(600).to(dtype), torch.randn(700, 600).to(dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        t = ours.shrink(x, A)
        parts = [t, *ours.backward(dy, x, None, w, t, A, B, 0.5, False, False, True, True)[2:]]
        y = torch.empty_like(x)
        ours.expand_(y, t, B, 0.5)
        results.append([*parts, y])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "why",
    ["rank", "fp64", "fp16", "column stride", "empty", "A not contiguous", "mixed dtypes"],
)
def test_what_the_core_cannot_do_is_torchs(why):
    """The same answer as the eager backend, bit for bit."""
    dtype = {"fp64": torch.float64, "fp16": torch.float16}.get(why, torch.bfloat16)
    k, r = 32, 80 if why == "rank" else 4
    x = torch.randn(0 if why == "empty" else 6, k).to(dtype)
    A, B = torch.randn(r, k).to(dtype), torch.randn(24, r).to(dtype)
    if why == "column stride":
        x = x.t().contiguous().t()
    if why == "A not contiguous":
        A = A.t().contiguous().t()
    precision = "base"
    if why == "mixed dtypes":
        A, B, precision = A.float(), B.float(), "adapter"
    w = torch.randn(24, k).to(dtype)
    found = [
        slao_kernels.lora_linear(x, w, None, A, B, 0.5, precision=precision, backend=name)
        for name in ("native", "eager")
    ]
    if why == "A not contiguous":  # some of the products are the core's all the same
        torch.testing.assert_close(*found)
    else:
        assert torch.equal(*found)


@pytest.mark.parametrize("r", [1, 16, 64])
def test_fp32_outer_of_a_split(isa, r, monkeypatch):
    """precision="adapter": dA and dB in fp32 from a bf16 x, more ranks than the core takes at once."""
    has(torch.bfloat16, r, isa)
    monkeypatch.setattr(ours, "_SPLIT_FROM", 1)
    monkeypatch.setattr(ours.skinny, "outer_wide", None)
    g = torch.Generator().manual_seed(r)
    x, t = strided(70, 130, torch.bfloat16, g), torch.randn(70, r, generator=g)
    exact = 0.7 * t.double().t() @ x.double()
    for out in (torch.full((r, 130), torch.nan), torch.full((130, r), torch.nan).t()):
        ours._THIS.outer_wide(t, x, out, 0.7)
        assert error_ratio(out, exact) <= RATIO[torch.float32]
