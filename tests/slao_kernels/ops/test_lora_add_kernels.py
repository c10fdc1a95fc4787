"""lora_add with the Triton backend's products against fp64, dropout drawn in the kernels included."""

from __future__ import annotations

import pytest
import test_lora_add as plain
import torch
from on_triton import DEVICE, interpreted, on_device, philox_mask

from slao_kernels.ops.lora_linear import add, reference
from slao_kernels.testing import TOLERANCE

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops.lora_linear import kernels

test_under_the_interpreter = interpreted(__file__, at_least=40)


@on_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [*plain.SHAPES[:5], ((0,), 24, 40, 8)], ids=str)
def test_value_and_gradients(shape, bias, dtype):
    inputs = {name: value.to(DEVICE) for name, value in plain.make(*shape, dtype, bias=bias).items()}
    found = plain.ours(inputs, backend="triton", in_place=bias)
    plain.compare(found, plain.oracle(inputs), TOLERANCE[dtype])


@on_device
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [((7,), 33, 17, 1), ((2, 50), 40, 24, 12)], ids=str)
def test_dropout_drawn_in_the_kernels(shape, dtype, bias):
    """The mask that the documented Philox counters give, in forward and in every gradient; no masked x is kept."""
    inputs = {name: value.to(DEVICE) for name, value in plain.make(*shape, dtype, bias=bias).items()}
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE).item()
    rows, k = inputs["x"].numel() // shape[1], shape[1]
    mask = torch.from_numpy(philox_mask(seed, rows, k, 0.4)).to(DEVICE) * (65536 / kernels.keep_below(0.4))
    mask = mask.view(inputs["x"].shape)

    def formula(y, x, A, B):
        return reference.lora_add(y, x * mask, A, B, 0.7)

    expected = plain.run(formula, {name: value.double() for name, value in inputs.items()})
    torch.manual_seed(3)
    plain.compare(plain.ours(inputs, dropout=0.4, backend="triton"), expected, TOLERANCE[dtype])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        leaves = {name: value.requires_grad_() for name, value in inputs.items()}
        add.apply(leaves["y"], leaves["x"], leaves["A"], leaves["B"], 0.7, dropout=0.4, backend="triton")
    sized = [v for v in saved if v.shape == inputs["x"].shape]
    assert [v.data_ptr() for v in sized] == [inputs["x"].data_ptr()]
