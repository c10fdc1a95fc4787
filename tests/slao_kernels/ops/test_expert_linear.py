"""expert_linear against its fp64 formula: forward and every gradient, whatever the experts get."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, SCALING, draws, laid_out

from slao_kernels import dispatch
from slao_kernels.ops.expert_linear import expert_linear, products, reference
from slao_kernels.testing import TOLERANCE, error_ratio

# Rows of each expert, K, N, r.
CASES = [
    ((1,), 16, 24, 4),
    ((3, 0, 5), 33, 17, 1),
    ((0, 7, 0, 1), 40, 24, 12),
    ((20, 0, 0), 64, 48, 64),
    ((9, 4), 280, 300, 256),
    ((0, 0), 16, 24, 8),
    ((1, 1, 1, 1, 1), 8, 8, 8),
]


def make(rows, k, n, r, dtype, seed=0):
    draw, e = draws(dtype, seed), len(rows)
    found = {
        "x": draw(sum(rows), k),
        "weight": draw(e, n, k, scale=k**-0.5),
        "A": draw(e, r, k, scale=k**-0.5),
        "B": draw(e, n, r, scale=r**-0.5 / 3),
    }
    return found, torch.tensor(rows).cumsum(0).int(), draw(sum(rows), n)


def run(op, tensors, ends, dy, **options):
    """y and the gradients of x, A and B."""
    leaves = {name: value.detach().requires_grad_(name != "weight") for name, value in tensors.items()}
    y = op(leaves["x"], leaves["weight"], leaves["A"], leaves["B"], SCALING, ends, **options)
    y.backward(dy)
    assert leaves["weight"].grad is None
    return {"y": y, **{name: leaves[name].grad for name in ("x", "A", "B")}}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_forward_and_every_gradient(case, dtype, seed, device):
    """On a GPU by torch's grouped GEMM, where "auto" takes it."""
    tensors, ends, dy = make(*case, dtype, seed)
    tensors, ends, dy = {k: v.to(device) for k, v in tensors.items()}, ends.to(device), dy.to(device)
    found = run(expert_linear, tensors, ends, dy)
    exact = run(reference.expert_linear, {k: v.double() for k, v in tensors.items()}, ends, dy.double())
    for name, value in found.items():
        assert value.dtype == dtype
        assert error_ratio(value, exact[name]) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("layout", ["transposed", "every other", "columns"])
def test_layouts_of_the_weight(layout):
    """transformers keeps some models' experts as (E, K, N)."""
    tensors, ends, dy = make((3, 0, 5), 24, 16, 4, torch.float32)
    expected = run(expert_linear, tensors, ends, dy)
    for name, value in run(expert_linear, tensors | {"weight": laid_out(tensors["weight"], layout)}, ends, dy).items():
        assert error_ratio(value, expected[name]) <= 1e-6, name
    stored = tensors["weight"].transpose(1, 2).contiguous()
    for name, value in run(expert_linear, tensors | {"weight": stored.transpose(1, 2)}, ends, dy).items():
        assert error_ratio(value, expected[name]) <= 1e-6, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_branch(dtype):
    tensors, ends, dy = make((3, 0, 5), 24, 16, 4, dtype)
    x = tensors["x"].requires_grad_()
    expert_linear(x, tensors["weight"], None, None, 1.0, ends).backward(dy)
    parts = [part @ W.double() for part, W in zip(dy.double().split([3, 0, 5]), tensors["weight"], strict=True)]
    assert error_ratio(x.grad, torch.cat(parts)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("needed", ["x", "A", "B"])
def test_one_gradient_alone(needed):
    tensors, ends, dy = make((3, 0, 5), 24, 16, 4, torch.float64)
    whole = run(expert_linear, tensors, ends, dy)
    leaves = {name: value.detach().requires_grad_(name == needed) for name, value in tensors.items()}
    expert_linear(leaves["x"], leaves["weight"], leaves["A"], leaves["B"], SCALING, ends).backward(dy)
    assert torch.equal(leaves[needed].grad, whole[needed])
    assert [name for name, value in leaves.items() if value.grad is not None] == [needed]


def test_what_backward_keeps():
    """x, t and the factors; nothing of the size of all experts' weights but the weight itself."""
    tensors, ends, _ = make((40, 24), 32, 48, 4, torch.float32)
    leaves = {name: value.requires_grad_(name != "weight") for name, value in tensors.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        expert_linear(leaves["x"], leaves["weight"], leaves["A"], leaves["B"], SCALING, ends)
    own = {value.data_ptr() for value in leaves.values()} | {ends.data_ptr()}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(64, 4)]


@pytest.mark.parametrize("branch", [True, False])
def test_operators(branch):
    tensors, ends, dy = make((3, 0, 5), 24, 16, 4, torch.float32)
    A, B = (tensors["A"], tensors["B"]) if branch else (None, None)
    ops = torch.ops.slao_kernels
    args = tensors["x"], tensors["weight"], A, B, SCALING, ends, "eager"
    torch.library.opcheck(ops.expert_linear.default, args)
    t = ops.expert_linear(*args)[1]
    back = dy, tensors["x"], tensors["weight"], t, A, B, SCALING, ends, True, branch, branch, "eager"
    torch.library.opcheck(ops.expert_linear_backward.default, back)


def test_compiled_is_one_graph():
    tensors, ends, dy = make((3, 0, 5), 24, 16, 4, torch.float32)
    expected = run(expert_linear, tensors, ends, dy)
    compiled = torch.compile(expert_linear, fullgraph=True, backend="aot_eager")
    for name, value in run(compiled, tensors, ends, dy).items():
        assert torch.equal(value, expected[name]), name


def test_a_cpu_without_bf16_widens_an_expert_at_a_time(monkeypatch):
    """Either way: sums in fp32, t and y rounded once."""
    tensors, ends, dy = make((9, 4), 64, 48, 16, torch.bfloat16)
    exact = run(reference.expert_linear, {k: v.double() for k, v in tensors.items()}, ends, dy.double())
    for has in (True, False):
        monkeypatch.setattr(dispatch, "cpu_computes", lambda dtype, has=has: has)
        for name, value in run(expert_linear, tensors, ends, dy).items():
            assert error_ratio(value, exact[name]) <= TOLERANCE[torch.bfloat16], (has, name)


@pytest.mark.parametrize("rows", [(8, 16, 8), (0, 24, 8), (0, 0, 8)], ids=str)
def test_one_grouped_product_for_all(monkeypatch, rows):
    """torch's grouped GEMM, which a GPU gets; on a CPU torch has it in fp32."""
    tensors, ends, dy = make(rows, 64, 48, 16, torch.float32)
    expected = run(expert_linear, tensors, ends, dy)
    monkeypatch.setattr(products, "grouped_serves", lambda left, right: True)
    monkeypatch.setattr(products, "rows_of_experts", None)
    for name, value in run(expert_linear, tensors, ends, dy).items():
        assert error_ratio(value, expected[name]) <= 1e-6, name


def test_a_second_derivative_is_refused():
    tensors, ends, _ = make((3, 0, 5), 24, 16, 4, torch.float64)
    x = tensors["x"].requires_grad_()
    y = expert_linear(x, tensors["weight"], tensors["A"].requires_grad_(), tensors["B"], SCALING, ends)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (y.sum() + g.square().sum()).backward()
