"""precision="adapter": what the split's terms hold, ranges, what is not finite; and the branch by torch, both ways."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import SHAPES, check, exact, laid_out, make, ours
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slao_kernels.ops.lora_linear import precise, products
from slao_kernels.testing import TOLERANCE, error_ratio

NARROW = [torch.bfloat16, torch.float16]
# hi's product and the sum with the rest are rounded to fp32, 2^-25 RMS at most each.
ONCE = 2.0**-24


def product(left: Tensor, right: Tensor) -> Tensor:
    """16-bit matrices into an fp32 one, as CUDA's GEMM does, but rounded once."""
    assert left.dtype == right.dtype
    assert left.dtype in NARROW
    return (left.double() @ right.double()).float()


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


# Terms


@pytest.mark.parametrize(
    ("dtype", "errors"), [(torch.bfloat16, (1.7e-3, 2.5e-6, 0.0)), (torch.float16, (2.1e-4, 4.6e-8, 0.0))]
)
def test_what_the_terms_lose(dtype, errors):
    matrix = precise._in_range(draw(64, 700), 1, dtype)[0]
    for terms, error in enumerate(errors, 1):
        parts = precise.terms_of(matrix, dtype, terms)
        assert [part.dtype for part in parts] == [dtype] * terms
        found = error_ratio(sum(part.double() for part in parts), matrix.double())
        assert 0.9 * error <= found <= error


def test_scales_are_exact_powers_of_two():
    matrix = draw(40, 90) * torch.logspace(-30, 30, 40, dtype=torch.float32)[:, None]
    scaled, scale = precise._in_range(matrix, 1, torch.float16)
    assert ((scale.log2() % 1) == 0).all()
    assert torch.equal(scaled * scale, matrix)
    largest = scaled.abs().amax(1)
    assert (largest >= 2**14).all()
    assert (largest < 2**15).all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("size", [2.0**-70, 2.0**-40, 1.0, 2.0**30, 2.0**70])
def test_any_magnitude(size, dtype):
    """The same digits, whatever the exponent: fp16's own range ends at 6e-8 and 65504."""
    x, A, t = draw(30, 70).to(dtype), draw(12, 70, seed=1), draw(30, 12, seed=2)
    ranks = torch.logspace(-6, 6, 12, base=2.0)  # ranks of unlike size
    A, t = A * ranks[:, None], t * ranks
    found, outer = precise.shrink_split(x, A * size, product), precise.outer_split(t * size, x, product)
    assert torch.equal(found, precise.shrink_split(x, A, product) * size)
    assert torch.equal(outer, precise.outer_split(t, x, product) * size)
    assert error_ratio(found.double() / size, x.double() @ A.double().t()) <= ONCE
    assert error_ratio(outer.double() / size, t.double().t() @ x.double()) <= ONCE


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("size", [2.0**-40, 2.0**-16, 1.0, 2.0**16, 2.0**40])
@pytest.mark.parametrize("delta", [1e-2, 1.0, 1e3])
def test_add_rounds_once(delta, size, dtype):
    """t large and B small, or the other way round."""
    y, t, B = draw(50, 90).to(dtype), draw(50, 12, seed=1) * size, draw(90, 12, seed=2) * (delta / size)
    t[3] *= 1e-3  # a token far below the others
    exact = y.double() + 0.7 * t.double() @ B.double().t()
    precise.add_split_(y, t, B, 0.7)
    once = error_ratio(exact.to(dtype), exact)
    assert error_ratio(y, exact) <= 1.01 * once
    assert error_ratio(y[3], exact[3]) <= 1.01 * error_ratio(exact[3].to(dtype), exact[3])


# Not finite


def plain(x: Tensor, A: Tensor, B: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t, y and dA as PEFT's fp32 branch computes them (y standing for dy too)."""
    t = x.float() @ A.t()
    return t, y.float() + t @ B.t(), t.t() @ x.float()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["x", "A", "B", "y"])
def test_what_is_not_finite_spreads_as_in_fp32(where, bad, dtype):
    x, A, B, y = draw(9, 20), draw(4, 20, seed=1), draw(11, 4, seed=2), draw(9, 11, seed=3)
    A[:, 5] = A[:, 5].to(dtype).float()  # no low term there: its product with an infinity would be 0 · inf
    B[:, 2] = 0.5
    tensors = {"x": x, "A": A, "B": B, "y": y}
    tensors[where][2, 2 if where == "B" else 5] = bad
    x, y = x.to(dtype), y.to(dtype)
    expected_t, expected_y, expected_dA = plain(x, A, B, y)
    t = precise.shrink_split(x, A, product)
    dA = precise.outer_split(t, x, product)
    precise.add_split_(y, t, B, 1.0)
    for found, expected in ((t, expected_t), (y, expected_y), (dA, expected_dA)):
        finite = expected.isfinite()
        assert torch.equal(found.isfinite(), finite)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found[found.isinf()].float(), expected[expected.isinf()])
        assert error_ratio(found[finite], expected[finite]) <= TOLERANCE[dtype]
        assert where in ("B", "y") or not finite.all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_zeros(dtype):
    x, y, nothing = draw(5, 8).to(dtype), draw(5, 6).to(dtype), torch.zeros(3, 8)
    assert not precise.shrink_split(x, nothing, product).any()
    assert not precise.outer_split(torch.zeros(5, 3), x, product).any()
    before = y.clone()
    precise.add_split_(y, torch.zeros(5, 3), draw(6, 3), 1.0)
    precise.add_split_(y, draw(5, 3), torch.zeros(6, 3), 1.0)
    assert torch.equal(y, before)


# The branch: torch's products in blocks of rows, and by the split


@pytest.fixture(params=["blocks", "split"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways on this machine."""
    if request.param == "split":
        monkeypatch.setattr(precise, "adds_split", precise.splits)
        monkeypatch.setattr(precise, "has_fp32_products", precise.splits)
        monkeypatch.setattr(precise, "_mm", product)
    else:
        monkeypatch.setattr(precise, "adds_split", lambda y, B: False)
        monkeypatch.setitem(precise._BLOCK, "cpu", 40 * 16)  # several blocks
    return request.param


@pytest.mark.parametrize("op", ["linear", "add a bias in place", "DoRA"])
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, narrow, op, way):
    """dA and dB as exact as fp32 is, at a branch three times the base."""
    inputs = make(*shape, narrow, torch.float32)
    inputs["B"] *= 9
    found = ours(op, inputs, precision="adapter", backend="eager")
    check(op, found, exact(op, inputs), inputs, "adapter")


@pytest.mark.parametrize("narrow", [*NARROW, torch.float32], ids=str)
def test_fp64_adapters(narrow, way):
    """Nothing to split them into: blocks of rows."""
    inputs = make((37,), 40, 24, 6, narrow, torch.float64)
    found, expected = ours("linear", inputs, precision="adapter", backend="eager"), exact("linear", inputs)
    check("linear", found, expected, inputs, "adapter")
    if narrow != torch.float32:
        assert error_ratio(found["A"], expected["A"]) <= 1e-13


@pytest.mark.parametrize("layout", ["transposed", "every other", "columns", "adapters"])
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_layouts(narrow, layout, way):
    inputs = make((33,), 40, 24, 6, narrow, torch.float32)
    for name in ("A", "B") if layout == "adapters" else ("x", "dy"):
        inputs[name] = laid_out(inputs[name], "transposed" if layout == "adapters" else layout)
    check("linear", ours("linear", inputs, precision="adapter"), exact("linear", inputs), inputs, "adapter")


class Largest(TorchDispatchMode):
    """The number of elements of the largest fp32 tensor that is made within the block."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                self.numel = max(self.numel, value.numel())
        return found


def test_no_wide_copy_of_x_or_y(way):
    """The largest fp32 tensor that a pass makes is a block of rows, or of the rank's size."""
    t = make((400,), 64, 64, 2, torch.bfloat16, torch.float32)
    torchs = products.products()
    with Largest() as largest:
        y, saved = torchs.wide_forward(t["x"], None, t["weight"], None, t["A"], t["B"], 0.7)
        torchs.wide_backward(t["y"], t["x"], t["weight"], saved, t["A"], t["B"], 0.7, (True, True, True))
    assert y.dtype == torch.bfloat16
    # x has 400 × 64. A block has at least 16 rows; the split's terms are padded to rank 16.
    assert 0 < largest.numel <= (16 * 64 if way == "blocks" else 400 * 16)


# CUDA's own products


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("shape", [((512,), 256, 320, 16), ((7,), 33, 17, 3), ((0,), 24, 40, 8)], ids=str)
def test_on_a_gpu(shape, narrow):
    inputs = make(*shape, narrow, torch.float32, device="cuda")
    assert precise.has_fp32_products(inputs["x"], inputs["A"]) == (inputs["x"].numel() > 0 and not torch.version.hip)
    found = ours("linear", inputs, precision="adapter", backend="eager")
    check("linear", found, exact("linear", inputs), inputs, "adapter")
