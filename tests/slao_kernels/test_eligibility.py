"""Layers and calls that patch must not touch: PEFT's own forward runs, bit for bit, and the reason is told once.

Numbers after each change, noticed and taken back, of every kind of layer: test_plan.py. A base layer that is no plain
nn.Linear is no reason: it is called, see test_called_base.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import changes
import foreign
import peft
import pytest
import torch
import twins
from changes import PARTS, Change, attribute, half, item, on, replace_forward
from torch import Tensor, nn

import slao_kernels
from slao_kernels import layers

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = "lora_A is a {}, lora_B a {}, not plain nn.Linear"
MATRIX = "lora_A or lora_B is not a plain floating matrix (sharded or quantised?)"
DROPOUT = "lora_dropout=0.1 while training, and other adapters are active: each draws a mask of its own"
DORA_DROPOUT = "DoRA with lora_dropout=0.4 while training: PEFT scales the base of the dropped x"
CALLED = "DoRA over a base layer that has to be called"
NUMBER = "x is a 0-dimensional tensor of torch.float32"
MIXED, OFFSETS = "called with adapter_names beside x", "called with alora_offsets beside x"
NAMES = {"adapter_names": ["default", "__base__"]}
QUANTISED = ["bitsandbytes, 4 bits", "bitsandbytes, 8 bits", "HQQ, 8 bits", "torchao, int8"]
A, B, BASE, MAGNITUDE = (PARTS[name] for name in ("lora_A", "lora_B", "base", "lora_magnitude_vector"))
X = twins.net_input()
dora = partial(twins.net, use_dora=True)
called = partial(twins.net, lambda: changes.Doubling(24, 20))


class Noisy(nn.Dropout):
    """Something in the place of the dropout that also works in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


noisy = item("lora_dropout", lambda _: Noisy(0.5))


@dataclass(frozen=True)
class Case:
    """What is said of a layer to which `change` is done, or of a call with `args` and `kwargs`."""

    why: str
    change: Change | None = None
    net: Callable[[], nn.Module] = twins.net
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def hook(module: nn.Module) -> changes.Undo:
    return module.register_forward_hook(half).remove


def beside(*active: str, **options: Any) -> Change:
    """Another adapter appears, and these are active then."""

    def apply(layer: Any) -> changes.Undo:
        back = changes.set_adapter(*layer.active_adapters)
        torch.manual_seed(4)
        config = twins.config(r=5, target_modules=["proj"], init_lora_weights=False, **options)
        peft.inject_adapter_in_model(config, nn.ModuleDict({"proj": layer}), "other")
        changes.set_adapter(*active)(layer)
        return lambda: back(layer)

    return apply


def any_B(layer: Any) -> changes.Undo:
    """Some of PEFT's adapters start at zero."""
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1, generator=torch.Generator().manual_seed(5))
    return lambda: None


def variant(why: str, **options: Any) -> Case:
    """An adapter that is no plain LoRA; a pair is a config class of PEFT's and its arguments."""
    made = {k: getattr(peft, v[0])(**v[1]) if isinstance(v, tuple) else v for k, v in options.items()}
    return Case(why, any_B, partial(twins.net, r=4, **made))


def other_layer(kind: str, x: Tensor, *sizes: int) -> Case:
    net = partial(twins.net, partial(getattr(nn, kind), *sizes))
    return Case(f"lora.layer.{kind} has no fused forward", None, net, (x,))


ALWAYS = {
    f"{name}: {what}": Case(why.format(name), on(PARTS[name], change))
    for name in ("lora_A", "lora_B")
    for what, (change, why) in {**changes.OF_A_MODULE, **changes.OF_A_WEIGHT}.items()
}
ALWAYS |= {
    f"{kind}, hook": Case("lora_A has hooks", on(A, hook), partial(foreign.net, kind))
    for kind in ("GPTQ, stand-in", "bitsandbytes, 4 bits", "torchao, int8")
}
ALWAYS |= {
    "lora_A: parametrized": Case(PLAIN.format("ParametrizedLinear", "Linear"), on(A, changes.parametrized)),
    "lora_B: subclass": Case(PLAIN.format("Linear", "Other"), on(B, changes.other_class)),
    # PEFT's forward cannot multiply these either (as they are; FSDP and ZeRO-3 put others there for the call).
    "lora_A: flat": Case(MATRIX, on(A, attribute("weight", lambda _: nn.Parameter(torch.ones(0))))),
    "lora_B: fp8": Case(MATRIX, on(B, attribute("weight", lambda w: nn.Parameter(w.to(torch.float8_e4m3fn), False)))),
    "DoRA, hook on the magnitude": Case("DoRA's magnitude has hooks", on(MAGNITUDE, hook), dora),
    "DoRA, hook on the base": Case(CALLED, on(BASE, hook), dora),
    # PEFT's config refuses it, and its forward would count it into the norm.
    "DoRA, own bias": Case(
        "DoRA with lora_bias", on(B, attribute("bias", lambda _: nn.Parameter(torch.ones(20)))), dora
    ),
}
BEFORE = {
    # Swapping the class of such a layer would do nothing.
    "its own forward": Case("its forward was replaced on the instance (accelerate hooks?)", replace_forward),
    "aLoRA": variant("ALora: not plain LoRA", alora_invocation_tokens=[1]),
    "MiCA": variant("MiCA: not", init_lora_weights="mica"),
    "VeLoRA": variant("Velora: not", velora_config=("VeloraConfig", {"num_groups": 2, "init_type": "random"})),
    "BD-LoRA": variant("BdLora: not", use_bdlora=("BdLoraConfig", {"target_modules_bd_a": ["proj"], "nblocks": 2})),
    "Monte-CLoRA": variant("Monteclora: not", monteclora_config=("MontecloraConfig", {})),
    "Embedding": other_layer("Embedding", torch.arange(12).view(3, 4), 30, 20),
    "Conv2d": other_layer("Conv2d", twins.net_input(2, 6, 7, 7), 6, 8, 3),
    "Conv1d": other_layer("Conv1d", twins.net_input(2, 6, 7), 6, 8, 3),
}
BEFORE |= {f"DoRA over {kind}": Case(CALLED, None, partial(foreign.net, kind, use_dora=True)) for kind in QUANTISED}
OTHERS = beside("other", "default"), beside("other", "default", use_dora=True)
AFTER = {f"global hook: {n}": Case("a global module hook is registered", c) for n, c in changes.GLOBAL_HOOKS.items()}
AFTER |= {
    "dropout of one of two": Case(DROPOUT, beside("default", "other", lora_dropout=0.1)),
    "other dropout": Case("lora_dropout is a Noisy", noisy),
    "other dropout, eval": Case("lora_dropout is a Noisy", changes.all_of(noisy, changes.training)),
    "hook on dropout": Case("lora_dropout has hooks", on(PARTS["lora_dropout"], hook)),
    "aLoRA": Case("ALora: not plain LoRA", beside("other", alora_invocation_tokens=[1])),
    "DoRA beside LoRA": Case("DoRA beside other active adapters", OTHERS[0], dora),
    "DoRA beside DoRA": Case("DoRA beside other active adapters", OTHERS[1], dora),
    "DoRA, dropout": Case(DORA_DROPOUT, net=partial(dora, lora_dropout=0.4)),
    "called base, hook": Case("lora_B has hooks", on(B, hook), called),
    "x: subclass": Case("x is a Tagged", args=(X.as_subclass(changes.Tagged),)),
    "x: dtype": Case("x is torch.bfloat16, the base weight torch.float32", args=(X.bfloat16(),)),
    "x: integers": Case("x is a 2-dimensional tensor of torch.int64", args=(torch.ones(2, 24, dtype=torch.int64),)),
    "x: number": Case(NUMBER, args=(torch.tensor(1.0),)),
    "x: device": Case("x is on meta, the base weight on cpu", args=(X.to("meta"),)),
    "positional": Case("called with positional arguments beside x", args=(X, 1)),
    "offsets": Case(OFFSETS, kwargs={"alora_offsets": [1, 2]}),  # aLoRA's reach every LoRA layer of a model
    "mixed batch": Case(MIXED, beside("default"), kwargs={"adapter_names": ["other", "__base__"]}),
    "called base, x: number": Case(NUMBER, net=called, args=(torch.tensor(1.0),)),
    "called base, x: device": Case("adapter 'default' is on cpu, x on meta", net=called, args=(X.to("meta"),)),
    "called base, offsets": Case(OFFSETS, net=called, kwargs={"alora_offsets": [1, 2]}),
    "called base, mixed batch": Case(MIXED, net=called, kwargs=NAMES),
}
AFTER |= {f"{kind}, mixed batch": Case(MIXED, net=partial(foreign.net, kind), kwargs=NAMES) for kind in QUANTISED[:3]}


@pytest.mark.parametrize("what", {**ALWAYS, **BEFORE})
def test_before_patch(what, told):
    case = {**ALWAYS, **BEFORE}[what]
    model, twin = case.net(), case.net()
    for net in (model, twin):
        if case.change is not None:
            case.change(net.proj)
    report = slao_kernels.patch(model)
    assert (report.patched, report.fallbacks) == ([], {})
    assert type(model.proj) is type(twin.proj)
    twins.check_peft_runs(model, twin, report.skipped, case.why, told, *case.args, **case.kwargs)


@pytest.mark.parametrize("what", {**ALWAYS, **AFTER})
def test_after_patch(what, told):
    """Patched again it gets PEFT's class back; and it is fused again when the cause has gone."""
    case = {**ALWAYS, **AFTER}[what]
    model, twin, report = twins.net_pair(case.net)
    undos = [case.change(net.proj) for net in (model, twin)] if case.change else []
    try:
        twins.check_peft_runs(model, twin, report.fallbacks, case.why, told, *case.args, **case.kwargs)
        if what in ALWAYS:
            assert slao_kernels.patch(model).skipped == report.fallbacks
            assert type(model.proj) is type(twin.proj)
            assert "slao_options" not in vars(model.proj)
    finally:
        for undo in undos:
            undo()
    if what in ALWAYS:
        assert slao_kernels.patch(model).patched == ["proj"]
    if undos:
        twins.check_fused(model, *case.args)


def test_forward_replaced_after_patch():
    """The hook then wraps the fused forward; unpatch cannot take that apart, so it refuses and changes nothing."""
    model, twin, _ = twins.net_pair()
    undos = [replace_forward(net.proj) for net in (model, twin)]
    twins.check_same(model, twin, ops=1)
    assert slao_kernels.patch(model).patched == ["proj"]  # it is still fused, inside the hook
    with pytest.raises(ValueError, match="proj: its forward was replaced"):
        slao_kernels.unpatch(model)
    twins.check_fused(model)
    for undo in undos:
        undo()
    assert slao_kernels.unpatch(model) == 1
    twins.check_equal(twins.net_step(model, X), twins.net_step(twin, X))


def test_hooks_taken_off_again():
    """accelerate leaves the class's own forward bound on the instance: that is no replacement."""
    model, twin = twins.net(), twins.net()
    for module in (model.proj.base_layer, model.proj.lora_A["default"]):
        replace_forward(module)()
        assert "forward" in module.__dict__
    assert slao_kernels.patch(model).patched == ["proj"]
    twins.check_same(model, twin, ops=1)


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_meta_device(what, told):
    """Weights on meta have no values to compare: the shape of the output, then the real thing after loading."""
    with torch.device("meta" if what == "model" else "cpu"):
        model = twins.Net(nn.Linear(24, 20))
    peft.inject_adapter_in_model(twins.config(target_modules=["proj"]), model, low_cpu_mem_usage=True)
    report = slao_kernels.patch(model)
    assert (report.patched, list(report.skipped)) == ([], ["proj"])
    whose = "its weights are" if what == "model" else "its adapter is"
    assert report.skipped["proj"].startswith(f"{whose} on the meta device; load")
    assert told() == [f"proj runs PEFT's own forward: {report.skipped['proj']}"]
    assert model(X.to("meta") if what == "model" else X).shape == (2, 5, 20)
    twin = twins.net()
    model.load_state_dict(twin.state_dict(), assign=True)
    assert slao_kernels.patch(model).patched == ["proj"]
    twins.check_fused(model)
    twins.check_close({"y": model(X)}, {"y": twin(X)})


@pytest.mark.parametrize("precision", ["base", "adapter"])
def test_dropout_on_a_16_bit_base(precision):
    """PEFT draws on x in the adapters' dtype, we in x's own: on the CPU torch gives both the same mask.

    x is 1 everywhere, so that a dropped element's share of the output is far more than a rounding.
    """
    model, twin = (twins.net(lambda: nn.Linear(24, 20).to(torch.bfloat16), lora_dropout=0.5) for _ in range(2))
    for net in (model, twin):
        net.proj.lora_A.float()
        net.proj.lora_B.float()
    slao_kernels.patch(model, precision=precision)
    x = torch.ones(40, 24, dtype=torch.bfloat16)
    twins.check_same(model, twin, x, ops=1, tolerance=0.01 if precision == "adapter" else 0.02)


def test_no_reasons():
    """A parameter as x; None is as good as no argument."""
    model, twin, report = twins.net_pair()
    twins.check_fused(model, nn.Parameter(X))
    twins.check_same(model, twin, X, alora_offsets=None, ops=1)
    assert report.fallbacks == {}


def test_fp64_under_autocast(told):
    """Autocast leaves fp64 alone; so must we."""
    model, twin, report = twins.net_pair(lambda: twins.net().double())
    with torch.autocast("cpu", torch.bfloat16):
        twins.check_peft_runs(model, twin, report.fallbacks, "fp64 under autocast", told, X.double())
        assert model(X.double()).dtype == torch.float64


TRANSFORMS = {
    **changes.TRANSFORMS,
    "per-sample grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda v: f(v).square().sum()))(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x[0, 0]),
}


@pytest.mark.parametrize("net", [twins.net, called], ids=["plain base", "called base"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, net, told):
    """Our autograd node has no rules for torch.func and forward mode; PEFT's operations have."""
    model, twin, report = twins.net_pair(net)
    assert torch.equal(*(TRANSFORMS[transform](net, X) for net in (model, twin)))
    why = "forward-mode differentiation" if transform == "forward mode" else "inside a torch.func transform"
    assert report.fallbacks == {"proj": why}
    assert len(told()) == 1


def test_the_log_does_not_grow_with_the_numbers_in_a_reason(told):
    """One kind of reason is one line of the log and one entry of what was logged, whatever the shapes."""
    model, _, report = twins.net_pair()
    for shape in ((2, 5), (2, 7), (3, 100), (1000, 23)):
        with pytest.raises(RuntimeError):
            model(torch.ones(shape))
        assert report.fallbacks == {"proj": f"x has {shape[1]} features, the base layer reads 24"}
    assert len(layers._logged) == len(told()) == 1


def test_what_was_logged_is_not_logged_again(told):
    """Once a reason and process, not once a layer; every layer is in the report, from the start."""
    model = twins.peft_model("llama", target_modules=["q_proj"], lora_dropout=0.1)
    model.add_adapter("other", twins.config(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    report = slao_kernels.patch(model)
    for _ in range(2):
        assert list(report.fallbacks.values()) == 2 * [DROPOUT]
        assert len(report.patched) == 2
        twins.step(model.train())
    assert told() == [f"{report.patched[0]} runs PEFT's own forward: {DROPOUT}"]
