"""What continual methods add to one LoRA layer beside A and B: a routing core, and pairs that no longer train.

With a core an adapter's branch is s · B (core + core_delta) A x, with frozen pairs s · (B A + Σ_k w_k B_k A_k) x; a
layer has one or the other. They are parameters and buffers of PEFT's layer, but in no state dict: PEFT saves and loads
whatever of a LoRA layer is in there. The method's own `save` keeps them, its `save_pretrained` exports the whole as a
plain adapter. The layer's class is swapped as `patch` does, so that forwards, fused or not, and PEFT's merges see them.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import eligibility, exact_merge
from .layers import FusedLoraLinear, FusedOptions, make_plan, peft_class, run_linear
from .ops.lora_linear import reference
from .ops.lora_linear.autograd import linear

logger = logging.getLogger("slao_kernels")
_said: set[str] = set()

_NAMES = ("slao_core", "slao_core_delta", "slao_frozen_A", "slao_frozen_B", "slao_frozen_scale")


class ExtendedLoraLinear(FusedLoraLinear):
    """PEFT's LoRA linear layer, one of whose adapters has a core or frozen pairs. Made by `extend`."""

    slao_adapter: str
    slao_before: type
    # (r, r) each: the frozen one, and the one that trains and alone carries A's and B's gradient (C-LoRA).
    slao_core: Tensor | None
    slao_core_delta: Tensor | None
    # (R, n), (m, R): frozen pairs, stacked; (T,) or None: one factor for each r of them, which may train.
    slao_frozen_A: Tensor | None
    slao_frozen_B: Tensor | None
    slao_frozen_scale: Tensor | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """base(x) + the branch of the module's docstring. x: (..., K) -> (..., N)."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged_adapters or self.slao_adapter not in active:
            return super().forward(x, *args, **kwargs)
        if len(active) > 1:
            raise ValueError(
                f"adapter {self.slao_adapter!r} has a core or frozen pairs and cannot be active beside "
                f"{[name for name in active if name != self.slao_adapter]}; choose one with set_adapter"
            )
        name, own = self.slao_adapter, self.__dict__
        A, B = self.slao_factors()
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

    def slao_factors(self) -> tuple[Tensor, Tensor]:
        """A (r + R, n) and B (m, r + R): the pair that trains, and below and beside it the frozen ones, if any."""
        A, B = self.lora_A[self.slao_adapter].weight, self.lora_B[self.slao_adapter].weight
        frozen_A, frozen_B, scale = self.slao_frozen_A, self.slao_frozen_B, self.slao_frozen_scale
        if frozen_A is None or frozen_B is None:
            return A, B
        if scale is not None:
            frozen_B = frozen_B * scale.repeat_interleave(frozen_B.shape[1] // len(scale))
        return torch.cat([A, frozen_A]), torch.cat([B, frozen_B.to(B.dtype)], 1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        left = [destination.pop(prefix + name, None) for name in _NAMES]
        if any(tensor is not None for tensor in left):
            _say_once()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        stores: tuple[dict[str, Any], ...] = (self._parameters, self._buffers)
        kept = [{name: store.pop(name) for name in _NAMES if name in store} for store in stores]
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            for store, tensors in zip(stores, kept, strict=True):
                store.update(tensors)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """As PEFT's, for merging: the whole branch as an (m, n) matrix, (n, m) where the base is stored that way."""
        if adapter != self.slao_adapter:
            return super().get_delta_weight(adapter)
        A, left = self.slao_product()
        # As PEFT does for 16 bits: rounded once.
        delta = (left @ A * self.scaling[adapter]).to(self.lora_B[adapter].weight.dtype)
        return delta.T if self.fan_in_fan_out else delta

    def slao_product(self) -> tuple[Tensor, Tensor]:
        """(A, B) in fp32 at least, without a graph, whose B A times the scaling is the whole branch."""
        A, B = (factor.detach() for factor in self.slao_factors())
        wide = torch.promote_types(B.dtype, torch.float32)
        cores = [core.detach().to(wide) for core in (self.slao_core, self.slao_core_delta) if core is not None]
        return A.to(wide), B.to(wide) @ sum(cores[1:], cores[0]) if cores else B.to(wide)


def _say_once() -> None:
    if not _said:
        _said.add("said")
        logger.warning(
            "a state dict (so PEFT's own save_pretrained too) holds A and B of an extended layer, not the core or "
            "the frozen pairs that its method gave it: the method's save() keeps them,"
            " its save_pretrained() exports all"
        )


def why_not(layer: nn.Module, adapter: str) -> str | None:
    """What about the layer keeps `extend` from it; None if nothing."""
    if isinstance(layer, ExtendedLoraLinear):
        return f"another method has extended it already (adapter {layer.slao_adapter!r}); retract that one first"
    if peft_class(layer) is not lora.Linear:
        return f"{type(layer).__name__} cannot take a core or frozen pairs; PEFT's LoRA over a linear layer can"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (accelerate hooks?)"
    if layer.merged_adapters:
        return "its adapters are merged into the base; unmerge them first"
    return eligibility.adapter_reason(layer, adapter)


def extend(layer: nn.Module, adapter: str) -> ExtendedLoraLinear:
    """Swap the layer's class to `ExtendedLoraLinear` for `adapter`, with no core and no frozen pairs yet.

    ValueError, with nothing changed, for a layer that cannot be (`why_not`).
    """
    reason = why_not(layer, adapter)
    if reason is not None:
        raise ValueError(reason)
    before = type(layer)
    layer.__class__ = ExtendedLoraLinear
    assert isinstance(layer, ExtendedLoraLinear)
    layer.slao_adapter, layer.slao_before = adapter, before
    if "slao_options" not in layer.__dict__:
        layer.slao_options = FusedOptions("(a layer that is not patched)")
    for name in ("slao_core", "slao_frozen_A", "slao_frozen_B"):
        layer.register_buffer(name, None)
    for name in ("slao_core_delta", "slao_frozen_scale"):
        layer.register_parameter(name, None)
    return layer


def retract(layer: nn.Module) -> None:
    """Undo `extend`: the class is as before, core and frozen pairs are gone. Nothing happens to any other layer.

    ValueError while its adapter is merged into the base: unmerging would take out another product.
    """
    if not isinstance(layer, ExtendedLoraLinear):
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
    if before is not FusedLoraLinear:
        del layer.slao_options
        exact_merge.forget(layer, "the layer is PEFT's own again")
    layer.__class__ = before
