"""lora_linear against its fp64 reference: value and every gradient, over shapes, dtypes, layouts and options."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slao_kernels
from slao_kernels import dispatch
from slao_kernels.ops.lora_linear import reference
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
    ((2, 0), 24, 40, 4),
    ((), 32, 24, 4),
]


def make(shape: tuple[int, ...], k: int, n: int, r: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Rounded inputs of the size that training has: unit tokens, unit base output, a delta of a third of it."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype)

    return {
        "x": draw(*shape, k),
        "weight": draw(n, k, scale=k**-0.5),
        "bias": draw(n),
        "A": draw(r, k, scale=k**-0.5),
        "B": draw(n, r, scale=r**-0.5 / 3),
        "core": draw(r, r, scale=r**-0.5),
        "core_delta": draw(r, r, scale=r**-0.5),
        "dy": draw(*shape, n),
    }


def run(function, inputs: dict[str, Tensor], names: tuple[str, ...], **options) -> dict[str, Tensor]:
    """y and the gradient of every tensor in `names`; a tensor that the output does not reach has gradient 0."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names}
    y = function(leaves, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["dy"].to(y.dtype), allow_unused=True)
    found = {name: torch.zeros_like(inputs[name]) if g is None else g for name, g in zip(leaves, grads, strict=True)}
    return {"y": y.detach(), **found}


def oracle(inputs: dict[str, Tensor], names: tuple[str, ...], s: float = 0.7) -> dict[str, Tensor]:
    wide = {name: value.double() for name, value in inputs.items()}

    def function(t: dict[str, Tensor]) -> Tensor:
        return reference.lora_linear(
            t["x"], None, t["weight"], t.get("bias"), t["A"], t["B"], s, t.get("core"), t.get("core_delta")
        )

    return run(function, wide, names)


def ours(inputs: dict[str, Tensor], names: tuple[str, ...], s: float = 0.7, **options) -> dict[str, Tensor]:
    def function(t: dict[str, Tensor]) -> Tensor:
        return slao_kernels.lora_linear(
            t["x"],
            t["weight"],
            t.get("bias"),
            t["A"],
            t["B"],
            s,
            core=t.get("core"),
            core_delta=t.get("core_delta"),
            **options,
        )

    return run(function, inputs, names)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        ratio = error_ratio(found[name], value)
        assert ratio <= tolerance, f"{name}: error ratio {ratio:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, backend, dtype):
    names = ("x", "weight", "bias", "A", "B")
    inputs = make(*shape, dtype)
    found = ours(inputs, names, backend=backend)
    assert found["y"].dtype == dtype
    assert all(found[name].dtype == dtype for name in names)
    compare(found, oracle(inputs, names), TOLERANCE[dtype])


CORES = [("core", "core_delta"), ("core_delta",), ("core",)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cores", CORES, ids="+".join)
def test_routing_core(cores, backend, dtype):
    """C-LoRA: x through core + core_delta, A and B through core_delta only, core itself not at all."""
    names = ("x", "weight", "A", "B", *cores)
    inputs = make((5, 7), 48, 40, 8, dtype)
    found, expected = ours(inputs, names, backend=backend), oracle(inputs, names)
    if "core" in cores:
        assert not found["core"].any()
    if "core_delta" not in cores:
        assert not found["A"].any()
        assert not found["B"].any()
    # One product more in the chain (B R, R A), rounded once more.
    compare(found, expected, 1.5 * TOLERANCE[dtype])


def test_routing_gradients_equal_the_written_formula():
    """method.md's formula, term by term, in fp64."""
    t = make((31,), 20, 24, 6, torch.float64)
    found = ours(t, ("x", "A", "B", "weight", "core", "core_delta"), s=0.3)
    R, T, g = t["core"] + t["core_delta"], t["x"] @ t["A"].T, 0.3 * t["dy"] @ t["B"]
    expected = {
        "y": t["x"] @ t["weight"].T + 0.3 * T @ R.T @ t["B"].T,
        "core_delta": g.T @ T,
        "A": (g @ t["core_delta"]).T @ t["x"],
        "B": 0.3 * t["dy"].T @ (T @ t["core_delta"].T),
        "x": t["dy"] @ t["weight"] + g @ R @ t["A"],
    }
    compare(found, expected, 1e-14)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    k=st.integers(1, 70),
    n=st.integers(1, 70),
    r=st.integers(1, 20),
    seed=st.integers(0, 2**20),
    layout=st.sampled_from(["plain", "transposed", "sliced", "expanded", "flipped weight"]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    wanted=st.sets(st.sampled_from(["x", "weight", "A", "B"]), min_size=1),
)
def test_any_shape_layout_and_subset_of_gradients(rows, k, n, r, seed, layout, dtype, bias, wanted):
    inputs = make((rows,), k, n, r, dtype, seed)
    x, dy = inputs["x"], inputs["dy"]
    if layout == "transposed":
        x, dy = x.t().contiguous().t(), dy.t().contiguous().t()
    elif layout == "sliced":
        x, dy = torch.cat([x, x], 1)[:, :k], torch.cat([dy, dy])[:rows]
    elif layout == "expanded" and rows:
        x = x[:1].expand(rows, k)
    elif layout == "flipped weight":
        inputs["weight"] = inputs["weight"].t().contiguous().t()
    inputs |= {"x": x, "dy": dy}
    leaves = {name: inputs[name].detach().requires_grad_(name in wanted) for name in ("x", "weight", "A", "B")}
    b = inputs["bias"] if bias else None
    y = slao_kernels.lora_linear(leaves["x"], leaves["weight"], b, leaves["A"], leaves["B"], 0.7)
    grads = torch.autograd.grad(y, [leaves[name] for name in sorted(wanted)], dy)
    wide = {name: value.detach().double().requires_grad_(name in wanted) for name, value in leaves.items()}
    exact = reference.lora_linear(
        wide["x"], None, wide["weight"], None if b is None else b.double(), wide["A"], wide["B"], 0.7
    )
    exact_grads = torch.autograd.grad(exact, [wide[name] for name in sorted(wanted)], dy.double())
    # A single small value can cancel to almost nothing: the error is measured against the operands' size.
    for found, expected in zip((y, *grads), (exact, *exact_grads), strict=True):
        scale = max(1.0, 1.0 / max(expected.square().mean().sqrt().item(), 1e-30)) if expected.numel() else 1.0
        assert error_ratio(found, expected) <= 4 * TOLERANCE[dtype] * scale * math.sqrt(max(rows, 1))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_adapter_precision_keeps_a_large_delta_exact(narrow):
    """A delta far larger than the base output: rounded adapters lose it, precision="adapter" does not."""
    inputs = make((40, 9), 256, 200, 16, narrow)
    names = ("x", "weight", "bias", "A", "B")
    for name, seed in (("A", 1), ("B", 2)):
        drawn = make((40, 9), 256, 200, 16, torch.float32, seed)[name]
        inputs[name] = drawn * (20 if name == "B" else 1)
    expected = oracle(inputs, names)
    wide, base = (ours(inputs, names, precision=p) for p in ("adapter", "base"))
    assert wide["A"].dtype == wide["B"].dtype == torch.float32
    assert wide["y"].dtype == wide["x"].dtype == narrow
    # The output is stored narrow: its own rounding (half a unit) is all that is left of the error.
    unit = torch.finfo(narrow).eps
    assert error_ratio(wide["y"], expected["y"]) <= 0.35 * unit
    assert error_ratio(wide["A"], expected["A"]) <= 1e-6
    assert error_ratio(wide["B"], expected["B"]) <= 1e-6
    assert error_ratio(base["y"], expected["y"]) > 1.5 * error_ratio(wide["y"], expected["y"])
    assert error_ratio(wide["x"], expected["x"]) <= 0.35 * unit


def test_wide_branch_is_cut_into_row_blocks(monkeypatch):
    """Several blocks give what one block gives."""
    from slao_kernels.ops.lora_linear import wide

    inputs = make((700,), 64, 48, 8, torch.bfloat16)
    inputs |= {name: inputs[name].float() for name in ("A", "B")}
    names = ("x", "weight", "bias", "A", "B")
    whole = ours(inputs, names, precision="adapter")
    monkeypatch.setitem(wide._BLOCK, "cpu", 64 * 32)
    cut = ours(inputs, names, precision="adapter")
    for name in ("y", "x"):
        torch.testing.assert_close(cut[name], whole[name], rtol=0.02, atol=1e-6)  # at most one bf16 unit
    for name in ("A", "B"):
        assert error_ratio(cut[name], whole[name].double()) <= 1e-6


def test_saves_no_output_sized_tensor():
    """Kept for backward: x, weight, t (M, r), and tensors of the adapters' size."""
    inputs = make((512,), 64, 96, 4, torch.float32)
    leaves = {name: inputs[name].requires_grad_(name in ("x", "A", "B")) for name in ("x", "weight", "bias", "A", "B")}
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        slao_kernels.lora_linear(*leaves.values(), 0.5)
    assert sorted(map(tuple, saved)) == sorted([(512, 64), (96, 64), (512, 4), (4, 64), (96, 4)])


def test_inputs_stay_as_they_were_and_backward_runs_twice():
    inputs = make((6, 5), 32, 24, 4, torch.float32)
    names = ("x", "weight", "bias", "A", "B")
    before = {name: inputs[name].clone() for name in (*names, "dy")}
    leaves = [inputs[name].requires_grad_() for name in names]
    y = slao_kernels.lora_linear(*leaves, 0.5)
    first = torch.autograd.grad(y, leaves, inputs["dy"], retain_graph=True)
    second = torch.autograd.grad(y, leaves, inputs["dy"])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


def test_double_backward_is_refused():
    inputs = make((3,), 8, 8, 2, torch.float64)
    x = inputs["x"].requires_grad_()
    y = slao_kernels.lora_linear(x, inputs["weight"], None, inputs["A"], inputs["B"], 1.0)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_same_layer_twice_in_one_graph():
    inputs = make((9,), 24, 24, 4, torch.float64)
    A, B, x = (inputs[name].requires_grad_() for name in ("A", "B", "x"))
    twice = slao_kernels.lora_linear(
        slao_kernels.lora_linear(x, inputs["weight"], None, A, B, 0.5), inputs["weight"], None, A, B, 0.5
    )
    plain = reference.lora_linear(
        reference.lora_linear(x, None, inputs["weight"], None, A, B, 0.5), None, inputs["weight"], None, A, B, 0.5
    )
    for found, expected in zip(
        torch.autograd.grad(twice, (x, A, B), inputs["dy"]),
        torch.autograd.grad(plain, (x, A, B), inputs["dy"]),
        strict=True,
    ):
        assert error_ratio(found, expected) <= 1e-13


def test_dropout_is_torchs_own_mask():
    inputs = make((64,), 32, 24, 4, torch.float64)
    names = ("x", "weight", "bias", "A", "B")
    torch.manual_seed(3)
    found = ours(inputs, names, dropout=0.4)
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones_like(inputs["x"]), 0.4)
    wide = {name: inputs[name].clone().requires_grad_() for name in names}
    y = reference.lora_linear(wide["x"], wide["x"] * mask, wide["weight"], wide["bias"], wide["A"], wide["B"], 0.7)
    grads = torch.autograd.grad(y, list(wide.values()), inputs["dy"])
    compare(found, {"y": y, **dict(zip(names, grads, strict=True))}, 1e-14)
    still = ours(inputs, names, dropout=0.4, training=False)
    compare(still, oracle(inputs, names), 1e-14)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_computes_in_its_dtype(base, adapter):
    inputs = make((16,), 32, 24, 4, base)
    inputs |= {name: inputs[name].to(adapter) for name in ("A", "B")}
    names = ("x", "weight", "bias", "A", "B")
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = slao_kernels.lora_linear(*leaves.values(), 0.7)
        grads = torch.autograd.grad(y, list(leaves.values()), inputs["dy"].bfloat16())
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves.values()]
    expected = oracle(inputs, names)
    # fp32 inputs are rounded too: one unit more.
    compare({"y": y, **dict(zip(names, grads, strict=True))}, expected, 1.5 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("grad", [False, True])
def test_operator_contract(grad, backend):
    """torch's own checks of schema, fake function and mutation for both operators."""
    inputs = make((6,), 16, 24, 4, torch.float32)
    forward = (inputs["x"], None, inputs["weight"], inputs["bias"], inputs["A"], inputs["B"], 0.5, backend)
    if not grad:
        torch.library.opcheck(torch.ops.slao_kernels.lora_linear.default, forward)
        return
    t = inputs["x"] @ inputs["A"].T
    backward = (inputs["dy"], inputs["x"], None, inputs["weight"], t, inputs["A"], inputs["B"], 0.5)
    for needs in ((True, False, True, True), (False, False, False, True), (True, False, False, False)):
        torch.library.opcheck(torch.ops.slao_kernels.lora_linear_backward.default, (*backward, *needs, backend))


def test_compiles_without_a_graph_break():
    inputs = make((12,), 32, 24, 4, torch.float32)
    names = ("x", "weight", "bias", "A", "B")
    function = torch.compile(slao_kernels.lora_linear, fullgraph=True, backend="aot_eager")
    leaves = [inputs[name].requires_grad_() for name in names]
    y = function(*leaves, 0.7)
    grads = torch.autograd.grad(y, leaves, inputs["dy"])
    compare({"y": y, **dict(zip(names, grads, strict=True))}, oracle(inputs, names), TOLERANCE[torch.float32])


def test_runs_are_bitwise_equal():
    inputs = make((50, 3), 96, 80, 16, torch.bfloat16)
    names = ("x", "weight", "bias", "A", "B")
    first, second = ours(inputs, names), ours(inputs, names)
    assert all(torch.equal(first[name], second[name]) for name in first)


BAD = {
    "features": ({"x": torch.zeros(3, 5)}, "x has 5 features"),
    "A": ({"A": torch.zeros(4, 9)}, r"A is \(4, 9\), expected \(4, 8\)"),
    "B": ({"B": torch.zeros(6, 3)}, r"B is \(6, 3\), expected \(6, 4\)"),
    "bias": ({"bias": torch.zeros(5)}, r"bias is \(5,\), expected \(6,\)"),
    "core": ({"core": torch.zeros(3, 3)}, r"core is \(3, 3\), expected \(4, 4\)"),
    "dims": ({"weight": torch.zeros(6)}, "needs at least 1 dimension"),
    "integer": ({"A": torch.zeros(4, 8, dtype=torch.int64)}, "A is torch.int64, expected a floating dtype"),
    "dtype": ({"weight": torch.zeros(6, 8, dtype=torch.bfloat16)}, "weight is torch.bfloat16, x is torch.float32"),
    "device": ({"B": torch.zeros(6, 4, device="meta")}, "B is on meta, x on cpu"),
    "dropout": ({"dropout": 1.0}, "dropout is 1.0"),
    "precision": ({"precision": "high"}, "unknown precision 'high', choose one of base, adapter"),
    "backend": ({"backend": "cublas"}, "unknown backend 'cublas'; choose one of auto, reference, eager"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    arguments = {
        "x": torch.zeros(3, 8),
        "weight": torch.zeros(6, 8),
        "bias": torch.zeros(6),
        "A": torch.zeros(4, 8),
        "B": torch.zeros(6, 4),
        "scaling": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        slao_kernels.lora_linear(**{**arguments, **change})
