"""What one call can have against the fused forward of a patched layer; then PEFT's own runs, and says why once."""

from __future__ import annotations

import changes
import peft
import pytest
import torch
from torch import Tensor, nn

import slao_kernels
from slao_kernels import layers
from slao_kernels.layers import FusedLoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")


class Noisy(nn.Dropout):
    """Something in the place of the dropout that also works in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def patched(twins, base=nn.Linear, **options):
    """(patched model, its unpatched twin, the report)"""
    model, twin = (twins.net(lambda: base(24, 20), **options) for _ in range(2))
    report = slao_kernels.patch(model)
    assert report.patched == ["proj"]
    return model, twin, report


DROPOUT = "lora_dropout=0.1 while training, and other adapters are active: each draws a mask of its own"


def test_dropout_while_training_is_fused(twins, told):
    """The same masks as PEFT under the same seed, where the dtypes agree."""
    model, twin, report = patched(twins, lora_dropout=0.4)
    x = twins.net_input()
    with twins.CountOps() as ops:
        found = twins.net_step(model, x)
    assert ops.counts == {"lora_linear": 1, "lora_linear_backward": 1}
    expected = twins.net_step(twin, x)
    twins.check_close(found, expected)
    model.eval()
    assert twins.rms(twins.net_step(model, x)["y"] - found["y"]) > 0.05 * twins.rms(found["y"]), "nothing was dropped"
    assert report.fallbacks == {}
    assert told() == []


@pytest.mark.parametrize("precision", ["base", "adapter"])
def test_dropout_on_a_16_bit_base(precision, twins):
    """PEFT draws on x in the adapters' dtype, we in x's own: on the CPU torch gives both the same mask.

    x is 1 everywhere, so that a dropped element's share of the output is far more than a rounding.
    """
    model, twin = (twins.net(lambda: nn.Linear(24, 20).to(torch.bfloat16), lora_dropout=0.5) for _ in range(2))
    for net in (model, twin):
        net.proj.lora_A.float()
        net.proj.lora_B.float()
    slao_kernels.patch(model, precision=precision)
    x = torch.ones(40, 24, dtype=torch.bfloat16)
    found, expected = twins.net_step(model, x), twins.net_step(twin, x)
    twins.check_close(found, expected, 0.01 if precision == "adapter" else 0.02)
    with twins.CountOps() as ops:
        model(x)
    assert ops.forward == 1


def test_dropout_is_drawn_once_a_call(twins):
    """The generator goes on from where PEFT leaves it, so that a whole model's masks agree."""
    model, twin, _ = patched(twins, lora_dropout=0.4)
    states = []
    for net in (model, twin):
        torch.manual_seed(3)
        net(twins.net_input())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_dropout_of_one_of_two_adapters(twins, told):
    model, twin, report = patched(twins)
    for net in (model, twin):
        torch.manual_seed(4)
        peft.inject_adapter_in_model(twins.config(target_modules=["proj"], lora_dropout=0.1), net, "other")
        net.proj.set_adapter(["default", "other"])
    twins.check_peft_runs(model, twin, report.fallbacks, DROPOUT, told)


@pytest.mark.parametrize("training", [True, False])
def test_another_dropout_module(training, twins, told):
    """What is no plain nn.Dropout may act in eval mode too."""
    model, twin, report = patched(twins)
    for net in (model, twin):
        net.proj.lora_dropout["default"] = Noisy(0.5)
        net.train(training)
    twins.check_peft_runs(model, twin, report.fallbacks, "lora_dropout is a Noisy", told)


def test_hook_on_dropout(twins, told):
    model, twin, report = patched(twins)
    for net in (model, twin):
        net.proj.lora_dropout["default"].register_forward_hook(lambda module, args, output: 2 * output)
    twins.check_peft_runs(model, twin, report.fallbacks, "lora_dropout has hooks", told)


@pytest.mark.parametrize("kind", changes.GLOBAL_HOOKS)
def test_global_module_hook(kind, twins, told):
    model, twin, report = patched(twins)
    remove = changes.GLOBAL_HOOKS[kind](None)
    try:
        twins.check_peft_runs(model, twin, report.fallbacks, "a global module hook is registered", told)
    finally:
        remove()
    twins.check_fused(model)


def test_tensor_subclass(twins, told):
    model, twin, report = patched(twins)
    x = twins.net_input().as_subclass(changes.Tagged)
    assert type(twin(x)) is changes.Tagged
    twins.check_peft_runs(model, twin, report.fallbacks, "x is a Tagged", told, x)


def test_parameter_as_input_is_fused(twins):
    model, twin, _ = patched(twins)
    x = nn.Parameter(twins.net_input())
    twins.check_fused(model, x)
    twins.check_close({"y": model(x)}, {"y": twin(x)})


def test_fp64_under_autocast(twins, told):
    """Autocast leaves fp64 alone; so must we."""
    model, twin, report = patched(twins)
    model.double()
    twin.double()
    with torch.autocast("cpu", torch.bfloat16):
        x = twins.net_input(dtype=torch.float64)
        twins.check_peft_runs(model, twin, report.fallbacks, "fp64 under autocast", told, x)
        assert model(x).dtype == torch.float64


ERRORS = {
    "dtype": (lambda twins: (twins.net_input(dtype=torch.bfloat16),), "x is torch.bfloat16, the base weight"),
    "integers": (lambda twins: (torch.ones(2, 24, dtype=torch.int64),), "x is a 2-dimensional tensor of torch.int64"),
    "scalar": (lambda twins: (torch.tensor(1.0),), "x is a 0-dimensional tensor of torch.float32"),
    "device": (lambda twins: (twins.net_input().to("meta"),), "x is on meta, the base weight on cpu"),
    "positional": (lambda twins: (twins.net_input(), 1), "called with positional arguments beside x"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_input_that_peft_refuses(kind, twins, told):
    """PEFT's own exception, not one of ours; the reason is told all the same."""
    make, reason = ERRORS[kind]
    model, twin, report = patched(twins)
    args = make(twins)
    with pytest.raises(Exception) as theirs:
        twin(*args)
    with pytest.raises(type(theirs.value)) as ours:
        model(*args)
    assert str(ours.value) == str(theirs.value)
    assert reason in report.fallbacks["proj"]
    assert told() == [f"proj runs PEFT's own forward: {report.fallbacks['proj']}"]


def test_extra_keyword_arguments(twins, told):
    """aLoRA's offsets reach every LoRA layer of a model; None means that nothing was passed."""
    model, twin, report = patched(twins)
    with twins.CountOps() as ops:
        model(twins.net_input(), alora_offsets=None)
    assert ops.forward == 1
    reason = "called with alora_offsets beside x"
    twins.check_peft_runs(model, twin, report.fallbacks, reason, told, twins.net_input(), alora_offsets=[1, 2])


def test_mixed_batch(twins, told):
    """adapter_names: another adapter, or none, for every row."""
    model, twin = (twins.peft_model("llama", target_modules=["q_proj", "down_proj"]) for _ in range(2))
    report = slao_kernels.patch(model)
    for net in (model, twin):
        torch.manual_seed(4)
        net.add_adapter("other", twins.config(r=5, target_modules=["q_proj"]))
        twins.train_a_little(net)
        net.eval()
    names = ["other", "__base__", "default"]
    with twins.CountOps() as ops, torch.no_grad():
        found = model(twins.token_ids(), adapter_names=names).logits
    assert ops.counts == {}
    with torch.no_grad():
        expected = twin(twins.token_ids(), adapter_names=names).logits
    assert torch.equal(found, expected)
    assert report.fallbacks == dict.fromkeys(report.patched, "called with adapter_names beside x")
    assert len(told()) == 1
    with twins.CountOps() as ops:
        model(twins.token_ids())
    assert ops.forward == len(report.patched) == 4


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda v: f(v).square().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "per-sample grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda v: f(v).square().sum()))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x[0, 0]),
}


@pytest.mark.parametrize("base", [nn.Linear, changes.Doubling], ids=["plain base", "called base"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functorch_transforms(transform, base, twins, told):
    """Our autograd node has no rules for torch.func; PEFT's operations have."""
    model, twin, report = patched(twins, base)
    x = twins.net_input()
    found, expected = (TRANSFORMS[transform](net, x) for net in (model, twin))
    assert torch.equal(found, expected)
    assert report.fallbacks == {"proj": "inside a torch.func transform"}
    assert len(told()) == 1


def test_forward_mode_derivatives(twins, told):
    from torch.autograd import forward_ad

    model, twin, report = patched(twins)
    tangents = []
    for net in (model, twin):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(twins.net_input(), torch.ones(2, 5, 24))
            tangents.append(forward_ad.unpack_dual(net(dual)).tangent)
    assert torch.equal(*tangents)
    assert report.fallbacks == {"proj": "forward-mode differentiation"}
    assert len(told()) == 1


def test_second_derivatives_are_an_error(twins):
    """Differentiable once, as documented: an error that says so, never a wrong number."""
    model, _, _ = patched(twins)
    x = twins.net_input().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_the_log_does_not_grow_with_the_numbers_in_a_reason(twins, told):
    """One kind of reason is one line of the log and one entry of what was logged, whatever the shapes."""
    model, _, report = patched(twins)
    for shape in ((2, 5), (2, 7), (3, 100), (1000, 23)):
        with pytest.raises(RuntimeError):
            model(torch.ones(shape))
        assert report.fallbacks == {"proj": f"x has {shape[1]} features, the base layer reads 24"}
    assert len(layers._logged) == len(told()) == 1


def test_what_was_logged_is_not_logged_again(twins, told):
    """Once a reason and process, not once a layer; every layer is in the report."""
    model = twins.peft_model("llama", target_modules=["q_proj"], lora_dropout=0.1)
    model.add_adapter("other", twins.config(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    report = slao_kernels.patch(model)
    assert list(report.fallbacks.values()) == 2 * [DROPOUT]
    model.train()
    twins.step(model)
    twins.step(model)
    assert len(report.fallbacks) == 2
    assert all(type(m) is FusedLoraLinear for n, m in model.named_modules() if n.endswith("q_proj"))
    assert told() == [f"{report.patched[0]} runs PEFT's own forward: {DROPOUT}"]
