"""Dropout drawn inside the Triton products: the masks are Philox's, and value and gradients are those of that mask."""

from __future__ import annotations

import pytest
import torch
from on_triton import DEVICE, DTYPES, draw, mask_of_the_next_call, on_device, philox_mask
from oracle import DROPPING, INTERPRETED, NAMES, OPS, check, compare, exact, make, ours

from slao_kernels.ops.lora_linear.autograd import call_for, linear
from slao_kernels.testing import TOLERANCE, error_ratio

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops.lora_linear import triton as kernels

pytestmark = pytest.mark.usefixtures("poisoned")


def test_the_tests_own_philox():
    """Known answers of the generator's authors (Random123), for a counter and a key of zeros."""
    zeros = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for cut in (0.1, 0.25, 0.5, 0.9):
        below = round((1 - cut) * 65536)
        words = [half < below for word in zeros for half in (word & 0xFFFF, word >> 16)]
        assert philox_mask(0, 1, 8, cut)[0].tolist() == words


@on_device
@pytest.mark.parametrize(("seed", "p"), [(0, 0.1), (12345, 0.95), (2**32 + 7, 0.95), (2**63 - 2, 0.1)])
def test_masks_are_philoxs(seed, p):
    """In shrink, grad_A and grad_source the same mask, at tiles that differ; columns far from the first too."""
    (m, k), columns = ((40, 136), slice(70, 130)) if INTERPRETED else ((80, 248), slice(165, 245))
    products = kernels.products(torch.tensor([seed], device=DEVICE), p)
    kept = torch.from_numpy(philox_mask(seed, m, k, p)).to(DEVICE)
    scale = 65536 / kernels.keep_below(p)
    x, A = torch.ones(m, k, device=DEVICE), torch.eye(k, device=DEVICE)[columns]
    assert torch.equal(products.shrink(x, A), kept[:, columns] * scale)
    assert torch.equal(products.grad_A(torch.eye(m, device=DEVICE), x), kept * scale)
    ones = torch.ones(m, 1, device=DEVICE), torch.ones(1, k, device=DEVICE)
    assert torch.equal(products.grad_source(*ones), kept * scale)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", DROPPING)
@pytest.mark.parametrize("shape", [((7,), 33, 17, 1), ((2, 50), 40, 24, 12), ((150,), 96, 80, 64)], ids=str)
def test_value_and_gradients(shape, op, dtype):
    """The mask that the documented counters give, in forward and in every gradient; several layers see the same one."""
    inputs = make(*shape, dtype, device=DEVICE)
    mask = mask_of_the_next_call(inputs["x"], 0.4)
    found = ours(op, inputs, dropout=0.4, backend="triton")
    expected = exact(op, {**inputs, "mask": mask})
    # The branch's share of dx is rounded before it is masked and joined.
    compare(found, expected, 1.5 * OPS[op].slack * TOLERANCE[dtype])


@on_device
@pytest.mark.parametrize("case", ["fp64", "adapter precision", "p = 1", "empty batch", "rank 257"])
def test_dropout_that_the_kernels_do_not_draw(case):
    """Then it is torch's own, with torch's own mask."""
    dtype = {"fp64": torch.float64, "adapter precision": torch.bfloat16}.get(case, torch.float32)
    r = 257 if case == "rank 257" else 4
    wide = torch.float32 if case == "adapter precision" else None
    inputs = make((0,) if case == "empty batch" else (20,), 32, 24, r, dtype, wide, device=DEVICE)
    if case == "p = 1":  # a layer's nn.Dropout may have it
        tensors = [inputs[name] for name in NAMES]
        call = call_for(tensors[0], tensors[1:], 0.7, "base", "triton", 1.0)
        y = linear(call)(call, *tensors)
        assert error_ratio(y, inputs["x"] @ inputs["weight"].t() + inputs["bias"]) <= TOLERANCE[dtype]
        return
    precision = "adapter" if wide else "base"
    results = []
    for backend in ("triton", "eager"):
        torch.manual_seed(3)
        results.append(ours("linear", inputs, backend=backend, dropout=0.4, precision=precision))
    found, expected = results
    if case == "adapter precision":  # the mask is torch's, the products are not
        check("linear", found, {name: value.double() for name, value in expected.items()}, inputs, precision)
    else:
        assert all(torch.equal(found[name], expected[name]) for name in found)


@on_device
@pytest.mark.parametrize("op", DROPPING)
def test_many_gradients_at_once_are_refused(op):
    """No kernel reads such gradients, and the mask exists nowhere else: one line that says what to do."""
    inputs = make((5,), 12, 9, 3, torch.float32, device=DEVICE)
    x = inputs["x"].requires_grad_()
    y = OPS[op].ours(inputs, dropout=0.3, backend="triton")
    dys = draw(2, *y.shape)
    with pytest.raises(RuntimeError, match=r"^many gradients at once [^\n]*backend='eager'[^\n]*$"):
        torch.autograd.grad(y, x, dys, is_grads_batched=True)
    torch.manual_seed(3)
    y = OPS[op].ours(inputs, dropout=0.0, backend="triton")
    assert torch.autograd.grad(y, x, dys, is_grads_batched=True)[0].shape == (2, 5, 12)
