"""When a LoRA layer may take the fused forward: the one statement of the conditions.

Pure predicates: each returns a reason against it, or None. `decide` asks all that concern a call. Whatever they look
at about a layer, its parts and x has to be among what a plan compares (plan.py); tests/slao_kernels/test_plan.py walks
through everything that can change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from .plan import GLOBAL_HOOKS, active_adapters

_BASE_TYPES = (nn.Linear, Conv1D)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# FSDP2 makes classes of these names, FSDP1 wraps.
_UNITS = ("FSDP", "FullyShardedDataParallel")
_WHOLE_BLOCKS = "FSDP2 over whole blocks (fully_shard(block)) leaves it fused"
# What PEFT's LoRA layers keep from the base layer.
PEFT_ARGUMENTS = ("adapter_names", "alora_offsets")


class Decision(NamedTuple):
    """kind: "peft" (its own forward), "linear" (one node for base and branch), "dora", or "add" (the base is called).

    why: the reason for "peft", None where PEFT's forward is what was asked for (merged, disabled, nothing active).
    called: why the base is called.
    """

    kind: str
    why: str | None = None
    called: str | None = None


def decide(layer: Any, x: Any, args: Any, kwargs: dict[str, Any]) -> Decision:
    """How this call of a patched layer is computed."""
    options = layer.slao_options
    if layer.disable_adapters or layer.merged_adapters:
        return Decision("peft")
    if "slao_before" in layer.__dict__ and not hasattr(layer.slao_before, "peft_class"):
        return Decision("peft", "not patched")
    adapters = active_adapters(layer)
    if not adapters:
        return Decision("peft")
    called = why_called(layer, adapters, options.precision)
    if called is None and not layer.slao_knows_base:
        called = f"PEFT's {layer.peft_class.__name__} does"
    if called is None:
        reason = call_reason(layer, adapters, x, args, kwargs)
        kind = "dora" if adapters[0] in layer.lora_variant else "linear"
    else:
        reason = branch_reason(layer, adapters, x, kwargs)
        kind = "add"
        if (args or kwargs) and layer.slao_only_x:
            return Decision("peft")  # PEFT's forward of that class raises
    return Decision(kind, None, called) if reason is None else Decision("peft", reason)


def meta_reason(base: nn.Module) -> str | None:
    """Why a base layer that could be computed cannot be yet."""
    if type(base) in _BASE_TYPES and base.weight.device.type == "meta" and hooks_reason(base, "") is None:
        return "its weights are on the meta device; load them, then patch again"
    return None


def why_called(layer: nn.Module, adapters: list[str], precision: str, early: bool = False) -> str | None:
    """Why the base layer is called as it is and the LoRA branch added to its result; None: one node computes both.

    early: outside of any forward, where DTensors are let pass: FSDP2's are plain parameters while their block runs.
    """
    reason = base_reason(layer.base_layer, early)
    if reason is None and precision == "adapter" and any(_own_bias(layer, name) for name in adapters):
        return "lora_bias in the adapter's precision"
    return reason


def base_reason(base: nn.Module, early: bool = False) -> str | None:
    """Why only the base layer itself can tell its result. Exact types: a subclass may compute something else."""
    if type(base) not in _BASE_TYPES:
        return f"base layer is {type(base).__module__.split('.')[0]}'s {type(base).__name__}"
    if base.weight.device.type == "meta":
        return "its weights are on the meta device; load them, then patch again"
    if base.weight.dim() != 2:
        return f"its weight has {base.weight.dim()} dimensions (sharded?)"
    if base.weight.dtype not in DTYPES:
        return f"base weight is stored as {base.weight.dtype}"
    if base.bias is not None and base.bias.dtype != base.weight.dtype:
        return f"base bias is {base.bias.dtype}, weight {base.weight.dtype}"
    return _module_reason(base, "base layer", early)


def adapter_reason(layer: nn.Module, adapter: str, early: bool = False) -> str | None:
    """What about A and B of one adapter of the layer rules them out. early: see `why_called`."""
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    if type(down) is not nn.Linear and type(down).__name__.startswith(_UNITS):
        return f"lora_A is an FSDP unit of its own ({type(down).__name__}) and has to be called; {_WHOLE_BLOCKS}"
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return f"lora_A is a {type(down).__name__}, lora_B a {type(up).__name__}, not plain nn.Linear"
    if down.bias is not None:
        return "lora_A has a bias"
    if up.bias is not None and (up.bias.dtype not in DTYPES or type(up.bias) not in (nn.Parameter, Tensor)):
        return f"lora_B's bias is a {type(up.bias).__name__} of {up.bias.dtype}"
    if down.weight.dim() != 2 or up.weight.dim() != 2 or up.weight.dtype not in DTYPES:
        return "lora_A or lora_B is not a plain floating matrix (sharded or quantised?)"
    if down.weight.device.type == "meta":
        return "its adapter is on the meta device; load it, then patch again"
    return _module_reason(down, "lora_A", early) or _module_reason(up, "lora_B", early)


def in_features(base: nn.Module) -> int:
    """What the base layer reads; Conv1D stores (K, N)."""
    return int(base.weight.shape[1 if type(base) is nn.Linear else 0])


def _own_bias(layer: nn.Module, adapter: str) -> bool:
    return getattr(layer.lora_B[adapter], "bias", None) is not None


def variant_reason(layer: nn.Module, adapters: list[str], called: bool) -> str | None:
    """What about active adapters that are no plain LoRA rules them out. called: the base has to be (`why_called`)."""
    for adapter in adapters:
        if adapter not in layer.lora_variant:
            continue
        from peft.tuners.lora.dora import DoraLinearLayer
        from peft.tuners.lora.variants import DoraLinearVariant

        variant = type(layer.lora_variant[adapter])
        if variant is not DoraLinearVariant:
            return f"{variant.__name__.removesuffix('LinearVariant')}: not plain LoRA"
        if called:
            return "DoRA over a base layer that has to be called"
        if len(adapters) > 1:
            return "DoRA beside other active adapters"
        if _own_bias(layer, adapter):
            return "DoRA with lora_bias"
        own = layer.lora_magnitude_vector[adapter]
        if type(own) is not DoraLinearLayer or own.weight.dim() != 1 or own.weight.dtype not in DTYPES:
            return "DoRA's magnitude is not a plain floating vector (sharded?)"
        return _module_reason(own, "DoRA's magnitude")
    return None


def dropout_of(layer: nn.Module, adapter: str) -> float:
    """The adapter's dropout probability; -1 for something other than nn.Dropout."""
    dropout = layer.lora_dropout[adapter]
    if type(dropout) is nn.Identity:
        return 0.0
    return dropout.p if type(dropout) is nn.Dropout else -1.0


def active_dropout(layer: nn.Module, adapter: str) -> float:
    """The probability that applies to the adapter now: 0 outside training."""
    return dropout_of(layer, adapter) if layer.lora_dropout[adapter].training else 0.0


def dropout_reason(layer: nn.Module, adapter: str, alone: bool) -> str | None:
    """Why the adapter's dropout, were it active now, would rule the fused forward out. alone: no other is active."""
    p = dropout_of(layer, adapter)
    if p > 0.0 and adapter in layer.lora_variant:
        return f"DoRA with lora_dropout={p:g} while training: PEFT scales the base of the dropped x"
    if p < 0.0:
        return f"lora_dropout is a {type(layer.lora_dropout[adapter]).__name__}"
    if p > 0.0 and not alone:
        return f"lora_dropout={p:g} while training, and other adapters are active: each draws a mask of its own"
    return None


def call_reason(layer: nn.Module, adapters: list[str], x: Any, args: Any, kwargs: Any) -> str | None:
    """What about this one call rules it out, where the base is computed too (`why_called` found nothing)."""
    if args or any(value is not None for value in kwargs.values()):
        return f"called with {', '.join(kwargs) or 'positional arguments'} beside x"
    base, reason = layer.base_layer, input_reason(x)
    if reason is not None:
        return reason
    for what, part in (("weight", base.weight), ("bias", base.bias)):
        if part is not None and part.device != x.device:
            return f"x is on {x.device}, the base {what} on {part.device}"
    out_features = int(base.weight.shape[0 if type(base) is nn.Linear else 1])
    if x.shape[-1] != in_features(base):
        return f"x has {x.shape[-1]} features, the base layer reads {in_features(base)}"
    if torch.is_autocast_enabled(x.device.type):
        if torch.float64 in (x.dtype, base.weight.dtype):
            return "fp64 under autocast"
    elif x.dtype != base.weight.dtype:
        return f"x is {x.dtype}, the base weight {base.weight.dtype}"
    reason = variant_reason(layer, adapters, called=False) or _branch_reason(layer, adapters, x)
    if reason is not None:
        return reason
    for adapter in adapters:
        rows = layer.lora_B[adapter].weight.shape[:1]
        if rows != (out_features,):
            return f"adapter {adapter!r} has a B of {tuple(rows)} rows, the base layer makes {out_features} features"
    if base.bias is not None and base.bias.shape != (out_features,):
        return f"the base bias is {tuple(base.bias.shape)}, the base layer makes {out_features} features"
    return None


def branch_reason(layer: nn.Module, adapters: list[str], x: Any, kwargs: Any) -> str | None:
    """What about this one call rules a fused LoRA branch out, where the base is called with all other arguments."""
    asked = [name for name in PEFT_ARGUMENTS if kwargs.get(name) is not None]
    if asked:
        return f"called with {', '.join(asked)} beside x"
    return input_reason(x) or variant_reason(layer, adapters, called=True) or _branch_reason(layer, adapters, x)


def result_reason(y: Any, x: Tensor, A: Tensor, B: Tensor) -> str | None:
    """What about a called base's result keeps the branch's node from it."""
    if type(y) is not Tensor:
        return f"the base layer returned a {type(y).__name__}"
    expected = (*x.shape[:-1], B.shape[0])
    if y.dtype not in DTYPES or y.device != x.device or y.shape != expected or x.shape[-1] != A.shape[1]:
        return f"the base layer made {tuple(y.shape)} of {y.dtype} on {y.device} of x {tuple(x.shape)} on {x.device}"
    return None


def input_reason(x: Any) -> str | None:
    """What about x rules a fused node out, or about who looks on."""
    if type(x) not in (Tensor, nn.Parameter):
        return f"x is a {type(x).__name__}"
    if x.dim() == 0 or x.dtype not in DTYPES:
        return f"x is a {x.dim()}-dimensional tensor of {x.dtype}"
    return _transform_reason()


def _branch_reason(layer: nn.Module, adapters: list[str], x: Tensor) -> str | None:
    reason = global_reason()
    if reason is not None:
        return reason
    for adapter in adapters:
        dropout = layer.lora_dropout[adapter]
        reason = adapter_reason(layer, adapter) or hooks_reason(dropout, "lora_dropout")
        if reason is None and (dropout.training or dropout_of(layer, adapter) < 0.0):
            reason = dropout_reason(layer, adapter, alone=len(adapters) == 1)
        if (
            reason is None
            and adapter in layer.lora_variant
            and layer.lora_magnitude_vector[adapter].weight.device != x.device
        ):
            reason = f"DoRA's magnitude is on {layer.lora_magnitude_vector[adapter].weight.device}, x on {x.device}"
        if reason is None:
            reason = _fit_reason(layer, adapter, x)
        if reason is not None:
            return reason
    return None


def global_reason() -> str | None:
    """A hook on every module of the process sees the calls of parts that a fused forward does not call."""
    return "a global module hook is registered" if any(GLOBAL_HOOKS) else None


def _fit_reason(layer: nn.Module, adapter: str, x: Tensor) -> str | None:
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    for part in (down.weight, up.weight, up.bias):
        if part is not None and part.device != x.device:
            return f"adapter {adapter!r} is on {part.device}, x on {x.device}"
    A, B = down.weight.shape, up.weight.shape
    if A[1] != x.shape[-1] or B[1] != A[0] or (up.bias is not None and up.bias.shape != B[:1]):
        return f"adapter {adapter!r} has A {tuple(A)} and B {tuple(B)} for an x of {x.shape[-1]} features"
    return None


def _module_reason(module: nn.Module, what: str, early: bool = False) -> str | None:
    """A fused forward reads the module's weight and never calls it: nothing may depend on the call."""
    if type(module.weight) not in (nn.Parameter, Tensor) and not (early and type(module.weight).__name__ == "DTensor"):
        return f"{what}'s weight is a {type(module.weight).__name__}"
    if hasattr(module.weight, "ds_id"):
        return f"{what}'s weight is partitioned by DeepSpeed ZeRO-3"
    return hooks_reason(module, what)


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance has another forward than its class; accelerate, taking a hook off, binds the class's."""
    return "forward" in module.__dict__ and getattr(module.forward, "__func__", None) is not type(module).forward


def hooks_reason(module: nn.Module, what: str) -> str | None:
    """What has replaced the module's forward or watches it: then it has to be called."""
    if has_own_forward(module):
        return f"{what}'s forward was replaced on the instance (accelerate hooks?)"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{what} has hooks"
    return None


def _transform_reason() -> str | None:
    """The fused node has a backward formula and no other: no batching rule, no forward-mode derivative."""
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch._C._get_tracing_state() is not None:  # what happens at raw pointers would be missing in the trace
        return "torch.jit.trace (or an export built on it)"
    return None
