"""lora_add against its fp64 reference: value and every gradient, in place and not, over shapes, dtypes and layouts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slao_kernels import dispatch
from slao_kernels.ops.lora_linear import add, reference
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
NAMES = ("y", "x", "A", "B")


def make(shape, k: int, n: int, r: int, dtype: torch.dtype, seed: int = 0, bias: bool = False) -> dict[str, Tensor]:
    """Rounded inputs: unit tokens, unit base output, a branch of a third of it."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype)

    return {
        "y": draw(*shape, n),
        "x": draw(*shape, k),
        "A": draw(r, k, scale=k**-0.5),
        "B": draw(n, r + bias, scale=r**-0.5 / 3),
        "dy": draw(*shape, n),
    }


def run(function, inputs: dict[str, Tensor], names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    """The sum and the gradient of every tensor in `names`."""
    leaves = {k: v.detach().clone().requires_grad_(k in names) for k, v in inputs.items() if k != "dy"}
    # Not y itself: a leaf that wants a gradient may not be overwritten.
    out = function(leaves["y"] * 1 if "y" in names else leaves["y"], leaves["x"], leaves["A"], leaves["B"])
    grads = torch.autograd.grad(out, [leaves[name] for name in names], inputs["dy"].to(out.dtype))
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def oracle(inputs: dict[str, Tensor], names: tuple[str, ...] = NAMES, s: float = 0.7) -> dict[str, Tensor]:
    wide = {name: value.double() for name, value in inputs.items()}
    return run(lambda y, x, A, B: reference.lora_add(y, x, A, B, s), wide, names)


def ours(inputs: dict[str, Tensor], names: tuple[str, ...] = NAMES, s: float = 0.7, **options) -> dict[str, Tensor]:
    return run(lambda y, x, A, B: add.apply(y, x, A, B, s, **options), inputs, names)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        ratio = error_ratio(found[name], value)
        assert ratio <= tolerance, f"{name}: error ratio {ratio:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in place"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, backend, in_place, bias, dtype):
    inputs = make(*shape, dtype, bias=bias)
    found = ours(inputs, backend=backend, in_place=in_place)
    assert {value.dtype for value in found.values()} == {dtype}
    compare(found, oracle(inputs), TOLERANCE[dtype])


# dtypes of y, x, A and B: a base that changes the dtype, autocast around it, adapters wider or narrower than it.
MIXED = [
    ("bfloat16", "bfloat16", "float32"),
    ("float16", "float16", "float32"),
    ("bfloat16", "float32", "float32"),
    ("bfloat16", "float32", "bfloat16"),
    ("float32", "bfloat16", "float32"),
    ("float32", "bfloat16", "bfloat16"),
    ("float16", "bfloat16", "float32"),
    ("float32", "float32", "bfloat16"),
    ("float32", "float64", "float32"),
    ("float32", "float32", "float64"),
]


@pytest.mark.parametrize("precision", ["base", "adapter"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in place"])
@pytest.mark.parametrize(("y", "x", "adapter"), MIXED)
def test_mixed_dtypes(y, x, adapter, in_place, bias, precision):
    """The branch in the wider of y's and x's dtypes ("base") or of all ("adapter"); each gradient in its own."""
    y, x, adapter = (getattr(torch, name) for name in (y, x, adapter))
    inputs = make((6, 50), 80, 72, 12, torch.float64, bias=bias)
    inputs = {k: v.to({"y": y, "dy": y, "x": x}.get(k, adapter)) for k, v in inputs.items()}
    found, expected = ours(inputs, precision=precision, in_place=in_place), oracle(inputs)
    assert [found[name].dtype for name in ("out", *NAMES)] == [y, y, x, adapter, adapter]
    branch = torch.promote_types(x, y)
    if precision == "adapter":
        branch = torch.promote_types(branch, adapter)
    # What the branch computes in, and what a result is rounded to: once each.
    for name, value in expected.items():
        allowed = max(TOLERANCE[branch], TOLERANCE[found[name].dtype])
        assert error_ratio(found[name], value) <= allowed, name


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    k=st.integers(1, 70),
    n=st.integers(1, 70),
    r=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    layout=st.sampled_from(["dense", "transposed", "expanded", "every other"]),
    dtype=st.sampled_from(DTYPES),
    wanted=st.sets(st.sampled_from(NAMES), min_size=1),
    bias=st.booleans(),
    backend=st.sampled_from(["eager", "auto"]),
)
def test_any_shape_layout_and_subset_of_gradients(rows, k, n, r, seed, layout, dtype, wanted, bias, backend):
    inputs = make((rows,), k, n, r, dtype, seed, bias)
    names = tuple(sorted(wanted))

    def laid_out(tensor: Tensor) -> Tensor:
        if layout == "transposed":
            return tensor.t().contiguous().t()
        if layout == "every other":
            return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
        return tensor[:1].expand(tensor.shape) if layout == "expanded" and rows else tensor

    if layout == "expanded" and rows:
        inputs |= {name: value[:1].repeat(len(value), 1) for name, value in inputs.items()}
    expected = oracle(inputs, names)
    leaves = {k: laid_out(v).detach().requires_grad_(k in names) for k, v in inputs.items()}
    out = add.apply(leaves["y"], leaves["x"], leaves["A"], leaves["B"], 0.7, backend=backend)
    grads = torch.autograd.grad(out, [leaves[name] for name in names], leaves["dy"].detach())
    # A single small value can cancel to almost nothing: the error is measured against the operands' size.
    for name, value in {"out": out, **dict(zip(names, grads, strict=True))}.items():
        size = expected[name].square().mean().sqrt().item() if expected[name].numel() else 1.0
        allowed = 4 * TOLERANCE[dtype] * max(1.0, 1.0 / max(size, 1e-30)) * math.sqrt(max(rows, 1))
        assert error_ratio(value, expected[name]) <= allowed, name


def test_by_the_written_formula():
    t = make((31,), 20, 24, 6, torch.float64)
    T, g = t["x"] @ t["A"].T, 0.3 * t["dy"] @ t["B"]
    expected = {
        "out": t["y"] + 0.3 * T @ t["B"].T,
        "y": t["dy"],
        "x": g @ t["A"],
        "A": g.T @ t["x"],
        "B": 0.3 * t["dy"].T @ T,
    }
    compare(ours(t, s=0.3), expected, 1e-14)
    compare(oracle(t, s=0.3), expected, 1e-14)


def test_bias_by_the_written_formula():
    t = make((31,), 20, 24, 6, torch.float64, bias=True)
    found = ours(t, s=0.3)
    expected = t["y"] + 0.3 * (t["x"] @ t["A"].T @ t["B"][:, :6].T + t["B"][:, 6])
    compare({"out": found["out"], "b": found["B"][:, 6]}, {"out": expected, "b": 0.3 * t["dy"].sum(0)}, 1e-14)


@pytest.mark.parametrize("grad", [False, True])
def test_in_place_is_in_place(grad):
    t = make((4, 7), 24, 20, 3, torch.float32)
    y = t["y"].clone()
    A = t["A"].clone().requires_grad_(grad)
    out = add.apply(y, t["x"], A, t["B"], 0.7, in_place=True)
    assert out.data_ptr() == y.data_ptr()
    assert y._version >= 1
    assert out.requires_grad is grad
    fresh = add.apply(t["y"], t["x"], A, t["B"], 0.7)
    assert fresh.data_ptr() != t["y"].data_ptr()
    assert torch.equal(fresh, out)
    assert torch.equal(t["y"], make((4, 7), 24, 20, 3, torch.float32)["y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_saves_nothing_of_the_outputs_size(in_place, dtype):
    """M × N = 64 × 40 is no saved tensor's size; x is saved as it is, without a copy in the adapters' dtype."""
    t = make((64,), 24, 40, 3, torch.float32)
    y, x = (t["y"] * 1).to(dtype), t["x"].to(dtype)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        add.apply(y, x, t["A"].requires_grad_(), t["B"].requires_grad_(), 0.7, in_place=in_place)
    assert sorted(v.numel() for v in saved if v.numel() > 1) == sorted([64 * 24, 64 * 3, 3 * 24, 40 * 3])
    assert any(v.data_ptr() == x.data_ptr() for v in saved)


def test_wide_blocks_cover_all_rows(monkeypatch):
    """Rows are widened a few at a time; the sum over blocks is the sum."""
    from slao_kernels.ops.lora_linear import wide

    inputs = make((103,), 48, 40, 5, torch.bfloat16, bias=True)
    inputs |= {name: inputs[name].float() for name in ("A", "B")}
    whole = ours(inputs, precision="adapter")
    monkeypatch.setitem(wide._BLOCK, "cpu", 48 * 16)
    assert sum(1 for _ in wide._row_blocks(inputs["x"])) == 7
    blocks = ours(inputs, precision="adapter")
    compare(blocks, whole, 1e-6)
    compare(blocks, oracle(inputs), TOLERANCE[torch.bfloat16])


def test_double_backward_is_refused():
    t = make((5,), 24, 20, 3, torch.float32)
    x = t["x"].requires_grad_()
    (dx,) = torch.autograd.grad(add.apply(t["y"], x, t["A"], t["B"], 0.7).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_backward_runs_twice():
    t = make((5,), 24, 20, 3, torch.float32)
    leaves = [t[name].requires_grad_() for name in NAMES]
    out = add.apply(t["y"] * 2, *leaves[1:], 0.7, in_place=True)
    first = torch.autograd.grad(out, leaves, t["dy"], retain_graph=True)
    again = torch.autograd.grad(out, leaves, t["dy"])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_dropout_is_torchs_own_mask():
    t = make((50,), 24, 20, 3, torch.float32)
    torch.manual_seed(5)
    found = ours(t, dropout=0.3)
    torch.manual_seed(5)
    mask = torch.nn.functional.dropout(torch.ones_like(t["x"]), 0.3)

    def formula(y, x, A, B):
        return reference.lora_add(y, x * mask.double(), A, B, 0.7)

    compare(found, run(formula, {k: v.double() for k, v in t.items()}), TOLERANCE[torch.float32])


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast_changes_no_dtype(inside, base, adapter):
    """Under autocast as without: its dtype shows in what the base returned, and the products take theirs from that."""
    t = make((33,), 48, 40, 4, torch.float64)
    t = {k: v.to(adapter if k in ("A", "B") else base) for k, v in t.items()}
    plain = ours(t)
    leaves = [t[name].clone().requires_grad_() for name in NAMES]
    with torch.autocast("cpu", torch.bfloat16):
        out = add.apply(*leaves, 0.7)
        grads = torch.autograd.grad(out, leaves, t["dy"]) if inside else None
    grads = grads or torch.autograd.grad(out, leaves, t["dy"])
    assert torch.equal(out, plain["out"])
    assert all(torch.equal(g, plain[name]) for name, g in zip(NAMES, grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_contract(dtype, bias, backend):
    """Schema, fake and kernel agree, for A and B as wide as x or wider."""
    t = make((2, 9), 24, 20, 4, torch.float32, bias=bias)
    y, x, dy = (t[name].to(dtype) for name in ("y", "x", "dy"))
    _, saved = torch.ops.slao_kernels.lora_add(y, x, t["A"], t["B"], 0.7, backend)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.slao_kernels.lora_add.default, (y, x, t["A"], t["B"], 0.7, backend), test_utils=checks
    )
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        arguments = (dy, x, saved, t["A"], t["B"], 0.7, *needs, backend)
        torch.library.opcheck(torch.ops.slao_kernels.lora_add_backward.default, arguments, test_utils=checks)
        sizes = [part.numel() for part in torch.ops.slao_kernels.lora_add_backward(*arguments)]
        assert [size > 0 for size in sizes] == list(needs)


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    inputs = make((4, 9), 24, 20, 3, torch.float32)
    compiled = torch.compile(
        lambda y, x, A, B: add.apply(y, x, A, B, 0.7), fullgraph=True, backend="aot_eager", dynamic=False
    )
    compare(run(compiled, inputs), ours(inputs), 1e-6)


def test_runs_are_bitwise_equal():
    inputs = make((200,), 96, 80, 16, torch.bfloat16)
    first, second = ours(inputs), ours(inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)
