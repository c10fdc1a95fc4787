"""The checks of a call in the common case: one adapter without dropout on an nn.Linear, no autocast, nothing hooked.

`plain_call` says no more than "take the fused forward, with these tensors" or None; eligibility.py then finds the
reason, or that the call is fused in another way. In C where there is the compiled core (csrc/bindings_layer.h).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import native
from .eligibility import DTYPES, GLOBAL_HOOKS

# weight (N, K), bias, A (r, K), B (N, r), scaling, and the dtype code with which the compiled core takes all that
# (ops/lora_linear/native_layer.py), 0 if it does not.
Plain = tuple[Tensor, "Tensor | None", Tensor, Tensor, float, int]


def in_python(own: dict[str, Any], x: Any) -> Plain | None:
    """own: the layer's __dict__. Modules' attributes are read from the dictionaries where nn.Module keeps them, whose
    __getattr__ would cost more than all the comparisons."""
    found = branch(own, x)
    base = own["_modules"]["base_layer"]
    if found is None or type(base) is not nn.Linear or _hooked(base.__dict__):
        return None
    (A, B, scaling), weight, bias = found, base._parameters["weight"], base._parameters["bias"]
    if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
        return None
    dtype = x.dtype
    if dtype is not weight.dtype or x.device != weight.device or weight.dim() != 2:
        return None
    (n, k), r = weight.shape, A.shape[0]
    if x.shape[-1] != k or A.shape[1] != k or B.shape != (n, r):
        return None
    if bias is not None and (bias.dtype is not dtype or type(bias) is not nn.Parameter or bias.shape != (n,)):
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    return weight, bias, A, B, scaling, 0


def branch(own: dict[str, Any], x: Any) -> tuple[Tensor, Tensor, float] | None:
    """A, B and scaling of the one active adapter, whatever the base; None: ask eligibility.branch_reason."""
    adapter = own["_active_adapter"]
    if type(adapter) is list and len(adapter) == 1:
        (adapter,) = adapter
    if own["_disable_adapters"] is not False or own["merged_adapters"] or type(adapter) is not str:
        return None
    parts = own["_modules"]
    dropout = parts["lora_dropout"]._modules.get(adapter)
    down, up = parts["lora_A"]._modules.get(adapter), parts["lora_B"]._modules.get(adapter)
    if not (type(down) is type(up) is nn.Linear and type(dropout) is nn.Identity):
        return None
    if _hooked(down.__dict__) or _hooked(up.__dict__) or _hooked(dropout.__dict__):
        return None
    A, B, scaling = down._parameters["weight"], up._parameters["weight"], own["scaling"][adapter]
    if not (type(A) is type(B) is nn.Parameter and type(x) is Tensor and type(scaling) in (float, int)):
        return None
    if adapter in own["lora_variant"] or hasattr(A, "ds_id") or hasattr(B, "ds_id"):
        return None
    if down._parameters["bias"] is not None or up._parameters["bias"] is not None:
        return None
    if x.dtype not in DTYPES or A.dtype not in DTYPES or B.dtype not in DTYPES:
        return None
    device = x.device
    if not (device == A.device == B.device) or device.type == "meta" or x.dim() == 0 or A.dim() != 2 or B.dim() != 2:
        return None
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return None
    if forward_ad._current_level >= 0 or any(GLOBAL_HOOKS):
        return None
    return A, B, scaling


def _hooked(its: dict[str, Any]) -> bool:
    if "forward" in its or its["_forward_hooks"] or its["_forward_pre_hooks"]:
        return True
    return bool(its["_backward_hooks"] or its["_backward_pre_hooks"])


def _in_c() -> Any:
    """The core's function, told what to compare with; None without a core."""
    if native.why_not("cpu") is not None or native.why_not_lora("cpu") is not None:
        return None
    from .ops.lora_linear import native_layer

    core = native.core()
    core.plain_setup(
        {
            "linear": nn.Linear,
            "identity": nn.Identity,
            "parameter": nn.Parameter,
            "tensor": Tensor,
            "autocast": torch.is_autocast_enabled,
            "transforms": torch._C._are_functorch_transforms_active,
            "tracing": torch._C._get_tracing_state,
            "modes": torch._C._len_torch_dispatch_stack,
            "forward_ad": forward_ad,
            "codes": native_layer.codes(),
            "dtypes": set(DTYPES),
            "global_hooks": GLOBAL_HOOKS,
        },
        core.lora_rank,
    )
    return core.plain_call


plain_call: Any = in_python
