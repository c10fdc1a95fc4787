"""What continual methods add to a LoRA layer, or to each of a mixture's experts, beside A and B.

A routing core, or pairs that no longer train. With a core an adapter's branch is s · B (core + core_delta) A x, with
frozen pairs s · (B A + Σ_k w_k B_k A_k) x; a layer has one or the other. They are parameters and
buffers of PEFT's layer, but in no state dict: PEFT saves and loads whatever of a LoRA layer is in there. The method's
own `save` keeps them, its `save_pretrained` exports the whole as a plain adapter. The layer's class is swapped as
`patch` does, so that forwards, fused or not, and PEFT's merges see them.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import eligibility, exact_merge
from .adapters import scales_of_columns, stack, through
from .layers import FusedLoraLinear, FusedOptions, make_plan, peft_class, run_linear
from .ops.lora_linear import reference
from .ops.lora_linear.autograd import linear

logger = logging.getLogger("slao_kernels")
_said: set[str] = set()

_NAMES = ("slao_core", "slao_core_delta", "slao_frozen_A", "slao_frozen_B", "slao_frozen_scale")


class Extended:
    """What one of a layer's adapters has beside A and B, whatever class of PEFT's the layer is of.

    Of experts everything is laid out as PEFT lays out A and B (`LoraPair.split`), and there is a core for each.
    """

    slao_adapter: str
    slao_before: type
    # (r, r) each, or (experts, r, r): the frozen one, and the one that trains and alone carries A's and B's gradient
    # (C-LoRA).
    slao_core: Tensor | None
    slao_core_delta: Tensor | None
    # (R, n), (m, R): frozen pairs, stacked; (T,) or None: one factor for each r of them, which may train. Of experts
    # (experts R, n), (m, R experts) and (T experts,), the factors of a pair's experts together.
    slao_frozen_A: Tensor | None
    slao_frozen_B: Tensor | None
    slao_frozen_scale: Tensor | None

    def slao_stack(self: Any) -> tuple[Tensor, Tensor]:
        """A (r + R, n) and B (m, r + R): the pair that trains, and below and beside it the frozen ones, if any."""
        A, B = self.lora_A[self.slao_adapter].weight, self.lora_B[self.slao_adapter].weight
        frozen_A, frozen_B = self.slao_frozen_A, self.slao_frozen_B
        if frozen_A is None or frozen_B is None:
            return A, B
        count, scale = getattr(self, "num_experts", 1), self.slao_frozen_scale
        if scale is not None:
            frozen_B = frozen_B * scales_of_columns(scale, count, frozen_B.shape[1])
        return stack(count, "A", A, frozen_A), stack(count, "B", B, frozen_B.to(B.dtype))

    def slao_product(self: Any) -> tuple[Tensor, Tensor]:
        """(A, B) in fp32 at least, without a graph, whose B A times the scaling is the whole branch."""
        A, B = (factor.detach() for factor in self.slao_stack())
        wide = torch.promote_types(B.dtype, torch.float32)
        cores = [core.detach().to(wide) for core in (self.slao_core, self.slao_core_delta) if core is not None]
        return A.to(wide), through(B.to(wide), sum(cores[1:], cores[0])) if cores else B.to(wide)

    def refuse_beside(self: Any, active: list[str]) -> None:
        """ValueError where another adapter is active as well."""
        others = [name for name in active if name != self.slao_adapter]
        if others:
            raise ValueError(
                f"adapter {self.slao_adapter!r} has a core or frozen pairs and cannot be active beside {others}; "
                "choose one with set_adapter"
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        left = [destination.pop(prefix + name, None) for name in _NAMES]
        if any(tensor is not None for tensor in left):
            _say_once()

    def _load_from_state_dict(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
        stores: tuple[dict[str, Any], ...] = (self._parameters, self._buffers)
        kept = [{name: store.pop(name) for name in _NAMES if name in store} for store in stores]
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        finally:
            for store, tensors in zip(stores, kept, strict=True):
                store.update(tensors)


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


def _say_once() -> None:
    if not _said:
        _said.add("said")
        logger.warning(
            "a state dict (so PEFT's own save_pretrained too) holds A and B of an extended layer, not the core or "
            "the frozen pairs that its method gave it: the method's save() keeps them,"
            " its save_pretrained() exports all"
        )


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
    for name in _NAMES:
        layer._buffers.pop(name, None)
        layer._parameters.pop(name, None)
    del layer.slao_adapter, layer.slao_before
    layer.__dict__.pop("slao_plan", None)
    if not hasattr(before, "peft_class"):
        del layer.slao_options
        exact_merge.forget(layer, "the layer is PEFT's own again")
    layer.__class__ = before
