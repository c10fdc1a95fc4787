"""DoRA's product, norms and scaling against fp64: value and every gradient, the magnitude's included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slao_kernels import dispatch
from slao_kernels.ops import dora
from slao_kernels.ops.dora import reference
from slao_kernels.ops.lora_linear import wide
from slao_kernels.testing import TOLERANCE, error_ratio

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NATIVE = dispatch.why_not("lora_linear", "native", "cpu")
BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))),
    "eager",
    "reference",
]
# (leading sizes of x, K, N, r)
SHAPES = [
    ((1,), 64, 48, 8),
    ((7,), 33, 17, 1),
    ((2, 5), 40, 24, 12),
    ((3, 1, 4), 16, 64, 16),
    ((130,), 96, 80, 64),
    ((20,), 300, 280, 256),
    ((0,), 24, 40, 8),
    ((), 32, 24, 4),
]
NAMES = ("x", "weight", "bias", "magnitude", "A", "B")
ops = torch.ops.slao_kernels


def make(shape, k: int, n: int, r: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Rounded inputs: unit tokens, a delta of a third of the base, magnitudes about the rows' norms, not equal."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype)

    return {
        "x": draw(*shape, k),
        "weight": draw(n, k, scale=k**-0.5),
        "bias": draw(n),
        "magnitude": (1 + draw(n, scale=0.2).double()).to(dtype),
        "A": draw(r, k, scale=k**-0.5),
        "B": draw(n, r, scale=r**-0.5 / 3),
        "dy": draw(*shape, n),
    }


def run(function, inputs: dict[str, Tensor], names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    leaves = {name: inputs[name].detach().clone().requires_grad_(name in names) for name in NAMES if name in inputs}
    y = function(*(leaves.get(name) for name in NAMES))
    grads = torch.autograd.grad(y, [leaves[name] for name in names], inputs["dy"].to(y.dtype))
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def oracle(inputs: dict[str, Tensor], names: tuple[str, ...] = NAMES, s: float = 0.7) -> dict[str, Tensor]:
    return run(lambda *t: reference.dora(*t, s), {k: v.double() for k, v in inputs.items()}, names)


def ours(inputs: dict[str, Tensor], names: tuple[str, ...] = NAMES, s: float = 0.7, **options) -> dict[str, Tensor]:
    return run(lambda *t: dora.apply(*t, s, **options), inputs, names)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        ratio = error_ratio(found[name], value)
        assert ratio <= tolerance, f"{name}: error ratio {ratio:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, backend, dtype, bias):
    inputs = make(*shape, dtype)
    names = NAMES if bias else tuple(name for name in NAMES if name != "bias")
    inputs = {name: value for name, value in inputs.items() if bias or name != "bias"}
    found = ours(inputs, names, backend=backend)
    assert {value.dtype for value in found.values()} == {dtype}
    # One rounding more than lora_linear: of z, or of c dy.
    compare(found, oracle(inputs, names), 1.5 * TOLERANCE[dtype])


@pytest.mark.parametrize("precision", ["base", "adapter"])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16], ids=str)
def test_wide_adapters_on_a_narrow_base(base, precision):
    """Each gradient in its own dtype; the magnitude's is summed in fp32."""
    inputs = make((150,), 96, 80, 8, torch.float32)
    inputs = {k: v if k in ("magnitude", "A", "B") else v.to(base) for k, v in inputs.items()}
    found, expected = ours(inputs, precision=precision), oracle(inputs)
    assert {name: found[name].dtype for name in NAMES} == {name: inputs[name].dtype for name in NAMES}
    compare(found, expected, 1.5 * TOLERANCE[base])


@pytest.mark.parametrize(
    "wanted", [("magnitude",), ("A", "B"), ("x",), ("bias", "magnitude"), ("weight", "A")], ids=str
)
def test_subsets_of_gradients(wanted):
    inputs = make((9,), 40, 24, 4, torch.float32)
    compare(ours(inputs, wanted), oracle(inputs, wanted), 1.5 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms(weight_dtype, transposed, monkeypatch):
    """fp32 sums of K squares, whatever the weight's dtype and strides, over one block or many."""
    t = make((1,), 200, 150, 16, torch.float32)
    weight = t["weight"].to(weight_dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    exact = (weight.double() + 1.3 * t["B"].double() @ t["A"].double()).square().sum(1).sqrt()
    whole = ops.dora_norm(weight, t["A"], t["B"], 1.3)
    assert whole.dtype == torch.float32
    assert error_ratio(whole, exact) <= 1e-6
    monkeypatch.setitem(wide._BLOCK, "cpu", 200 * 16)
    assert sum(1 for _ in wide._row_blocks(weight)) == 10
    assert error_ratio(ops.dora_norm(weight, t["A"], t["B"], 1.3), exact) <= 1e-6


@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3])
def test_norms_where_the_delta_cancels_the_weight(left):
    """W + s B A a small rest of W: the sum is formed, so its norm is as exact as the sum. From ‖W‖² + 2 s (W Aᵀ)·B + …
    it would lose twice as many digits."""
    t = make((1,), 64, 48, 8, torch.float32)
    B, A = t["B"], t["A"]
    rest = left * torch.randn(48, 64, generator=torch.Generator().manual_seed(3)) * (B @ A).square().mean().sqrt()
    weight = rest - 0.7 * (B @ A)
    exact = (weight.double() + 0.7 * B.double() @ A.double()).square().sum(1).sqrt()
    found = ops.dora_norm(weight, A, B, 0.7)
    error = error_ratio(found, exact)
    assert error <= 2e-7 / left
    squares = weight.square().sum(1) + ((2 * 0.7 * weight @ A.T) * B + 0.7**2 * (B @ (A @ A.T)) * B).sum(1)
    assert error < 0.5 * error_ratio(squares.clamp_min(0).sqrt(), exact)


@pytest.mark.parametrize("magnitude", [True, False])
def test_saves_one_tensor_of_the_outputs_size_for_the_magnitude(magnitude):
    t = make((64,), 24, 40, 3, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        arguments = [
            t[name].requires_grad_(name in ("A", "B") or (magnitude and name == "magnitude")) for name in NAMES
        ]
        dora.apply(*arguments, 0.7)
    assert sum(v.numel() == 64 * 40 for v in saved) == 1


def test_blocks_of_rows_cover_all(monkeypatch):
    t = make((103,), 48, 40, 5, torch.bfloat16)
    t |= {name: t[name].float() for name in ("A", "B", "magnitude")}
    whole = ours(t)
    monkeypatch.setitem(wide._BLOCK, "cpu", 40 * 16)
    compare(ours(t), whole, 1e-6)


def test_double_backward_is_refused():
    t = make((5,), 24, 20, 3, torch.float32)
    m = t["magnitude"].requires_grad_()
    y = dora.apply(*(t[name] for name in NAMES), 0.7)
    (dm,) = torch.autograd.grad(y.square().sum(), m, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dm.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_contract(dtype):
    t = make((2, 9), 24, 20, 4, torch.float32)
    z, bias = torch.randn(2, 9, 20).to(dtype), t["bias"].to(dtype)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.dora_norm.default, (t["weight"].to(dtype), t["A"], t["B"], 0.7), test_utils=checks)
    torch.library.opcheck(ops.dora_scale.default, (z, t["magnitude"], bias), test_utils=checks)
    torch.library.opcheck(ops.dora_scale.default, (z, t["magnitude"], None), test_utils=checks)
    for needs in ((True, True), (True, False), (False, True)):
        arguments = (t["dy"].to(dtype), z, t["magnitude"], *needs)
        torch.library.opcheck(ops.dora_scale_backward.default, arguments, test_utils=checks)
        assert [part.numel() > 0 for part in ops.dora_scale_backward(*arguments)] == list(needs)


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    inputs = make((4, 9), 24, 20, 3, torch.float32)
    compiled = torch.compile(lambda *t: dora.apply(*t, 0.7), fullgraph=True, backend="aot_eager", dynamic=False)
    compare(run(compiled, inputs), ours(inputs), 1e-6)


def test_runs_are_bitwise_equal():
    inputs = make((200,), 96, 80, 16, torch.bfloat16)
    first, second = ours(inputs), ours(inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)
