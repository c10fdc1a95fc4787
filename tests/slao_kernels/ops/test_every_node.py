"""Every op as a node of a graph: what it saves, second passes, many gradients at once, autocast, torch.compile."""

from __future__ import annotations

import pytest
import torch
from oracle import INTERPRETED, MAIN, NODES, OPS, PLACES, Tensors, check, compare, equal, exact, make, ours, run
from torch import Tensor

from slao_kernels.testing import TOLERANCE

every_op = pytest.mark.parametrize("op", MAIN)
every_place = pytest.mark.parametrize("place", PLACES)
fp64, fp32, bf16 = torch.float64, torch.float32, torch.bfloat16


def leaves_of(op: str, inputs: Tensors) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in OPS[op].names]


@every_op
@every_place
def test_inputs_stay_as_they_were_and_backward_runs_twice(op, place):
    inputs = make((6, 5), 32, 24, 4, fp32, device=place[1])
    before = {name: value.clone() for name, value in inputs.items()}
    leaves = leaves_of(op, inputs)
    y = OPS[op].ours(inputs, backend=place[0])
    dy = inputs["dy"]
    kept = dy.clone()
    passes = [torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True) for _ in range(2)]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*passes, strict=True))
    equal(inputs, before)
    assert torch.equal(dy, kept)


@every_op
@every_place
def test_without_a_graph_the_value_is_the_same(op, place):
    inputs = make((6, 5), 32, 24, 4, bf16, fp32, device=place[1])
    graph = ours(op, inputs, backend=place[0])["out"]
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            found = OPS[op].ours(inputs, backend=place[0])
        assert not found.requires_grad
        assert torch.equal(found, graph)


@every_op
@pytest.mark.parametrize("place", NODES)
@pytest.mark.parametrize("loss", [torch.square, torch.clone], ids=["dy has a graph", "dy has none"])
def test_double_backward_is_refused_in_one_line(op, place, loss):
    inputs = make((3,), 8, 8, 2, fp32, device=place[1])
    leaves = leaves_of(op, inputs)
    y = OPS[op].ours(inputs, backend=place[0])
    grads = torch.autograd.grad(loss(y).sum(), leaves, create_graph=True, allow_unused=True)
    for name, grad in zip(OPS[op].names, grads, strict=True):
        if name in ("core", "y"):  # none, and dy itself, which torch differentiates
            continue
        with pytest.raises(RuntimeError, match=r"^[^\n]*differentiate twice[^\n]*once_differentiable[^\n]*$"):
            grad.sum().backward(retain_graph=True)


@every_op
@every_place
@pytest.mark.parametrize("dtypes", [(fp64, None), (bf16, fp32)], ids=str)
def test_many_gradients_at_once(op, place, dtypes):
    """is_grads_batched: each of them is the gradient that it would be alone."""
    precision = "base" if dtypes[1] is None else "adapter"
    inputs = make((2, 5), 12, 9, 3, *dtypes, device=place[1])
    names = tuple(name for name in OPS[op].names if name != "core")  # which has none
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    y = OPS[op].ours({**inputs, **leaves}, precision=precision, backend=place[0])
    dys = torch.stack([inputs["dy"], 0.3 * inputs["dy"].flip(0)])
    grads = torch.autograd.grad(y, list(leaves.values()), dys, is_grads_batched=True)
    for i, dy in enumerate(dys):
        found = {"out": y, **{name: grad[i] for name, grad in zip(names, grads, strict=True)}}
        check(op, found, exact(op, {**inputs, "dy": dy}, names), inputs, "base")


def saved_by(call, inputs: Tensors, wanted: tuple[str, ...]) -> list[Tensor]:
    leaves = {name: value.detach().requires_grad_(name in wanted) for name, value in inputs.items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(leaves)
    return saved


# (M, K, N, r) = (64, 24, 40, 3).
SAVED = {
    "linear": [(64, 24), (64, 3), (40, 24), (3, 24), (40, 3)],
    "core and delta": [(64, 24), (64, 3), (40, 24), (3, 24), (40, 3), (3, 3), (3, 3)],
    "add": [(64, 24), (64, 3), (3, 24), (40, 3)],
    "add in place": [(64, 24), (64, 3), (3, 24), (40, 3)],
    "add with a bias": [(64, 24), (64, 4), (3, 24), (40, 4)],
}


@pytest.mark.parametrize("op", SAVED)
@pytest.mark.parametrize("dtypes", [(fp32, None), (bf16, fp32), "dropout"], ids=str)
@pytest.mark.parametrize("place", NODES)
def test_saved_are_x_and_t_and_what_is_as_small_as_an_adapter(op, place, dtypes):
    """Nothing (M, N), and x as it is, without a copy in the adapters' dtype; of dropout one number."""
    options = {"precision": "adapter" if dtypes[1] is fp32 else "base"}
    if dtypes == "dropout":
        if place[0] != "triton" or op == "add in place":
            pytest.skip("only Triton's kernels draw dropout, and never for what is written in place")
        dtypes, options = (fp32, None), {"dropout": 0.1}
    inputs = make((64,), 24, 40, 3, *dtypes, device=place[1])
    wanted = ("x", "A", "B", "core_delta")
    saved = saved_by(lambda t: OPS[op].ours(t, backend=place[0], **options), inputs, wanted)
    assert sorted(tuple(t.shape) for t in saved) == sorted([*SAVED[op], *([(1,)] if "dropout" in options else [])])
    assert any(t.data_ptr() == inputs["x"].data_ptr() for t in saved)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "a weight trains"])
@pytest.mark.skipif(INTERPRETED, reason="Triton's kernels draw their own dropout")
def test_of_torchs_dropout_the_mask_is_saved_and_x_itself_only_for_a_weight(trains):
    inputs = make((64,), 24, 40, 3, fp32)
    wanted = ("A", "B", *(["weight"] if trains else []))
    saved = saved_by(lambda t: OPS["linear"].ours(t, dropout=0.4, backend="eager"), inputs, wanted)
    as_x = [t for t in saved if t.shape == (64, 24)]
    assert sorted(str(t.dtype) for t in as_x) == ["torch.bool", *["torch.float32"] * (2 if trains else 1)]
    assert any(t.data_ptr() == inputs["x"].data_ptr() for t in as_x) is trains


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "magnitude trains"])
def test_dora_saves_one_tensor_of_the_outputs_size_for_the_magnitude(trains):
    inputs = make((64,), 24, 40, 3, fp32)
    wanted = ("A", "B", *(["magnitude"] if trains else []))
    saved = saved_by(OPS["DoRA"].ours, inputs, wanted)
    assert sum(t.numel() == 64 * 40 for t in saved) == trains


@every_op
@pytest.mark.parametrize("adapter", [fp32, bf16], ids=str)
@pytest.mark.parametrize("base", [fp32, bf16], ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("precision", ["base", "adapter"])
def test_autocast_computes_in_its_dtype(op, precision, inside, base, adapter):
    """Each gradient in its tensor's dtype; `precision` changes nothing, as PEFT's layers cast everything then too."""
    inputs = make((33,), 48, 40, 4, base, adapter)
    names = tuple(name for name in OPS[op].names if name != "core")
    leaves = {**inputs, **{name: inputs[name].clone().requires_grad_() for name in names}}
    backend = "triton" if INTERPRETED else "auto"
    with torch.autocast("cpu", bf16):
        y = OPS[op].ours(leaves, precision=precision, backend=backend)
        dy = inputs["dy"].to(y.dtype)
        if inside:
            grads = torch.autograd.grad(y, [leaves[name] for name in names], dy)
    if not inside:
        grads = torch.autograd.grad(y, [leaves[name] for name in names], dy)
    assert y.dtype == (base if op.startswith("add") else bf16)
    assert [grad.dtype for grad in grads] == [inputs[name].dtype for name in names]
    # fp32 inputs are rounded too: one unit more.
    expected = exact(op, {**inputs, "dy": dy}, names)
    compare({"out": y, **dict(zip(names, grads, strict=True))}, expected, 1.5 * OPS[op].slack * TOLERANCE[bf16])


@every_op
@every_place
def test_compiles_without_a_graph_break(op, place):
    torch._dynamo.reset()
    inputs = make((4, 9), 24, 20, 3, fp32, device=place[1])
    function = torch.compile(lambda t: OPS[op].ours(t, backend=place[0]), fullgraph=True, backend="aot_eager")
    check(op, run(function, inputs, OPS[op].names), exact(op, inputs), inputs)


# Operators


def check_operator(name: str, *arguments) -> None:
    """torch's own checks of schema, fake function, mutation and tracing."""
    torch.library.opcheck(getattr(torch.ops.slao_kernels, name).default, arguments)


def some_or_all(parts: int):
    """Which gradients are asked for: all, every other one, the rest."""
    return [(True,) * parts, *(tuple(i % 2 == first for i in range(parts)) for first in (0, 1))]


@pytest.mark.parametrize("dropout", ["none", "torch", "kernels"])
@pytest.mark.parametrize("wide", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("place", NODES)
def test_lora_linear_operators(place, wide, dropout):
    backend, device = place
    if dropout == "kernels" and (backend != "triton" or wide):
        pytest.skip("only Triton's kernels draw dropout, and not with wide adapters")
    t = make((2, 3), 16, 24, 4, bf16 if wide else fp32, fp32, device=device)
    source, drawn = None, (None, 0.0)
    if dropout == "torch":
        source, mask = torch.native_dropout(t["x"], 0.3, True)
        drawn = mask, 0.3
    elif dropout == "kernels":
        drawn = torch.tensor([7], device=device), 0.3
    arguments = t["x"], source, t["weight"], t["bias"], t["A"], t["B"], 0.5, wide, backend, *drawn
    check_operator("lora_linear", *arguments)
    y, saved = torch.ops.slao_kernels.lora_linear(*arguments)
    read = t["x"] if source is None else source
    for needs in some_or_all(3):
        arguments = 0.1 * y, read, t["weight"], saved, t["A"], t["B"], 0.5, wide, *needs, backend, *drawn
        check_operator("lora_linear_backward", *arguments)
        *found, _ = torch.ops.slao_kernels.lora_linear_backward(*arguments)
        assert [part.numel() > 0 for part in found] == list(needs)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("place", NODES)
def test_lora_add_operators(place, dtype, bias, p):
    """A and B as wide as x or wider."""
    backend, device = place
    if p and (backend != "triton" or dtype == bf16):
        pytest.skip("only Triton's kernels draw dropout, and not with wide adapters")
    t = make((2, 9), 24, 20, 4, dtype, fp32, device=device)
    B = torch.cat([t["B"], t["own"][:, None]], 1) if bias else t["B"]
    drawn = (torch.tensor([7], device=device) if p else None, p)
    check_operator("lora_add", t["y"], t["x"], t["A"], B, 0.7, backend, *drawn)
    _, saved = torch.ops.slao_kernels.lora_add(t["y"], t["x"], t["A"], B, 0.7, backend, *drawn)
    for needs in some_or_all(3):
        arguments = t["y"], t["x"], saved, t["A"], B, 0.7, *needs, backend, *drawn
        check_operator("lora_add_backward", *arguments)
        assert [part.numel() > 0 for part in torch.ops.slao_kernels.lora_add_backward(*arguments)] == list(needs)


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_dora_operators(dtype):
    t = make((2, 9), 24, 20, 4, dtype, fp32)
    check_operator("dora_norm", t["weight"], t["A"], t["B"], 0.7)
    for bias in (t["bias"], None):
        check_operator("dora_scale", t["y"], t["magnitude"], bias)
    for needs in some_or_all(2):
        arguments = t["y"] * 2, t["y"], t["magnitude"], *needs
        check_operator("dora_scale_backward", *arguments)
        assert [part.numel() > 0 for part in torch.ops.slao_kernels.dora_scale_backward(*arguments)] == list(needs)


@pytest.mark.parametrize("shapes", [(4, 9), (3, 5)], ids=str)
@pytest.mark.parametrize("name", ["orthogonal_init_", "scaled_merge_", "fold_"])
def test_operators_on_lists(name, shapes):
    r, n = shapes
    As, Bs = [torch.randn(r, n), torch.randn(2, n)], [torch.randn(6, r), torch.randn(6, 2)]
    if name == "orthogonal_init_":
        status = torch.empty(2, dtype=torch.int32)
        check_operator(name, As, [torch.empty(r, r), torch.empty(2, 2)], status, "reference")
        check_operator(name, As, [], status, "reference")
    elif name == "scaled_merge_":
        check_operator(name, As, [torch.randn(r, n), torch.randn(2, n)], [0.3, 0.8], "reference")
    else:
        check_operator(name, [torch.randn(6, n), torch.randn(6, n)], As, Bs, [0.3, 1.0], "reference")
