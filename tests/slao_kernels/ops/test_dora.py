"""DoRA: norms, exact where the delta cancels the weight; and a fresh adapter."""

from __future__ import annotations

import pytest
import torch
from oracle import make
from peft import LoraConfig, get_peft_model
from torch import nn

import slao_kernels
from slao_kernels.ops.lora_linear import precise
from slao_kernels.testing import error_ratio

norm = torch.ops.slao_kernels.dora_norm


def exact_norm(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
    return (weight.double() + s * B.double() @ A.double()).square().sum(1).sqrt()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms(weight_dtype, transposed, monkeypatch):
    """fp32 sums of K squares, whatever the weight's dtype and strides, over one block or many."""
    t = make((1,), 200, 150, 16, weight_dtype, torch.float32)
    weight = t["weight"].t().contiguous().t() if transposed else t["weight"]
    expected = exact_norm(weight, t["A"], t["B"], 1.3)
    whole = norm(weight, t["A"], t["B"], 1.3)
    assert whole.dtype == torch.float32
    assert error_ratio(whole, expected) <= 1e-6
    monkeypatch.setitem(precise._BLOCK, "cpu", 200 * 16)
    assert sum(1 for _ in precise.by_rows(weight)) == 10
    assert error_ratio(norm(weight, t["A"], t["B"], 1.3), expected) <= 1e-6


@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3])
def test_norms_where_the_delta_cancels_the_weight(left):
    """W + s B A a small rest of W: the sum is formed, so its norm is as exact as the sum. From ‖W‖² + 2 s (W Aᵀ)·B + …
    it would lose twice as many digits."""
    t = make((1,), 64, 48, 8, torch.float32)
    B, A = t["B"], t["A"]
    rest = left * torch.randn(48, 64, generator=torch.Generator().manual_seed(3)) * (B @ A).square().mean().sqrt()
    weight = rest - 0.7 * (B @ A)
    expected = exact_norm(weight, A, B, 0.7)
    error = error_ratio(norm(weight, A, B, 0.7), expected)
    assert error <= 2e-7 / left
    squares = weight.square().sum(1) + ((2 * 0.7 * weight @ A.T) * B + 0.7**2 * (B @ (A @ A.T)) * B).sum(1)
    assert error < 0.5 * error_ratio(squares.clamp_min(0).sqrt(), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_fresh_adapter_changes_nothing(dtype, bias):
    """To the last bit, as with PEFT, whose magnitudes are exact norms only where they are not rounded to 16 bits."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(1000, 700, bias=bias, dtype=dtype))
    x = torch.rand(10, 1000, dtype=dtype)
    expected = base(x)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["0"], use_dora=True))
    slao_kernels.patch(model, strict=True)
    assert torch.equal(model(x), expected)
