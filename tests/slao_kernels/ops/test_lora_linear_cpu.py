"""The compiled core's rank-r products one by one: every instruction set against fp64, and any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from oracle import check, exact, make, ours
from torch import Tensor

from slao_kernels import dispatch, native
from slao_kernels.ops.lora_linear import cpu
from slao_kernels.ops.lora_linear.products import TorchProducts
from slao_kernels.testing import error_ratio

MISSING = dispatch.why_not("lora_linear", "native", "cpu")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
core = cpu.products()

bf16, fp32 = torch.bfloat16, torch.float32
# One fp32 sum of thousands of products errs by some 3e-7; a bf16 result is rounded once, 1.7e-3 RMS.
RATIO = {fp32: 4e-7, bf16: 2e-3}
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


@pytest.fixture(params=["avx512bf16", "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        native.core().use_lora_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.core().use_lora_isa("auto")


@pytest.fixture
def torchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's versions are out of reach: what is computed, the core has computed."""

    def refuse(*args: object) -> None:
        raise AssertionError("not computed by the core")

    for name in ("forward", "backward", "shrink", "linear_", "grad_t", "grad_A", "grad_source"):
        monkeypatch.setattr(TorchProducts, name, refuse)


def strided(rows: int, columns: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Unit columns in rows that lie further apart; NaN between them."""
    whole = torch.full((rows, columns + 3), torch.nan, dtype=dtype)
    whole[:, 1 : columns + 1] = torch.randn(rows, columns, generator=g, dtype=torch.float64).to(dtype)
    return whole[:, 1 : columns + 1]


def spread(matrix: Tensor) -> Tensor:
    """The same without a unit stride, NaN between the elements."""
    return torch.stack([matrix, torch.full_like(matrix, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize("adapter", [bf16, fp32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(isa, shape, adapter, torchs_products, poisoned):
    """A and B may be fp32: they are rounded as they are read, and dB is not."""
    m, k, r = shape
    g = torch.Generator().manual_seed(m)
    x, A, t = strided(m, k, bf16, g), strided(r, k, adapter, g), strided(m, r, bf16, g)
    B, bias = strided(k, r, adapter, g), torch.randn(k, generator=g).to(bf16)
    X, AA, T, BB = x.double(), A.bfloat16().double(), t.double(), B.bfloat16().double()

    def close(found: Tensor, expected: Tensor) -> None:
        few = found.dtype == bf16 and expected.numel() < 64  # no average: the worst rounding of one element
        assert error_ratio(found.double(), expected) <= (2**-8 if few else RATIO[found.dtype])

    close(core.shrink(x, A), X @ AA.T)
    for b in (None, bias):
        y = torch.full_like(x, torch.nan)
        core.linear_(y, x[:, :0], x.new_empty(k, 0), t, B, 0.7, b)  # K = 0: the rank's term alone
        close(y, 0.7 * T @ BB.T + (0 if b is None else b.double()))
    close(core.grad_source(t, A), T @ AA)
    grad, dB = core.grad_t(x, t, B, 0.7, True, True)
    close(grad, 0.7 * X @ BB)
    close(dB, 0.7 * X.T @ T)
    assert dB.dtype == adapter
    close(core.grad_A(t, x), T.T @ X)


@pytest.mark.parametrize("adapter", [bf16, fp32], ids=str)
@pytest.mark.parametrize("shape", [((1,), 8, 6, 1), ((2, 25), 35, 24, 3), ((300,), 130, 96, 17), ((40,), 64, 64, 64)])
def test_one_call_for_a_layer(isa, shape, adapter, torchs_products):
    """Forward and backward of one layer with everything dense, whatever is wanted of it."""
    inputs = make(*shape, bf16, adapter)
    expected = exact("linear", inputs)
    for names in (("x", "A", "B"), ("A",), ("B",), ("x",)):
        found = ours("linear", inputs, names, backend="native")
        check("linear", found, {name: expected[name] for name in ("out", *names)}, inputs)


def test_small_matrices_without_a_unit_stride(isa):
    """The core's tiles assume one; such an A or B is copied first. NaN between shows what is read instead."""
    x, A, B, t = (torch.randn(size).to(bf16) for size in ((20, 64), (4, 64), (64, 4), (20, 4)))
    torch.testing.assert_close(core.shrink(x, spread(A)), core.shrink(x, A))
    torch.testing.assert_close(core.grad_source(t, spread(A)), core.grad_source(t, A))
    for b, dense in ((spread(B), B), (spread(A).t(), A.t())):
        found, expected = (
            core.grad_t(x, t, b, 0.7, True, False),
            core.grad_t(x, t, dense.contiguous(), 0.7, True, False),
        )
        torch.testing.assert_close(found[0], expected[0])


def test_neighbours_are_not_written(isa):
    """Results that are views of a wider matrix."""
    x, t = torch.ones(9, 22, dtype=bf16), torch.ones(9, 5, dtype=bf16)
    wide = torch.full((9, 30), -1.0, dtype=bf16)
    cpu._expand(t, torch.ones(5, 22, dtype=bf16), wide[:, 3:25], 1.0, None)
    assert (wide[:, 3:25] == 5).all()
    stacked = torch.full((9, 16), -1.0, dtype=bf16)
    cpu._shrink(x, torch.ones(22, 5, dtype=bf16), stacked[:, 5:10], 1.0)
    assert (stacked[:, 5:10] == 22).all()
    rows = torch.full((24, 7), -1.0, dtype=fp32)
    cpu._outer(x, t, rows[1:23, 1:6], 1.0)
    assert (rows[1:23, 1:6] == 9).all()
    for whole, inner in ((wide, wide[:, 3:25]), (stacked, stacked[:, 5:10]), (rows, rows[1:23, 1:6])):
        inner.fill_(-1.0)
        assert (whole == -1).all()


def test_the_answer_does_not_depend_on_the_threads(isa):
    inputs = make((700,), 600, 500, 16, bf16, fp32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(ours("linear", inputs, ("A", "B"), backend="native"))
        g, x = inputs["y"][:, :16], inputs["x"]
        results[-1] |= {"t": core.shrink(x, inputs["A"]), "g A": core.grad_source(g, inputs["A"])}
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in ("A", "B", "t", "g A"))


@pytest.mark.parametrize(
    "why", ["rank", "fp64", "fp32", "fp16", "column stride", "empty", "mixed dtypes", "three layers"]
)
def test_what_the_core_cannot_do_is_torchs(why):
    """The same answer as the eager backend, bit for bit."""
    dtype = {"fp64": torch.float64, "fp16": torch.float16, "fp32": fp32}.get(why, bf16)
    op = "three layers" if why == "three layers" else "linear"
    inputs = make((0 if why == "empty" else 6,), 32, 24, 80 if why == "rank" or op != "linear" else 4, dtype)
    options = {}
    if why == "column stride":
        inputs["x"] = inputs["x"].t().contiguous().t()
    if why == "mixed dtypes":
        inputs |= {name: inputs[name].float() for name in ("A", "B")}
        options["precision"] = "adapter"
    if why == "column stride":  # of the products, those that do not read x are the core's all the same
        found = ours(op, inputs, backend="native")
        check(op, found, exact(op, inputs), inputs)
        return
    found, torchs = (ours(op, inputs, backend=name, **options) for name in ("native", "eager"))
    assert all(torch.equal(found[name], torchs[name]) for name in torchs)


@pytest.mark.parametrize("r", [1, 16, 64, 80])
def test_fp32_outer_of_a_split(isa, r, monkeypatch):
    """precision="adapter": dA and dB in fp32 from a bf16 x, more ranks than the core takes at once."""
    monkeypatch.setattr(cpu, "_SPLIT_FROM", 1)
    monkeypatch.setattr(TorchProducts, "outer_wide", None)
    g = torch.Generator().manual_seed(r)
    x, t = strided(70, 130, bf16, g), torch.randn(70, r, generator=g)
    found = core.outer_wide(t, x, 0.7)
    assert error_ratio(found, 0.7 * t.double().t() @ x.double()) <= RATIO[fp32]
