"""What continual methods add to a LoRA layer, or to each of a mixture's experts, beside A and B.

A routing core, or pairs that no longer train. With a core an adapter's branch is s · B (core + core_delta) A x, with
frozen pairs s · (B A + Σ_k w_k B_k A_k) x; a layer has one or the other. They are parameters and
buffers of PEFT's layer, but in no state dict: PEFT saves and loads whatever of a LoRA layer is in there. The method's
own `save` keeps them, its `save_pretrained` exports the whole as a plain adapter. The layer's class is swapped as
`patch` does, so that forwards, fused or not, and PEFT's merges see them.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import eligibility, exact_merge
from .extended import NAMES, Extended
from .layers import FusedLoraLinear, FusedOptions, make_plan, peft_class, run_linear
from .ops.lora_linear import reference
from .ops.lora_linear.autograd import linear


class ExtendedLoraLinear(Extended, FusedLoraLinear):
    """PEFT's LoRA linear layer, one of whose adapters has a core or frozen pairs. Made by `extend`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """base(x) + the branch of the module's docstring. x: (..., K) -> (..., N)."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged_adapters or self.slao_adapter not in active:
            return super().forward(x, *args, **kwargs)
        self.refuse_beside(active)
        name, own = self.slao_adapter, self.__dict__
        A, B = self.slao_stack()
        plan: Any = own.get("slao_plan")
        tensors = None if plan is None or args or kwargs or is_compiling() else plan.tensors(own, x)
        if tensors is None:
            plan = make_plan(self, x, args, kwargs)
        if plan.run is run_linear:
            base, call = self.base_layer, plan.call
            weight = base.weight if type(base) is nn.Linear else base.weight.t()  # Conv1D stores (K, N)
            cores = () if self.slao_core is self.slao_core_delta is None else (self.slao_core, self.slao_core_delta)
            return linear(call)(call, x, weight, base.bias, A, B, *cores)
        y = self.base_layer(x, *args, **kwargs)
        source = self.lora_dropout[name](x.to(A.dtype))
        branch = reference.routed(source, A, B, self.slao_core, self.slao_core_delta)
        return (y + self.scaling[name] * branch).to(y.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """As PEFT's, for merging: the whole branch as an (m, n) matrix, (n, m) where the base is stored that way."""
        if adapter != self.slao_adapter:
            return super().get_delta_weight(adapter)
        A, left = self.slao_product()
        # As PEFT does for 16 bits: rounded once.
        delta = (left @ A * self.scaling[adapter]).to(self.lora_B[adapter].weight.dtype)
        return delta.T if self.fan_in_fan_out else delta


def why_not(layer: Any, adapter: str) -> str | None:
    """What about the layer keeps `extend` from it; None if nothing."""
    if isinstance(layer, Extended):
        return f"another method has extended it already (adapter {layer.slao_adapter!r}); retract that one first"
    if _extended_class(layer) is None:
        return f"{type(layer).__name__} cannot take a core or frozen pairs; PEFT's LoRA over a linear layer can"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (accelerate hooks?)"
    if layer.merged_adapters:
        return "its adapters are merged into the base; unmerge them first"
    if hasattr(layer, "parameter_name"):
        from . import experts

        if not experts.of_experts(layer):
            return f"{layer.parameter_name!r} is no parameter of a mixture's experts"
    return eligibility.adapter_reason(layer, adapter)


def _extended_class(layer: nn.Module) -> Any:
    own = peft_class(layer)
    if own is lora.Linear:
        return ExtendedLoraLinear
    if own is not lora.ParamWrapper:
        return None
    from .experts_extended import ExtendedExperts

    return ExtendedExperts


def extend(layer: nn.Module, adapter: str) -> Any:
    """Swap the layer's class to its `Extended` one for `adapter`, with no core and no frozen pairs yet.

    ValueError, with nothing changed, for a layer that cannot be (`why_not`).
    """
    reason = why_not(layer, adapter)
    if reason is not None:
        raise ValueError(reason)
    extended: Any = layer
    before = type(layer)
    layer.__class__ = _extended_class(layer)
    extended.slao_adapter, extended.slao_before = adapter, before
    if "slao_options" not in layer.__dict__:
        extended.slao_options = FusedOptions("(a layer that is not patched)")
    for name in ("slao_core", "slao_frozen_A", "slao_frozen_B"):
        layer.register_buffer(name, None)
    for name in ("slao_core_delta", "slao_frozen_scale"):
        layer.register_parameter(name, None)
    return layer


def retract(layer: Any) -> None:
    """Undo `extend`: the class is as before, core and frozen pairs are gone. Nothing happens to any other layer.

    ValueError while its adapter is merged into the base: unmerging would take out another product.
    """
    if "slao_before" not in layer.__dict__:
        return
    if layer.slao_adapter in layer.merged_adapters:
        raise ValueError(
            f"adapter {layer.slao_adapter!r} is merged into the base: call unmerge_adapter() before retract()"
        )
    before = layer.slao_before
    for name in NAMES:
        layer._buffers.pop(name, None)
        layer._parameters.pop(name, None)
    del layer.slao_adapter, layer.slao_before
    layer.__dict__.pop("slao_plan", None)
    if not hasattr(before, "peft_class"):
        del layer.slao_options
        exact_merge.forget(layer, "the layer is PEFT's own again")
    layer.__class__ = before
