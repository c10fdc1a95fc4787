"""The hi/lo split: what its terms hold, ranges, what is not finite; and the branch of precision="adapter" around it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import slao_kernels
from slao_kernels import dispatch
from slao_kernels.ops.lora_linear import hilo, reference, wide
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
    matrix = hilo._in_range(draw(64, 700), 1, dtype)[0]
    for terms, error in enumerate(errors, 1):
        parts = hilo.split(matrix, dtype, terms)
        assert [part.dtype for part in parts] == [dtype] * terms
        found = error_ratio(sum(part.double() for part in parts), matrix.double())
        assert 0.9 * error <= found <= error


def test_scales_are_exact_powers_of_two():
    matrix = draw(40, 90) * torch.logspace(-30, 30, 40, dtype=torch.float32)[:, None]
    scaled, scale = hilo._in_range(matrix, 1, torch.float16)
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
    found, outer = hilo.shrink(x, A * size, product), hilo.outer(t * size, x, product)
    assert torch.equal(found, hilo.shrink(x, A, product) * size)
    assert torch.equal(outer, hilo.outer(t, x, product) * size)
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
    hilo.add_(y, t, B, 0.7)
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
    t = hilo.shrink(x, A, product)
    dA = hilo.outer(t, x, product)
    hilo.add_(y, t, B, 1.0)
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
    assert not hilo.shrink(x, nothing, product).any()
    assert not hilo.outer(torch.zeros(5, 3), x, product).any()
    before = y.clone()
    hilo.add_(y, torch.zeros(5, 3), draw(6, 3), 1.0)
    hilo.add_(y, draw(5, 3), torch.zeros(6, 3), 1.0)
    assert torch.equal(y, before)


# The branch: torch's products in blocks of rows, and by the split


NATIVE = dispatch.why_not("lora_linear", "native", "cpu")
BACKENDS = ["reference", "eager"]
BACKENDS += [pytest.param("native", marks=pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE)))]
NAMES = ("x", "weight", "bias", "A", "B")


@pytest.fixture(params=["blocks", "split"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways on this machine."""
    if request.param == "split":
        monkeypatch.setattr(wide, "adds_split", wide.splits)
        monkeypatch.setattr(wide, "has_fp32_products", wide.splits)
        monkeypatch.setattr(wide, "_mm", product)
    else:
        monkeypatch.setattr(wide, "adds_split", lambda y, B: False)
        monkeypatch.setitem(wide._BLOCK, "cpu", 40 * 16)  # several blocks
    return request.param


def make(
    shape: tuple[int, ...], k: int, n: int, r: int, narrow: torch.dtype, adapter: torch.dtype
) -> dict[str, Tensor]:
    return {
        "x": draw(*shape, k).to(narrow),
        "weight": (draw(n, k, seed=1) * k**-0.5).to(narrow),
        "bias": draw(n, seed=2).to(narrow),
        "A": (draw(r, k, seed=3).double() * k**-0.5).to(adapter),
        "B": (draw(n, r, seed=4).double() * 3 * r**-0.5).to(adapter),
        "dy": draw(*shape, n, seed=5).to(narrow),
    }


def run(inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES}
    y = slao_kernels.lora_linear(*leaves.values(), 0.7, precision="adapter", **options)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["dy"])
    return {"y": y.detach(), **dict(zip(NAMES, grads, strict=True))}


def oracle(inputs: dict[str, Tensor], x_dropped: Tensor | None = None) -> dict[str, Tensor]:
    x, weight, bias, A, B = leaves = [inputs[name].double().requires_grad_() for name in NAMES]
    if x_dropped is not None:  # with its rounding, which the gradient does not see
        masked = x * (x_dropped != 0) / 0.6
        x_dropped = masked + (x_dropped.double() - masked).detach()
    y = reference.lora_linear(x, x_dropped, weight, bias, A, B, 0.7)
    grads = torch.autograd.grad(y, leaves, inputs["dy"].double())
    return {"y": y.detach(), **dict(zip(NAMES, grads, strict=True))}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    """Every result in its tensor's dtype, and as exact as that dtype is: dA and dB to fp32, not to bf16."""
    for name, value in expected.items():
        dtype = inputs["x" if name == "y" else name].dtype
        assert found[name].dtype == dtype, name
        tolerance = TOLERANCE[min(dtype, torch.float32, key=lambda d: d.itemsize)]
        assert error_ratio(found[name], value) <= tolerance, name


SHAPES = [((1,), 64, 48, 8), ((7,), 33, 17, 1), ((2, 5), 40, 24, 12), ((130,), 96, 80, 64), ((20,), 300, 280, 256)]
SHAPES += [((0,), 24, 40, 8), ((2, 0), 24, 40, 4), ((), 32, 24, 4)]


@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, backend, narrow, way):
    inputs = make(*shape, narrow, torch.float32)
    found = run(inputs, backend=backend)
    close(found, oracle(inputs), inputs)
    again = run(inputs, backend=backend)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("narrow", [*NARROW, torch.float32], ids=str)
def test_fp64_adapters(narrow, way):
    """Nothing to split them into: blocks of rows."""
    inputs = make((37,), 40, 24, 6, narrow, torch.float64)
    found = run(inputs, backend="eager")
    close(found, oracle(inputs), inputs)
    if narrow != torch.float32:
        assert error_ratio(found["A"], oracle(inputs)["A"]) <= 1e-13


@pytest.mark.parametrize("layout", ["transposed", "columns", "expanded", "adapters"])
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_layouts(narrow, layout, way):
    inputs = make((33,), 40, 24, 6, narrow, torch.float32)
    change = {
        "transposed": lambda v: v.t().contiguous().t(),
        "columns": lambda v: torch.cat([v, v], 1)[:, : v.shape[1]],
        "expanded": lambda v: v[:1].expand(v.shape),
        "adapters": lambda v: v.t().contiguous().t(),
    }[layout]
    for name in ("A", "B") if layout == "adapters" else ("x", "dy"):
        inputs[name] = change(inputs[name])
    close(run(inputs, backend="eager"), oracle(inputs), inputs)


@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_dropout(narrow, way):
    inputs = make((64,), 40, 24, 6, narrow, torch.float32)
    torch.manual_seed(3)
    found = run(inputs, backend="eager", dropout=0.4)
    torch.manual_seed(3)
    close(found, oracle(inputs, torch.nn.functional.dropout(inputs["x"], 0.4)), inputs)


@pytest.mark.parametrize("needs", [(True, False, True, True), (False, False, False, True), (False, True, True, False)])
def test_operator_contract(needs, way):
    inputs = make((6,), 16, 24, 4, torch.bfloat16, torch.float32)
    x, weight, bias, A, B, dy = (inputs[name] for name in (*NAMES, "dy"))
    forward = (x, None, weight, bias, A, B, 0.5, "eager", None, 0.0, True)
    torch.library.opcheck(torch.ops.slao_kernels.lora_linear.default, forward)
    backward = (
        dy,
        x,
        x.clone() if needs[1] else None,
        weight,
        x.float() @ A.t(),
        A,
        B,
        0.5,
        *needs,
        "eager",
        None,
        0.0,
        True,
    )
    torch.library.opcheck(torch.ops.slao_kernels.lora_linear_backward.default, backward)


def test_no_wide_copy_of_x_or_y(way):
    """The largest fp32 tensor that a pass makes is a block of rows, or of the rank's size."""
    inputs = make((400,), 64, 64, 2, torch.bfloat16, torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            for value in found if isinstance(found, (tuple, list)) else [found]:
                if isinstance(value, Tensor) and value.dtype == torch.float32:
                    largest = max(largest, value.numel())
            return found

    A, B = inputs["A"], inputs["B"]
    with Watch():
        y, t = wide.forward(inputs["x"], None, inputs["weight"], None, A, B, 0.7)
        needs = (True, False, True, True)
        wide.backward(inputs["dy"], inputs["x"], None, inputs["weight"], t, A, B, 0.7, *needs)
    assert y.dtype == torch.bfloat16
    # x has 400 × 64. A block has at least 16 rows; the split's terms are padded to rank 16.
    assert largest <= (16 * 64 if way == "blocks" else 400 * 16)


# CUDA's own products


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("shape", [((512,), 256, 320, 16), ((7,), 33, 17, 3), ((0,), 24, 40, 8)], ids=str)
def test_on_a_gpu(shape, narrow):
    inputs = {name: value.cuda() for name, value in make(*shape, narrow, torch.float32).items()}
    assert wide.has_fp32_products(inputs["x"], inputs["A"]) == (inputs["x"].numel() > 0 and not torch.version.hip)
    close(run(inputs, backend="eager"), oracle(inputs), inputs)
