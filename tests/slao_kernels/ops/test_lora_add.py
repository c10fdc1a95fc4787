"""A branch added to what a called base returned: formulas, dtypes, in place; where: test_called_base_in_place.py."""

from __future__ import annotations

import pytest
import torch
from oracle import OPS, Tensors, check, compare, exact, lora_add, make, ours

from slao_kernels.testing import TOLERANCE, error_ratio


def test_by_the_written_formula():
    s, t = 0.7, make((31,), 20, 24, 6, torch.float64)
    T, g = t["x"] @ t["A"].T, s * t["dy"] @ t["B"]
    expected = {
        "out": t["y"] + s * (T @ t["B"].T + t["own"]),
        "y": t["dy"],
        "x": g @ t["A"],
        "A": g.T @ t["x"],
        "B": s * t["dy"].T @ T,
        "own": s * t["dy"].sum(0),
    }
    compare(ours("add with a bias", t), expected, 1e-14)
    compare(exact("add with a bias", t), expected, 1e-14)


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
@pytest.mark.parametrize("op", [op for op in OPS if op.startswith("add")])
@pytest.mark.parametrize(("y", "x", "adapter"), MIXED)
def test_mixed_dtypes(y, x, adapter, op, precision):
    """The branch in the wider of y's and x's dtypes ("base") or of all ("adapter"); each gradient in its own."""
    y, x, adapter = (getattr(torch, name) for name in (y, x, adapter))
    inputs = make((6, 50), 80, 72, 12, x, adapter)
    inputs |= {name: inputs[name].to(y) for name in ("y", "dy")}
    found, expected = ours(op, inputs, precision=precision), exact(op, inputs)
    branch = torch.promote_types(x, y)
    if precision == "adapter":
        branch = torch.promote_types(branch, adapter)
    # What the branch computes in, and what a result is rounded to: once each.
    for name, value in expected.items():
        dtype = y if name == "out" else inputs[name].dtype
        assert found[name].dtype == dtype
        assert error_ratio(found[name], value) <= max(TOLERANCE[branch], TOLERANCE[dtype]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_takes_what_the_base_returned_for_the_branch(dtype):
    """fp32 from a called base under bf16 autocast: the branch is fp32, as it is without autocast, to the last bit."""
    t = make((33,), 48, 40, 4, dtype)
    plain = ours("add with a bias", t)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours("add with a bias", t)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    check("add with a bias", found, exact("add with a bias", t), t)


@pytest.mark.parametrize("grad", [False, True])
def test_in_place_is_in_place(grad):
    t: Tensors = make((4, 7), 24, 20, 3, torch.float32)
    y, A = t["y"].clone(), t["A"].requires_grad_(grad)
    out = lora_add(y, t["x"], A, t["B"], in_place=True)
    assert out.data_ptr() == y.data_ptr()
    assert y._version >= 1
    assert out.requires_grad is grad
    kept = t["y"].clone()
    fresh = lora_add(t["y"], t["x"], A, t["B"])
    assert fresh.data_ptr() != t["y"].data_ptr()
    assert torch.equal(fresh, out)
    assert torch.equal(t["y"], kept)
