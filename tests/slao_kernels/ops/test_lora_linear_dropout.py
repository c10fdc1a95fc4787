"""Dropout drawn inside the Triton products: the masks are Philox's, and value and gradients are those of that mask."""

from __future__ import annotations

import pytest
import test_lora_linear as eager_tests
import torch
from on_triton import DEVICE, DTYPES, NAMES, empty, interpreted, make, on_device, philox_mask, with_mask
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import slao_kernels
from slao_kernels.testing import TOLERANCE, error_ratio

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops.lora_linear import kernels

pytestmark = pytest.mark.usefixtures("poisoned")
test_under_the_interpreter = interpreted(__file__, at_least=20)


def test_the_tests_own_philox():
    """Known answers of the generator's authors (Random123), for a counter and a key of zeros."""
    zeros = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for cut in (0.1, 0.25, 0.5, 0.9):
        below = round((1 - cut) * 65536)
        words = [half < below for word in zeros for half in (word & 0xFFFF, word >> 16)]
        assert philox_mask(0, 1, 8, cut)[0].tolist() == words


SEEDS = [0, 12345, 2**32 + 7, 2**63 - 2]


@on_device
@pytest.mark.parametrize("p", [0.1, 0.95])
@pytest.mark.parametrize("seed", SEEDS)
def test_masks_are_philoxs(seed, p):
    """In shrink, grad_A and dx the same mask, at tiles that differ; columns far from the first too."""
    (m, k), columns = (80, 496), slice(330, 490)
    products = kernels.TritonProducts(torch.tensor([seed], device=DEVICE), p)
    kept = torch.from_numpy(philox_mask(seed, m, k, p)).to(DEVICE)
    scale = 65536 / kernels.keep_below(p)
    x, A = torch.ones(m, k, device=DEVICE), torch.eye(k, device=DEVICE)[columns]
    assert torch.equal(products.shrink(x, A), kept[:, columns] * scale)
    dA = empty(m, k, dtype=x.dtype)
    products.grad_A(torch.eye(m, device=DEVICE), x, dA)
    assert torch.equal(dA, kept * scale)
    dx = empty(m, k, dtype=x.dtype)
    backward = kernels._DroppedBackward(products.seed, p)
    backward.expand_(dx, torch.ones(m, 1, device=DEVICE), torch.ones(1, k, device=DEVICE).t(), 1.0)
    assert torch.equal(dx, kept * scale)


@on_device
def test_rate_and_mean():
    p, m, k = 0.3, 400, 256
    kept = kernels.TritonProducts(torch.tensor([99], device=DEVICE), p).shrink(
        torch.ones(m, k, device=DEVICE), torch.eye(k, device=DEVICE)
    )
    share = (kept != 0).double().mean().item()
    assert abs(share - 0.7) < 5 * (0.3 * 0.7 / (m * k)) ** 0.5
    assert kept.double().mean().item() == pytest.approx(1.0, abs=0.02)
    by_column = (kept != 0).double().mean(0)
    assert (by_column - 0.7).abs().max() < 6 * (0.3 * 0.7 / m) ** 0.5


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [((7,), 33, 17, 1), ((2, 50), 40, 24, 12), ((33,), 48, 32, 20), ((150,), 96, 80, 64)], ids=str
)
def test_dropout_gradients(shape, dtype):
    inputs = make(*shape, dtype)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE).item()
    rows, k = inputs["x"].numel() // shape[1], shape[1]
    mask = torch.from_numpy(philox_mask(seed, rows, k, 0.4)).to(DEVICE) * (65536 / kernels.keep_below(0.4))
    expected = with_mask(inputs, mask.view(inputs["x"].shape), NAMES)
    torch.manual_seed(3)
    found = eager_tests.ours(inputs, NAMES, dropout=0.4, backend="triton")
    # The branch's share of dx is rounded before it is masked and joined.
    eager_tests.compare(found, expected, 1.5 * TOLERANCE[dtype])


@on_device
def test_dropout_with_a_routing_core():
    names = ("x", "weight", "A", "B", "core", "core_delta")
    inputs = make((40,), 48, 40, 8, torch.float32)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE).item()
    mask = torch.from_numpy(philox_mask(seed, 40, 48, 0.2)).to(DEVICE) * (65536 / kernels.keep_below(0.2))
    torch.manual_seed(3)
    found = eager_tests.ours(inputs, names, dropout=0.2, backend="triton")
    eager_tests.compare(found, with_mask(inputs, mask, names), 1.5 * TOLERANCE[torch.float32])


@on_device
@pytest.mark.parametrize("case", ["fp64", "adapter precision", "p = 1", "empty batch", "rank 257"])
def test_dropout_that_the_kernels_do_not_draw(case):
    """Then it is torch's own, with torch's own mask."""
    dtype = torch.float64 if case == "fp64" else torch.bfloat16 if case == "adapter precision" else torch.float32
    inputs = eager_tests.make((0,) if case == "empty batch" else (20,), 32, 24, 257 if case == "rank 257" else 4, dtype)
    inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
    options = {"dropout": 0.4}
    if case == "adapter precision":
        inputs |= {name: inputs[name].float() for name in ("A", "B")}
        options["precision"] = "adapter"
    if case == "p = 1":
        from slao_kernels.ops.lora_linear import apply

        y = apply(*(inputs[name] for name in NAMES), 0.7, dropout=1.0, backend="triton")
        assert error_ratio(y, inputs["x"] @ inputs["weight"].t() + inputs["bias"]) <= TOLERANCE[dtype]
        return
    torch.manual_seed(3)
    found = eager_tests.ours(inputs, NAMES, backend="triton", **options)
    torch.manual_seed(3)
    expected = eager_tests.ours(inputs, NAMES, backend="eager", **options)
    if case == "adapter precision":  # the mask is torch's, the products are not
        for name, value in expected.items():
            assert error_ratio(found[name], value) <= TOLERANCE[value.dtype], name
    else:
        assert all(torch.equal(found[name], expected[name]) for name in found)


@on_device
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(reentrant):
    inputs = make((60,), 40, 40, 8, torch.float32)
    leaves = {name: inputs[name].requires_grad_() for name in NAMES}

    def block(x: Tensor) -> Tensor:
        rest = [leaves[name] for name in NAMES[1:]]
        for _ in range(2):
            x = slao_kernels.lora_linear(x, *rest, 0.7, dropout=0.3, backend="triton").tanh()
        return x

    results = []
    for recompute in (False, True):
        torch.manual_seed(11)
        y = checkpoint(block, leaves["x"], use_reentrant=reentrant) if recompute else block(leaves["x"])
        y.backward(inputs["dy"])
        results.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
        for leaf in leaves.values():
            leaf.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_device
def test_calls_differ_and_seeds_repeat():
    inputs = make((20,), 40, 24, 8, torch.float32)
    leaves = [inputs[name] for name in NAMES]

    def call() -> Tensor:
        return slao_kernels.lora_linear(*leaves, 0.7, dropout=0.3, backend="triton")

    torch.manual_seed(5)
    first, second = call(), call()
    torch.manual_seed(5)
    assert torch.equal(call(), first)
    assert torch.equal(call(), second)
    assert not torch.equal(first, second)


@on_device
def test_dropout_keeps_no_mask_and_no_copy():
    """Kept for backward: x, weight, t, the adapters, and one number."""
    inputs = make((96,), 64, 48, 4, torch.float32)
    leaves = [inputs[name].requires_grad_(name in ("x", "A", "B")) for name in NAMES]
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        slao_kernels.lora_linear(*leaves, 0.5, dropout=0.1, backend="triton")
    assert sorted(map(tuple, saved)) == sorted([(96, 64), (48, 64), (96, 4), (4, 64), (48, 4), (1,)])
