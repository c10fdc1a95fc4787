"""lora_linear_group against the fp64 reference of each of its layers: values, every gradient, and what is left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slao_kernels.ops.lora_linear import group, reference
from slao_kernels.testing import TOLERANCE, error_ratio

RANKS = {"8,8": (8, 8), "mixed": (1, 8, 12, 16), "one layer": (4,)}
PARTS = ("weight", "bias", "A", "B")
SCALINGS = (0.7, 1.3, -0.4, 2.0)


def make(shape, k: int, ranks, dtype: torch.dtype = torch.float32, bias: bool = True) -> dict[str, Tensor]:
    """Layers of N = 24, 28, ...; every other one without a bias. Names: x, and weight0, bias0, A0, B0, dy0, ..."""
    g = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype)

    made = {"x": draw(*shape, k)}
    for i, r in enumerate(ranks):
        n = 24 + 4 * i
        made |= {f"weight{i}": draw(n, k, scale=k**-0.5), f"A{i}": draw(r, k, scale=k**-0.5)}
        made |= {f"B{i}": draw(n, r, scale=r**-0.5 / 3), f"dy{i}": draw(*shape, n)}
        if bias and i % 2 == 0:
            made[f"bias{i}"] = draw(n)
    return made


def ours(t: dict[str, Tensor], count: int) -> list[Tensor]:
    lists = [[t.get(f"{part}{i}") for i in range(count)] for part in PARTS]
    return group.apply(t["x"], *lists, list(SCALINGS[:count]), "eager")


def oracle(t: dict[str, Tensor], count: int) -> list[Tensor]:
    return [
        reference.lora_linear(t["x"], None, *(t.get(f"{part}{i}") for part in PARTS), SCALINGS[i]) for i in range(count)
    ]


def run(function, inputs: dict[str, Tensor], count: int, wanted: set[str], dys) -> dict[str, Tensor]:
    """The outputs, and the gradient of each tensor in `wanted` (None where it has none), from the dys given."""
    leaves = {n: v.detach().clone().requires_grad_(n in wanted) for n, v in inputs.items()}
    ys = function(leaves, count)
    pairs = [(ys[i], inputs[f"dy{i}"]) for i in dys if ys[i].requires_grad]
    names = sorted(wanted)
    grads = torch.autograd.grad(
        [y for y, _ in pairs], [leaves[n] for n in names], [dy for _, dy in pairs], allow_unused=True
    )
    return {**{f"y{i}": y.detach() for i, y in enumerate(ys)}, **dict(zip(names, grads, strict=True))}


def check(inputs: dict[str, Tensor], count: int, wanted: set[str], dys=None) -> None:
    dys = range(count) if dys is None else dys
    found = run(ours, inputs, count, wanted, dys)
    expected = run(oracle, {n: v.double() for n, v in inputs.items()}, count, wanted, dys)
    # dx sums one product for each layer, all but the last rounded on the way.
    tolerance = 1.5 * TOLERANCE[inputs["x"].dtype]
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert found[name].dtype == inputs["x"].dtype
            assert error_ratio(found[name], value) <= tolerance, name


def trainable(inputs: dict[str, Tensor]) -> set[str]:
    return {name for name in inputs if not name.startswith("dy")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 5), (3, 1, 4), (), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("ranks", RANKS)
def test_values_and_every_gradient(ranks, shape, dtype):
    inputs = make(shape, 40, RANKS[ranks], dtype)
    check(inputs, len(RANKS[ranks]), trainable(inputs))


SUBSETS = {
    "adapters": ("A", "B"),
    "A only": ("A",),
    "B only": ("B",),
    "x only": ("x",),
    "x and B": ("x", "B"),
    "bias": ("bias",),
    "weight and A": ("weight", "A"),
    "some As": ("x", "A1", "A3"),
    "one layer": ("A2", "B2"),
    "last B": ("B3",),
}


@pytest.mark.parametrize("dys", [(0, 1, 2, 3), (1,), (0, 3), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("subset", SUBSETS)
def test_only_what_is_asked_for(subset, dys, monkeypatch):
    """Some tensors trained, some outputs used: the same gradients and Nones as from single layers."""
    inputs = make((3, 5), 32, RANKS["mixed"], torch.float64)
    wanted = {name for name in trainable(inputs) if name.startswith(SUBSETS[subset])}
    if any(name[-1] in map(str, dys) or name == "x" for name in wanted):
        check(inputs, 4, wanted, dys)


def test_what_is_not_needed_comes_back_empty():
    inputs = make((6,), 16, (2, 3, 4))
    weights, Bs, dys = ([inputs[f"{part}{i}"] for i in range(3)] for part in ("weight", "B", "dy"))
    A = torch.cat([inputs[f"A{i}"] for i in range(3)])
    t = inputs["x"] @ A.t()
    backward = torch.ops.slao_kernels.lora_linear_group_backward
    scalings = [0.5, 0.6, 0.7]
    args = (dys, inputs["x"], weights, t, A, Bs, scalings)
    dx, dA, dBs = backward(*args, False, [False, True, True], [True, False, False], "eager")
    assert dx.numel() == 0
    assert [tuple(dB.shape) for dB in dBs] == [(24, 2), (0,), (0,)]
    expected = [s * (dy @ B).t() @ inputs["x"] for s, dy, B in zip(scalings, dys, Bs, strict=True)]
    assert error_ratio(dA, torch.cat(expected[1:]).double()) <= TOLERANCE[torch.float32]


def test_operator_contract():
    """torch's own checks of schema, fake function and mutation."""
    inputs = make((2, 3), 16, (2, 3, 4))
    lists = {part: [inputs.get(f"{part}{i}") for i in range(3)] for part in (*PARTS, "dy")}
    A = torch.cat(lists["A"])
    ops, scalings = torch.ops.slao_kernels, [0.5, 0.6, 0.7]
    forward = (inputs["x"], lists["weight"], lists["bias"], A, lists["B"], scalings, "eager")
    torch.library.opcheck(ops.lora_linear_group.default, forward)
    t = (inputs["x"] @ A.t()).reshape(-1, 9)
    backward = (lists["dy"], inputs["x"], lists["weight"], t, A, lists["B"], scalings)
    for needs in ((True, [True] * 3, [True] * 3), (False, [False, True, False], [False, True, True])):
        torch.library.opcheck(ops.lora_linear_group_backward.default, (*backward, *needs, "eager"))


def test_x_is_saved_once_and_nothing_output_sized():
    inputs = make((512,), 64, (4, 8), bias=False)
    leaves = {n: v.requires_grad_(n[0] in "xAB") for n, v in inputs.items()}
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        ours(leaves, 2)
    expected = [(512, 64), (512, 12), (12, 64), (24, 64), (28, 64), (24, 4), (28, 8)]
    assert sorted(map(tuple, saved)) == sorted(expected)


def test_outputs_differentiated_one_after_another():
    """As single layers can: each once without retain_graph; the second time is an error."""
    inputs = make((6,), 16, (2, 3, 4), torch.float64)
    leaves = {n: v.clone().requires_grad_() for n, v in inputs.items()}
    ys, expected = ours(leaves, 3), oracle(leaves, 3)
    for i in (1, 2, 0):
        names = [leaves["x"], leaves[f"A{i}"], leaves[f"B{i}"], leaves[f"weight{i}"]]
        found = torch.autograd.grad(ys[i], names, inputs[f"dy{i}"])
        for value, other in zip(found, torch.autograd.grad(expected[i], names, inputs[f"dy{i}"]), strict=True):
            assert error_ratio(value, other) <= TOLERANCE[torch.float64]
    with pytest.raises(RuntimeError, match="second time"):
        ys[1].sum().backward()
    ys = ours(leaves, 3)
    ys[1].sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        ys[1].sum().backward()


def test_double_backward_is_refused():
    inputs = make((3,), 8, (2, 2), torch.float64)
    x = inputs["x"].requires_grad_()
    (g,) = torch.autograd.grad(sum(y.square().sum() for y in ours(inputs, 2)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_an_output_that_depends_on_nothing_trainable_has_no_gradient():
    inputs = make((3,), 8, (2, 2))
    inputs["A1"].requires_grad_()
    first, second = ours(inputs, 2)
    assert not first.requires_grad
    assert second.requires_grad
    second.sum().backward()
    assert inputs["A1"].grad.shape == (2, 8)


def test_outputs_may_be_overwritten():
    inputs = make((3,), 8, (2, 2), torch.float64)
    leaves, others = ({n: v.clone().requires_grad_() for n, v in inputs.items()} for _ in range(2))
    for function, of in ((ours, leaves), (oracle, others)):
        first, second = function(of, 2)
        (first.mul_(3).add_(1).square().sum() + second.mul_(2).sum()).backward()
    assert error_ratio(leaves["x"].grad, others["x"].grad) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_and_wider_adapters(base):
    inputs = make((9,), 32, (4, 8), base)
    inputs |= {n: v.float() for n, v in inputs.items() if n[0] in "AB"}
    leaves = {n: v.clone().requires_grad_() for n, v in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        ys = ours(leaves, 2)
        sum((y.float() * inputs[f"dy{i}"]).sum() for i, y in enumerate(ys)).backward()
    assert {y.dtype for y in ys} == {torch.bfloat16}
    wide = {n: v.double().requires_grad_() for n, v in inputs.items()}
    sum((y * wide[f"dy{i}"].detach()).sum() for i, y in enumerate(oracle(wide, 2))).backward()
    for name in trainable(inputs):
        assert leaves[name].grad.dtype == leaves[name].dtype
        # Operands rounded to bf16 as well as t and y.
        assert error_ratio(leaves[name].grad, wide[name].grad) <= 2 * TOLERANCE[torch.bfloat16], name


def test_other_products_are_used(monkeypatch):
    """Another backend is another module with the rank-r products."""
    from slao_kernels.ops.lora_linear import skinny

    called = []

    class Spy:
        def __getattr__(self, name):
            called.append(name)
            return getattr(skinny, name)

    inputs = make((5,), 16, (2, 3))
    A, weights = torch.cat([inputs["A0"], inputs["A1"]]), [inputs["weight0"], inputs["weight1"]]
    Bs, dys = [inputs["B0"], inputs["B1"]], [inputs["dy0"], inputs["dy1"]]
    _, t = group.forward(inputs["x"], weights, [None, None], A, Bs, [1.0, 1.0], Spy())
    group.backward(dys, inputs["x"], weights, t, A, Bs, [1.0, 1.0], True, [True] * 2, [True] * 2, Spy())
    # What has no `gemm_` is asked for it, and goes on with `expand_`.
    expand = ["gemm_", "expand_"]
    assert called == ["shrink", *expand, *expand, "grad_t", "grad_t", "grad_A", *expand]
