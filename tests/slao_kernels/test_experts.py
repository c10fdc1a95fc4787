"""Patched experts against PEFT's own wrappers: whole models, every gradient, and what keeps PEFT's forward."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slao_kernels
from slao_kernels.testing import error_ratio, tiny_model

KINDS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek"]
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.randint(0, 128, (3, 9), generator=torch.Generator().manual_seed(1))


def model_of(
    kind: str, dtype: torch.dtype, implementation: str = "eager", parameters=BOTH, **options: Any
) -> nn.Module:
    """With an adapter as training leaves it, in the model's dtype."""
    model = tiny_model(kind, num_hidden_layers=1).to(dtype)
    model.set_experts_implementation(implementation)
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": parameters, **options}
    )
    model = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype) if dtype == torch.float64 else model


def step(model: nn.Module, run=None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The logits and the gradients of everything that trains, of the routers too."""
    for name, parameter in model.named_parameters():
        if "gate.weight" in name or "router.weight" in name:
            parameter.requires_grad_(True)
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        found = (run or model)(input_ids=IDS, labels=IDS)
    found.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.logits.detach(), **grads}


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
        assert error_ratio(value, expected[name]) <= 1e-12, name
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
    assert near <= 1.5 * far
    assert {value.dtype for name, value in ours.items() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize(
    "index", [[[0, 1]], [[2, 3]] * 5, [[0, 2], [2, 0], [3, 1]], []], ids=["one token", "two", "all", "none"]
)
def test_whatever_the_router_chooses(index):
    """Experts without a token, one token, all tokens to the same."""
    model = model_of("mixtral", torch.float64)
    experts = next(module for name, module in model.named_modules() if name.endswith("experts"))
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
        assert found.abs().sum() == 0 if expected.abs().sum() == 0 else error_ratio(found, expected) <= 1e-12


def test_all_rows_at_once(monkeypatch):
    """As on a GPU, where a loop over the experts would wait for it."""
    from slao_kernels.ops.expert_linear import mixture

    model = model_of("gpt_oss", torch.float64)
    slao_kernels.patch(model)
    expected = step(model)
    monkeypatch.setattr(mixture, "_loops", lambda tensor: False)
    for name, value in step(model).items():
        assert error_ratio(value, expected[name]) <= 1e-12, name


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral"])
def test_biases_that_train_and_a_norm_of_the_experts(kind):
    """Both want more than the one node has: its projections are nodes of their own then."""
    exact = kind == "gpt_oss"
    model = model_of(kind, *((torch.float64, "eager") if exact else (torch.float32, "grouped_mm")))
    experts = _experts(model)
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
    wrapper = next(module for name, module in model.named_modules() if name.endswith("experts"))
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
    model.add_adapter("second", peft.LoraConfig(r=5, lora_alpha=3, target_modules=[], target_parameters=BOTH))
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
        assert error_ratio(value, expected[name]) <= 1e-12, name


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
    assert near <= 1.5 * far
    assert far > 1e-6, "nothing was rounded"


def test_compiled():
    model = model_of("mixtral", torch.float32, "grouped_mm")
    slao_kernels.patch(model)
    experts = next(module for name, module in model.named_modules() if name.endswith("experts"))
    x, index, weights = torch.randn(6, 32), torch.tensor([[0, 1]] * 5 + [[3, 2]]), torch.rand(6, 2)
    expected = experts(x, index, weights)
    found = torch.compile(experts, fullgraph=True, backend="aot_eager")(x, index, weights)
    assert torch.equal(found, expected)


def test_state_dict_and_save_are_pefts(tmp_path):
    model, plain = (model_of("mixtral", torch.float32) for _ in range(2))
    slao_kernels.patch(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    base = tiny_model("mixtral", num_hidden_layers=1)
    base.set_experts_implementation("eager")
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert error_ratio(model(input_ids=IDS).logits, again(input_ids=IDS).logits) <= 1e-6
    assert slao_kernels.unpatch(model) == 2
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain.modules(), strict=True))


def test_copied_pickled_deleted():
    model = model_of("mixtral", torch.float64)
    slao_kernels.patch(model)
    expected = model(input_ids=IDS).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(input_ids=IDS).logits, expected)
        assert slao_kernels.unpatch(again) == 2
    model.add_adapter("second", peft.LoraConfig(r=5, target_modules=[], target_parameters=BOTH))
    model.delete_adapter("second")
    assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_unmerging_gives_the_base_its_bits_back(kind, dtype):
    """gpt_oss stores its experts transposed. What is merged answers as the adapter does."""
    model = model_of(kind, dtype)
    slao_kernels.patch(model)
    experts = _experts(model)
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    expected = [
        layer.get_delta_weight("default").double() for layer in model.modules() if hasattr(layer, "parameter_name")
    ]
    for cycle in range(5):
        model.merge_adapter(safe_merge=cycle % 2 == 0)
        for name, delta in zip(("down_proj", "gate_up_proj"), expected, strict=True):
            now = getattr(experts, name).double()
            assert (now - before[name].double() - delta).norm() <= 2 * torch.finfo(dtype).eps * now.norm()
            assert not torch.equal(now, before[name].double())
        model.unmerge_adapter()
        assert all(torch.equal(p, before[name]) for name, p in experts.named_parameters())
    model.merge_adapter()
    experts.down_proj.data[1, 2, 3] += 1
    with pytest.raises(ValueError, match="has changed since the fold"):
        model.unmerge_adapter()


def test_merged_and_disabled_are_pefts():
    model = model_of("qwen3_moe", torch.float64)
    plain = copy.deepcopy(model)
    report = slao_kernels.patch(model)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    tuned = model(input_ids=IDS).logits
    model.merge_adapter()
    assert error_ratio(model(input_ids=IDS).logits, tuned) <= 1e-12
    model.unmerge_adapter()
    assert error_ratio(model(input_ids=IDS).logits, tuned) <= 1e-12
    assert report.fallbacks == {}


def _experts(model: nn.Module) -> Any:
    return next(m for m in model.modules() if hasattr(m, "has_gate") and not hasattr(m, "base_layer"))


def _hooked(model: nn.Module) -> None:
    _experts(model).register_forward_hook(lambda *args: None)


def _trains(model: nn.Module) -> None:
    _experts(model).down_proj.requires_grad_(True)


def _foreign(model: nn.Module) -> None:
    _experts(model).config._experts_implementation = "sonicmoe"


def _spread(model: nn.Module) -> None:
    _experts(model)._is_expert_parallel = True


def _parametrized(model: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(_experts(model), "down_proj", nn.Identity())


REASONS = {
    "a hook": (_hooked, "its MixtralExperts has hooks"),
    "the base trains": (_trains, "its down_proj trains too"),
    "other kernels": (_foreign, "the config asks for experts_implementation='sonicmoe', whose kernels are its own"),
    "expert parallel": (_spread, "its experts are spread over devices (expert parallel)"),
    "parametrized": (_parametrized, "a parameter of its experts is parametrized"),
}


@pytest.mark.parametrize("what", REASONS)
def test_what_keeps_pefts_forward(what):
    """Before patch it is skipped, after it falls back, each with the reason."""
    change, reason = REASONS[what]
    early, late = model_of("mixtral", torch.float32), model_of("mixtral", torch.float32)
    change(early)
    report = slao_kernels.patch(early)
    assert len(report.skipped) == 2
    assert set(report.skipped.values()) == {reason}
    report = slao_kernels.patch(late)
    assert len(report.patched) == 2
    expected = late(input_ids=IDS).logits
    change(late)
    if what != "other kernels":  # which need a GPU
        assert error_ratio(late(input_ids=IDS).logits, expected) <= 1e-5
        assert report.fallbacks[report.patched[0]] == reason


def test_a_forward_of_its_own():
    """A subclass may compute something else."""
    model = model_of("mixtral", torch.float32)
    experts = _experts(model)
    own = type("Mine", (type(experts),), {"forward": lambda self, *args: 2 * super(type(self), self).forward(*args)})
    experts.__class__ = own
    report = slao_kernels.patch(model)
    assert set(report.skipped.values()) == {"Mine has a forward of its own"}


def test_a_base_that_changes_before_the_backward_pass_is_noticed():
    model = model_of("mixtral", torch.float32)
    slao_kernels.patch(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    with torch.no_grad():
        _experts(model).down_proj.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_gradients_are_refused():
    model = model_of("mixtral", torch.float64)
    slao_kernels.patch(model)
    wrapper = next(module for name, module in model.named_modules() if name.endswith("experts"))
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
        assert error_ratio(value, expected[name]) <= 1e-12, name
    assert report.fallbacks == {}


def test_the_reference_by_wish_of_the_process():
    model = model_of("gpt_oss", torch.float64)
    slao_kernels.patch(model)
    expected = step(model)
    with slao_kernels.use_backend("reference"):
        for name, value in step(model).items():
            assert error_ratio(value, expected[name]) <= 1e-12, name


def test_one_of_two_wrappers_with_nothing_to_add():
    """Still one node: the other's adapter alone."""
    model, plain = model_of("mixtral", torch.float64), model_of("mixtral", torch.float64)
    report = slao_kernels.patch(model)
    for each in (model, plain):
        chain = [module for module in each.modules() if hasattr(module, "parameter_name")]
        chain[-1].enable_adapters(False)
    found, expected = step(model), step(plain)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert error_ratio(value, expected[name]) <= 1e-12, name
    assert report.fallbacks == {}


def test_no_tokens_all_rows_at_once(monkeypatch):
    from slao_kernels.ops.expert_linear import mixture

    monkeypatch.setattr(mixture, "_loops", lambda tensor: False)
    model = model_of("mixtral", torch.float64)
    slao_kernels.patch(model)
    wrapper = next(module for name, module in model.named_modules() if name.endswith("experts"))
    x = torch.empty(0, 32, dtype=torch.float64, requires_grad=True)
    y = wrapper(x, torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2, dtype=torch.float64))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 32)


def test_a_router_keeps_pefts_forward():
    """A 2-D parameter is none of the experts'."""
    model = model_of("mixtral", torch.float32, parameters=["mlp.gate.weight"])
    report = slao_kernels.patch(model)
    assert list(report.skipped.values()) == ["MixtralTopKRouter is no experts module of transformers' registry"]


def test_the_report_names_experts():
    text = str(slao_kernels.patch(model_of("mixtral", torch.float32)))
    assert "2 of 2 LoRA layers fused" in text
    assert "gate_up_proj of 4 experts" in text
    assert "down_proj of 4 experts" in text
