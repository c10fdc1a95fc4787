"""The layer that `kernels` puts in place of the forward of PEFT's LoRA linear layer (peft.tuners.lora.Linear).

It computes what plain LoRA on a plain nn.Linear is, and hands every other call to PEFT's own forward: `why_not` says
which and why. In slao_kernels itself `patch` does more (DoRA, quantised bases, several adapters, plans).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .ops import checks
from .ops.lora_linear import lora_linear

_PLAIN = (Tensor, nn.Parameter)


def why_not(layer: Any, x: Tensor) -> str | None:
    """Why this call of PEFT's layer is PEFT's own forward; None if `LoraLinear` computes it."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged_adapters or len(active) != 1:
        return "not one active adapter (disabled, merged, none, or several)"
    (name,) = active
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__}: not plain LoRA"
    base, A, B, dropout = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"lora_dropout is a {type(dropout).__name__}"
    for what, part in (("the base layer", base), ("lora_A", A), ("lora_B", B)):
        if type(part) is not nn.Linear or type(part.weight) not in _PLAIN:
            return f"{what} is no plain nn.Linear"
        if part.weight.device != x.device or part.weight.dtype not in checks.FLOATING:
            return f"{what} is {part.weight.dtype} on {part.weight.device}, x on {x.device}"
    for part in (base, A, B, dropout):
        hooks = part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks
        if "forward" in part.__dict__ or any(hooks):
            return "a part of the layer has hooks or another forward, and has to be called"
    if A.bias is not None or B.bias is not None:
        return "lora_bias"
    if x.dtype != base.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"x is {x.dtype}, the base layer {base.weight.dtype}"
    if type(x) not in _PLAIN or x.device.type == "meta" or torch._C._are_functorch_transforms_active():
        return "x is no plain tensor, or a torch.func transform looks on"
    return None


class LoraLinear(nn.Module):
    """base(x) + scaling · dropout(x) Aᵀ Bᵀ as one node, the branch in the dtype that PEFT gives it.

    x: (..., K) -> (..., N). Expects of the layer that adopts it what peft.tuners.lora.Linear has.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or why_not(self, x) is not None:
            y: Tensor = type(self).forward(self, x, *args, **kwargs)
            return y
        name = next(name for name in self.active_adapters if name in self.lora_A)
        base, A, B, dropout = self.base_layer, self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        return lora_linear(
            x,
            base.weight,
            base.bias,
            A.weight,
            B.weight,
            self.scaling[name],
            dropout=getattr(dropout, "p", 0.0),
            training=dropout.training,
            precision="adapter",
        )
