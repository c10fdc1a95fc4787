"""What patched experts compute, against PEFT's own wrappers and fp64: whole models, forward and every gradient."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import peft
import pytest
import torch
from expert_models import BOTH, EXACT, IDS, KINDS, config, experts_of, model_of, step, wrapper_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import slao_kernels
from slao_kernels.ops.expert_linear import mixture
from slao_kernels.testing import error_ratio


@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("kind", KINDS)
def test_fp64(kind, parameters):
    model = model_of(kind, torch.float64, parameters=parameters)
    expected = step(model)
    report = slao_kernels.patch(model)
    assert len(report.patched) == len(parameters)
    found = step(model)
    assert found.keys() == expected.keys()
    assert sum("lora_" in name for name in found) == 2 * len(parameters)
    for name, value in found.items():
        assert error_ratio(value, expected[name]) <= EXACT, name
    assert (report.skipped, report.fallbacks) == ({}, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_further_than_peft(kind, implementation, dtype):
    model = model_of(kind, dtype, implementation)
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    right, theirs = step(exact), step(model)
    report = slao_kernels.patch(model)
    ours = step(model)
    assert report.fallbacks == {}
    # In bf16 a token may be routed elsewhere: all errors together, as one number.
    far, near = (sum(error_ratio(found[name], right[name]) ** 2 for name in right) for found in (theirs, ours))
    # The variance of roundings: x W and its sum with x A B are two where PEFT's x (W + s B A) is one. 0.56 to 1.13 was
    # seen without bf16 instructions, 1.43 with them.
    assert near <= 2 * far
    assert {value.dtype for name, value in ours.items() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize(
    "index", [[[0, 1]], [[2, 3]] * 5, [[0, 2], [2, 0], [3, 1]], []], ids=["one token", "two", "all", "none"]
)
def test_whatever_the_router_chooses(index):
    """Experts without a token, one token, all tokens to the same."""
    model = model_of("mixtral", torch.float64)
    experts = wrapper_of(model)
    chosen = torch.tensor(index, dtype=torch.int64).view(-1, 2)
    torch.manual_seed(5)
    x = torch.randn(len(index), 32, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(len(index), 2, dtype=torch.float64, requires_grad=True)
    dy, results = torch.randn(len(index), 32, dtype=torch.float64), []
    for _ in range(2):
        model.zero_grad()
        x.grad = weights.grad = None
        y = experts(x, chosen, weights)
        if y.requires_grad:  # transformers' own result of no token has no graph
            y.backward(dy)
        lora = [p.grad for name, p in experts.named_parameters() if "lora_" in name]
        results.append([y.detach(), *(torch.zeros(()) if g is None else g for g in (x.grad, weights.grad, *lora))])
        report = slao_kernels.patch(model)
    assert report.fallbacks == {}
    for found, expected in zip(results[1], results[0], strict=True):
        assert found.abs().sum() == 0 if expected.abs().sum() == 0 else error_ratio(found, expected) <= EXACT


def test_all_rows_at_once(monkeypatch):
    """As on a GPU, where a loop over the experts would wait for it."""
    model = model_of("gpt_oss", torch.float64)
    slao_kernels.patch(model)
    expected = step(model)
    monkeypatch.setattr(mixture, "_loops", lambda tensor: False)
    for name, value in step(model).items():
        assert error_ratio(value, expected[name]) <= EXACT, name


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral"])
def test_biases_that_train_and_a_norm_of_the_experts(kind):
    """Both want more than the one node has: its projections are nodes of their own then."""
    exact = kind == "gpt_oss"
    model = model_of(kind, *((torch.float64, "eager") if exact else (torch.float32, "grouped_mm")))
    experts = experts_of(model)
    if exact:
        experts.gate_up_proj_bias.requires_grad_(True)
    else:
        experts.has_post_expert_norm, experts.post_expert_norm = True, nn.RMSNorm(32)
    expected, report = step(model), slao_kernels.patch(model)
    found = step(model)
    assert (report.skipped, report.fallbacks) == ({}, {})
    assert ("gate_up_proj_bias" in str(found.keys())) == exact
    for name, value in found.items():
        assert error_ratio(value, expected[name]) <= (1e-12 if exact else 1e-5), name


def test_what_a_step_keeps():
    """Of every row the gate's input and both t; no expert's output, no gathered tokens."""
    model = model_of("mixtral", torch.float32, "grouped_mm")
    slao_kernels.patch(model)
    wrapper = wrapper_of(model)
    x, weights = torch.randn(40, 32, requires_grad=True), torch.rand(40, 2, requires_grad=True)
    index, kept = torch.tensor([[0, 3], [2, 1]] * 20), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        wrapper(x, index, weights)
    sizes = Counter(t.shape[1] for t in kept if t.dim() == 2 and t.is_floating_point() for _ in range(len(t)))
    assert sizes == {128: 80, 3: 160, 32: 40}, "u, t, x"


@pytest.mark.parametrize("patched", [False, True], ids=["patched after", "patched before"])
def test_two_active_adapters_and_a_scaling_that_is_a_tensor(patched):
    model = model_of("gpt_oss", torch.float64)
    if patched:
        slao_kernels.patch(model)
    model.add_adapter("second", config(5, 3))
    model.double().base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if ".second." in name:
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.ParamWrapper):
            module.scaling["default"] = torch.tensor(5 / 3, dtype=torch.float64)
    slao_kernels.unpatch(model)
    expected, report = step(model), slao_kernels.patch(model)
    found = step(model)
    assert report.fallbacks == {}
    assert sum("second" in name for name in found) == 4
    for name, value in found.items():
        assert error_ratio(value, expected[name]) <= EXACT, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    model = model_of("qwen3_moe", torch.float64)
    slao_kernels.patch(model)
    expected = step(model)
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
    forward = layer.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        return (
            checkpoint(forward, *args, use_reentrant=reentrant, **kwargs)
            if not reentrant
            else checkpoint(lambda x: forward(x, *args[1:], **kwargs), args[0], use_reentrant=True)
        )

    model.enable_input_require_grads()
    layer.forward = run
    for name, value in step(model).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_autocast(implementation):
    """fp32 weights under autocast: the eager implementation computes in bf16, transformers' others in fp32."""
    model = model_of("mixtral", torch.float32, implementation)
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    right, theirs = step(exact), step(model, dtype=torch.bfloat16)
    slao_kernels.patch(model)
    ours = step(model, dtype=torch.bfloat16)
    names = [name for name in right if "lora_" in name]
    far, near = (sum(error_ratio(found[name], right[name]) ** 2 for name in names) for found in (theirs, ours))
    # In eager ours rounds A, B and t, where PEFT rounds W + s B A once, so three times the variance at most. 1.34 was
    # seen without bf16 instructions, 1.93 with them, 1.0 in grouped_mm.
    assert near <= 3 * far
    assert far > 1e-6, "nothing was rounded"


def test_compiled():
    model = model_of("mixtral", torch.float32, "grouped_mm")
    slao_kernels.patch(model)
    experts = wrapper_of(model)
    x, index, weights = torch.randn(6, 32), torch.tensor([[0, 1]] * 5 + [[3, 2]]), torch.rand(6, 2)
    expected = experts(x, index, weights)
    found = torch.compile(experts, fullgraph=True, backend="aot_eager")(x, index, weights)
    assert torch.equal(found, expected)


def test_a_base_that_changes_before_the_backward_pass_is_noticed():
    model = model_of("mixtral", torch.float32)
    slao_kernels.patch(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    with torch.no_grad():
        experts_of(model).down_proj.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_gradients_are_refused():
    model = model_of("mixtral", torch.float64)
    slao_kernels.patch(model)
    wrapper = wrapper_of(model)
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    y = wrapper(x, torch.tensor([[0, 1]] * 5), torch.rand(5, 2, dtype=torch.float64))
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (y.sum() + g.square().sum()).backward()


@pytest.mark.parametrize("kind", KINDS)
def test_fp64_under_autocast_stays_fp64(kind):
    model = model_of(kind, torch.float64)
    expected = step(model, dtype=torch.bfloat16)
    report = slao_kernels.patch(model)
    for name, value in step(model, dtype=torch.bfloat16).items():
        assert error_ratio(value, expected[name]) <= EXACT, name
    assert report.fallbacks == {}


def test_the_reference_by_wish_of_the_process():
    model = model_of("gpt_oss", torch.float64)
    slao_kernels.patch(model)
    expected = step(model)
    with slao_kernels.use_backend("reference"):
        for name, value in step(model).items():
            assert error_ratio(value, expected[name]) <= EXACT, name


def test_no_tokens_all_rows_at_once(monkeypatch):
    monkeypatch.setattr(mixture, "_loops", lambda tensor: False)
    model = model_of("mixtral", torch.float64)
    slao_kernels.patch(model)
    wrapper = wrapper_of(model)
    x = torch.empty(0, 32, dtype=torch.float64, requires_grad=True)
    y = wrapper(x, torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2, dtype=torch.float64))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 32)
