"""The classes that PEFT's LoRA layers are swapped to, and what a planned call computes.

Imports PEFT: only `patch` and unpickling load this module. PEFT has a LoRA class for each kind of quantised base; those
in `_CALLED` compute base(x) + Σ scaling · B A x whatever the base, and each gets a subclass here that calls the base.
It is made when first asked for, because most of PEFT's need packages of their own; pickle asks by name.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import dispatch, eligibility, exact_merge
from .holders import FRESH, holders, writable
from .ops import dora
from .ops.lora_linear.autograd import Call, add, call_for, linear
from .plan import LayerPlan, active_adapters, parameters_of

logger = logging.getLogger("slao_kernels")
_logged: set[str] = set()


@dataclass
class FusedOptions:
    """What `patch` decided for one layer. `fallbacks` and `notes` are shared with the PatchReport: name -> text."""

    name: str
    backend: str = "auto"
    precision: str = "base"
    fallbacks: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickle of another version: what it does not know keeps its default, what we do not know is dropped."""
        known = {field.name: state[field.name] for field in fields(self) if field.name in state}
        self.__init__(**{"name": "(unnamed layer)", **known})  # type: ignore[misc]

    def fell_back(self, reason: str) -> None:
        """Put the reason into the report, and into the log once per reason; not while torch.compile looks on."""
        if is_compiling():
            return
        self.fallbacks[self.name] = reason
        log_once(self.name, reason)

    def calls_base(self, why: str) -> None:
        """Put into the report that the base layer runs its own forward, if it is not there yet."""
        if not is_compiling() and self.name not in self.notes:
            self.notes[self.name] = f"base layer called: {why}"


def log_once(name: str, reason: str) -> None:
    """One warning per kind of reason (whatever its numbers) and process, naming the first layer that it concerns."""
    kind = re.sub(r"\d+", "#", reason)
    if kind not in _logged:
        _logged.add(kind)
        logger.warning("%s runs PEFT's own forward: %s", name, reason)


class FusedLoraLinear(lora.Linear):
    """PEFT's LoRA linear layer with a fused forward; everything else, state included, is PEFT's.

    Instances come from `module.__class__ = FusedLoraLinear` (see `patch`), never from a constructor call.
    """

    # On the class, so that a layer unpickled from another version still has one.
    slao_options = FusedOptions("(unnamed layer)")
    peft_class: Any = lora.Linear
    slao_knows_base = True  # what the base layer computes follows from its class
    slao_only_x = False  # PEFT's forward takes x alone

    def _get_name(self) -> str:
        """PEFT's: its layer status reads the kind of a layer off the printed name."""
        return self.peft_class.__name__

    def extra_repr(self) -> str:
        return "fused by slao_kernels"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: base(x) + Σ scaling · B A x over the active adapters. x: (..., K) -> (..., N)."""
        own = self.__dict__
        plan: Any = own.get("slao_plan")
        tensors = None if plan is None or args or kwargs or is_compiling() else plan.tensors(own, x)
        if tensors is None:
            plan = make_plan(self, x, args, kwargs)
            # None: a quantised base has no weight, or none of that name; it is called.
            tensors = [getattr(module, name, None) for module, name in parameters_of(self)] if plan.adapters else []
        return plan.run(plan, self, x, tensors, args, kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's, rounded once, and such that `unmerge` gives the base its bits back where it can (exact_merge)."""
        names = check_adapters_to_merge(self, adapter_names)
        reason = exact_merge.why_not(self, names)
        if reason is None:
            return exact_merge.merge(self, names, safe_merge)
        exact_merge.forget(self, reason)
        self.peft_class.merge(self, safe_merge, names)

    def unmerge(self) -> None:
        """As PEFT's; bit for bit what `merge` found."""
        if not exact_merge.unmerge(self):
            self.peft_class.unmerge(self)


def make_plan(layer: Any, x: Any, args: Any, kwargs: dict[str, Any]) -> LayerPlan:
    """The plan for this call, kept by the layer if it is of use for another."""
    found = eligibility.decide(layer, x, args, kwargs)
    plan = LayerPlan(_RUNS[found.kind], found.why)
    if found.kind != "peft":
        plan.adapters, plan.called = tuple(active_adapters(layer)), found.called
        plan.transposed = found.kind != "add" and type(layer.base_layer) is not nn.Linear  # Conv1D stores (K, N)
        own_bias = any(layer.lora_B[name].bias is not None for name in plan.adapters)
        # A scaling that is a tensor (PEFT's hotswap) must not be read back from a GPU: it goes into B, and so do those
        # of several adapters, and one beside which B gets a bias as another column.
        plan.scaled = len(plan.adapters) > 1 or any(isinstance(layer.scaling[name], Tensor) for name in plan.adapters)
        plan.scaled |= found.kind == "add" and own_bias
        if found.kind == "linear" and (plan.scaled or own_bias):
            plan.run = run_stacked
        elif found.kind != "add":
            base, (down, up) = layer.base_layer, (part[plan.adapters[0]] for part in (layer.lora_A, layer.lora_B))
            plan.call = _call(layer, plan, x, [base.weight, base.bias, down.weight, up.weight])
    if found.why is not None:
        layer.slao_options.fell_back(found.why)
    if found.called is not None:
        layer.slao_options.calls_base(found.called)
    if not (args or kwargs or is_compiling()):
        layer.__dict__["slao_plan"] = plan.watch(layer, x)
    return plan


def _call(layer: Any, plan: LayerPlan, x: Tensor, tensors: list[Any], made: torch.dtype | None = None) -> Call:
    options, name = layer.slao_options, plan.adapters[0]
    scaling = 1.0 if plan.scaled else float(layer.scaling[name])
    # Several adapters with dropout have been ruled out: each would see a mask of its own.
    p = eligibility.active_dropout(layer, name)
    return call_for(x, tensors, scaling, options.precision, options.backend, p, made)


def run_peft(plan: LayerPlan, layer: Any, x: Tensor, tensors: list[Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
    """PEFT's own forward."""
    return layer.peft_class.forward(layer, x, *args, **kwargs)


def run_linear(plan: LayerPlan, layer: Any, x: Tensor, tensors: list[Any], args: Any, kwargs: Any) -> Tensor:
    """One adapter, and nothing of it but A and B: base and branch in one node."""
    weight, bias, A, B, _ = tensors
    weight = weight.t() if plan.transposed else weight
    call = plan.call
    return linear(call)(call, x, weight, bias, A, B)


def run_stacked(plan: LayerPlan, layer: Any, x: Tensor, tensors: list[Any], args: Any, kwargs: Any) -> Tensor:
    """Several adapters, biases of their own, a scaling that is a tensor: as one adapter of rank Σ r."""
    weight, bias, *pairs = tensors
    weight = weight.t() if plan.transposed else weight
    A, B = stacked(layer, plan, pairs)
    bias = with_own_bias(layer, plan, pairs, bias)
    call = plan.call = plan.call or _call(layer, plan, x, [weight, bias, A, B])
    return linear(call)(call, x, weight, bias, A, B)


def run_dora(plan: LayerPlan, layer: Any, x: Tensor, tensors: list[Any], args: Any, kwargs: Any) -> Tensor:
    """DoRA, alone and without dropout."""
    weight, bias, *pair, magnitude = tensors
    weight = weight.t() if plan.transposed else weight
    A, B = stacked(layer, plan, pair)
    return dora.run(plan.call, x, weight, bias, magnitude, A, B)


def run_add(plan: LayerPlan, layer: Any, x: Tensor, tensors: list[Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The base layer is called, and one node adds the branch to what it returns."""
    _, _, A, B, *more = tensors
    if plan.scaled or len(more) > 1:
        A, B = stacked(layer, plan, tensors[2:])
        bias = with_own_bias(layer, plan, tensors[2:], None)
        if bias is not None:
            B = torch.cat([B, bias[:, None]], 1)
    if kwargs:
        kwargs = {name: value for name, value in kwargs.items() if name not in eligibility.PEFT_ARGUMENTS}
    y = layer._modules["base_layer"](x, *args, **kwargs)  # nn.Module's getattr takes a microsecond
    reason = eligibility.result_reason(y, x, A, B)
    if reason is not None:
        layer.slao_options.fell_back(reason)
        return _by_torch(layer, y, x)
    made, call = plan.made
    if made is not y.dtype:
        call = _call(layer, plan, x, [None, None, A, B], y.dtype)
        plan.made = y.dtype, call
    # Counted here, where nothing but this frame's variable holds what the base has just made.
    alone = dispatch.direct() and FRESH is not None and holders(y) == FRESH and writable(y)
    return add(call)(call, y, x, A, B, alone)


_RUNS = {"peft": run_peft, "linear": run_linear, "dora": run_dora, "add": run_add}


def stacked(layer: Any, plan: LayerPlan, pairs: list[Any]) -> tuple[Tensor, Tensor]:
    """A (Σr, K) and B (N, Σr), the scalings in B if the plan says so; pairs: A, B and B's bias of each adapter."""
    As, Bs = pairs[::3], pairs[1::3]
    if plan.scaled:
        Bs = [B * layer.scaling[name] for name, B in zip(plan.adapters, Bs, strict=True)]
    return (As[0], Bs[0]) if len(As) == 1 else (torch.cat(As), torch.cat(Bs, dim=1))


def with_own_bias(layer: Any, plan: LayerPlan, pairs: list[Any], bias: Tensor | None) -> Tensor | None:
    """(N,) bias + Σ scaling · B's own bias (PEFT's lora_bias): vectors, added once instead of at every token.

    In fp32 at least: between its parts a 16-bit bias, and its gradient, would be rounded twice.
    """
    for name, own in zip(plan.adapters, pairs[2::3], strict=True):
        if own is not None:
            own = own.to(torch.promote_types(own.dtype, torch.float32)) * layer.scaling[name]
            bias = own if bias is None else bias + own
    return bias


def _by_torch(layer: Any, y: Any, x: Tensor) -> Tensor:
    """PEFT's formula on a result that is there already: to call a base twice could change its state."""
    dtype = y.dtype
    for name in active_adapters(layer):
        down, up = layer.lora_A[name], layer.lora_B[name]
        y = y + up(down(layer.lora_dropout[name](x.to(down.weight.dtype)))) * layer.scaling[name]
    return y.to(dtype)


# PEFT's class, below peft.tuners.lora -> the name of ours, in this module.
_CALLED = {
    "bnb.Linear8bitLt": "FusedLinear8bitLt",
    "bnb.Linear4bit": "FusedLinear4bit",
    "gptq.GPTQLoraLinear": "FusedGPTQLoraLinear",
    "awq.AwqLoraLinear": "FusedAwqLoraLinear",
    "aqlm.AqlmLoraLinear": "FusedAqlmLoraLinear",
    "eetq.EetqLoraLinear": "FusedEetqLoraLinear",
    "hqq.HqqLoraLinear": "FusedHqqLoraLinear",
    "inc.IncLoraLinear": "FusedIncLoraLinear",
    "torchao.TorchaoLoraLinear": "FusedTorchaoLoraLinear",
    "te.TeLinear": "FusedTeLinear",
}
_PACKAGE = "peft.tuners.lora."


def fused_class(layer: nn.Module) -> Any:
    """The class that `layer`, PEFT's or already fused, is swapped to; None where its forward is not known."""
    own = peft_class(layer)
    if own is lora.Linear:
        return FusedLoraLinear
    name = _CALLED.get(f"{own.__module__}.{own.__qualname__}".removeprefix(_PACKAGE))
    return None if name is None else getattr(importlib.import_module(__name__), name)


def peft_class(layer: nn.Module) -> Any:
    """The class that `layer` has, or had before it was fused."""
    return type(layer).peft_class if is_fused(layer) else type(layer)


def is_fused(layer: nn.Module) -> bool:
    """Whether `patch` has swapped its class. A user's subclass of ours is something else."""
    return "peft_class" in type(layer).__dict__


def __getattr__(name: str) -> type:
    for theirs, ours in _CALLED.items():
        if ours == name:
            module, _, cls = theirs.rpartition(".")
            # Into the module's own dictionary: the next one who asks, pickle included, gets the same class.
            return globals().setdefault(name, _make(getattr(importlib.import_module(_PACKAGE + module), cls), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _make(theirs: Any, name: str) -> type:
    kinds = [parameter.kind for parameter in inspect.signature(theirs.forward).parameters.values()]
    members = {
        "slao_options": FusedOptions("(unnamed layer)"),
        "peft_class": theirs,
        "slao_knows_base": False,
        "slao_only_x": inspect.Parameter.VAR_POSITIONAL not in kinds,
        "_get_name": FusedLoraLinear._get_name,
        "extra_repr": FusedLoraLinear.extra_repr,
        "forward": FusedLoraLinear.forward,
        "__module__": __name__,
        "__doc__": f"PEFT's {theirs.__name__} with a fused LoRA branch; see the module.",
    }
    return type(name, (theirs,), members)
