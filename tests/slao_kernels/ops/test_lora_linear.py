"""lora_linear by its written formulas, in the adapter's precision, with its dtypes, and on bad input.

What every op has to do is in test_every_op.py and test_every_node.py.
"""

from __future__ import annotations

import pytest
import torch
from oracle import compare, draws, exact, make, ours

import slao_kernels
from slao_kernels.testing import error_ratio


def test_routing_gradients_equal_the_written_formula():
    """C-LoRA, term by term, in fp64: x through core + core_delta, A and B through core_delta alone."""
    s, t = 0.7, make((31,), 20, 24, 6, torch.float64)
    R, T, g = t["core"] + t["core_delta"], t["x"] @ t["A"].T, s * t["dy"] @ t["B"]
    expected = {
        "out": t["x"] @ t["weight"].T + t["bias"] + s * T @ R.T @ t["B"].T,
        "core_delta": g.T @ T,
        "A": (g @ t["core_delta"]).T @ t["x"],
        "B": s * t["dy"].T @ (T @ t["core_delta"].T),
        "x": t["dy"] @ t["weight"] + g @ R @ t["A"],
    }
    compare(ours("core and delta", t), expected, 1e-14)
    compare(exact("core and delta", t), expected, 1e-14)


@pytest.mark.parametrize("precision", ["base", "adapter"])
@pytest.mark.parametrize(("n", "k", "r"), [(4, 0, 2), (0, 4, 2), (4, 3, 0), (0, 0, 0)])
def test_layers_without_inputs_outputs_or_rank(n, k, r, precision):
    """As F.linear: no features in leave the bias, none out an empty result, and every gradient has its shape."""
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, k), (n, k), (n,)))
    A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((r, k), (n, r)))
    y = slao_kernels.lora_linear(x, weight, bias, A, B, 0.5, precision=precision)
    expected = torch.nn.functional.linear(x, weight + 0.5 * (B @ A).float(), bias)
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y, [x, weight, bias], torch.ones_like(y))
    for grad, right in zip(grads, torch.autograd.grad(expected, [x, weight, bias], torch.ones_like(y)), strict=True):
        torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_adapter_precision_keeps_a_large_delta_exact(narrow):
    """A delta far larger than the base output: rounded adapters lose it, precision="adapter" does not."""
    inputs = make((40, 9), 256, 200, 16, narrow, torch.float32)
    inputs["B"] *= 20
    expected = exact("linear", inputs)
    wide, base = (ours("linear", inputs, precision=p) for p in ("adapter", "base"))
    # The output is stored narrow: its own rounding (half a unit) is all that is left of the error.
    unit = torch.finfo(narrow).eps
    for name in ("out", "x"):
        assert error_ratio(wide[name], expected[name]) <= 0.35 * unit
    for name in ("A", "B"):
        assert error_ratio(wide[name], expected[name]) <= 1e-6
    assert error_ratio(base["out"], expected["out"]) > 1.5 * error_ratio(wide["out"], expected["out"])


BAD = {
    "features": ({"x": torch.zeros(3, 5)}, "x has 5 features"),
    "A": ({"A": torch.zeros(4, 9)}, r"A is \(4, 9\), expected \(4, 8\)"),
    "B": ({"B": torch.zeros(6, 3)}, r"B is \(6, 3\), expected \(6, 4\)"),
    "bias": ({"bias": torch.zeros(5)}, r"bias is \(5,\), expected \(6,\)"),
    "core": ({"core": torch.zeros(3, 3)}, r"core is \(3, 3\), expected \(4, 4\)"),
    "dims": ({"weight": torch.zeros(6)}, "needs at least 1 dimension"),
    "integer": ({"A": torch.zeros(4, 8, dtype=torch.int64)}, "A is torch.int64, expected a floating dtype"),
    "dtype": ({"weight": torch.zeros(6, 8, dtype=torch.bfloat16)}, "weight is torch.bfloat16, x is torch.float32"),
    "device": ({"B": torch.zeros(6, 4, device="meta")}, "B is on the meta device; load the weights first"),
    "dropout": ({"dropout": 1.0}, "dropout is 1.0"),
    "precision": ({"precision": "high"}, "unknown precision 'high', choose one of base, adapter"),
    "backend": ({"backend": "cublas"}, "unknown backend 'cublas'; choose one of auto, reference, eager"),
    "several": ({"A": torch.zeros(4, 9), "precision": "high"}, r"A is \(4, 9\).*; unknown precision 'high'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, message = BAD[case]
    draw = draws(torch.float32)
    arguments = {"x": draw(3, 8), "weight": draw(6, 8), "bias": draw(6), "A": draw(4, 8), "B": draw(6, 4)}
    with pytest.raises(ValueError, match=message):
        slao_kernels.lora_linear(**{"scaling": 1.0, **arguments, **change})
