"""PEFT's LoRA on a mixture's experts with a fused forward: the class that its wrappers get, and what it runs.

transformers keeps experts as 3-D parameters, which PEFT adapts by `target_parameters`: one `ParamWrapper` a parameter,
one in another, whose forward makes W_eff = W + s B A of all experts and a gradient as large as W. Here the outermost
wrapper computes the module's forward itself: tokens sorted by expert, each projection with its branch in one node
(ops/expert_linear), and everything else (gate, biases, norm, routing weights) as the module's own attributes say it
(`use_experts_implementation`, the protocol of transformers' registry of experts functions). So no model is named.

Imports PEFT: only `patch` and unpickling load this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from . import dispatch, eligibility
from .layers import FusedLoraLinear, FusedOptions
from .ops.expert_linear import expert_linear
from .ops.expert_linear.mixture import Projection, Routing, mixture
from .ops.lora_linear.autograd import once

# What transformers' decorator sets on every experts module, and the registered functions whose maths ours is.
# (`has_post_expert_norm` and `_is_expert_parallel` came after 5.17, whose expert parallelism puts a forward of its own
# on the instance, which is refused as any other.)
_PROTOCOL = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")
_SERVED = (None, "eager", "batched_mm", "grouped_mm")
# What the decorator makes of every class's forward.
_DISPATCHES = use_experts_implementation(type("_Any", (nn.Module,), {"forward": lambda self: None})).forward.__code__


class FusedExperts(lora.ParamWrapper):
    """PEFT's wrapper of one parameter of experts with a fused forward; everything else, state included, is PEFT's."""

    slao_options = FusedOptions("(unnamed experts)")
    peft_class: Any = lora.ParamWrapper
    _get_name = FusedLoraLinear._get_name
    merge, unmerge = FusedLoraLinear.merge, FusedLoraLinear.unmerge

    def extra_repr(self) -> str:
        return "fused by slao_kernels"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: the experts of x (T, H) with every active adapter; (T, H)."""
        chain = wrappers(self)
        acting = [one for one in chain if not (one.disable_adapters or one.merged_adapters) and _active(one)]
        # Nothing to add, or PEFT's forward is to unmerge first.
        if not acting or any(one.disable_adapters and one.merged_adapters for one in chain):
            return lora.ParamWrapper.forward(self, x, *args, **kwargs)
        reason = why_not(chain) or _call_reason(chain, x, args, kwargs)
        if reason is not None:
            self.slao_options.fell_back(reason)
            return lora.ParamWrapper.forward(self, x, *args, **kwargs)
        base, backend = chain[-1].base_layer, self.slao_options.backend
        return _experts(base, {wrapper.parameter_name: wrapper for wrapper in acting}, backend, x, *args)


# PEFT asks for the class by name where it adds or removes an adapter; pickle goes by __qualname__.
FusedExperts.__name__ = lora.ParamWrapper.__name__


def wrappers(layer: nn.Module) -> list[Any]:
    """The wrapper and those in it, one for each adapted parameter of the same module."""
    chain: list[Any] = [layer]
    while isinstance(chain[-1].base_layer, lora.ParamWrapper):
        chain.append(chain[-1].base_layer)
    return chain


def why_not(chain: Sequence[Any], early: bool = False) -> str | None:
    """What about these wrappers or the experts in them rules the fused forward out, whatever they are called with.

    early: outside of any forward, where DTensors are let pass: FSDP2's are plain parameters while their block runs.
    """
    base = chain[-1].base_layer
    if not all(hasattr(base, name) for name in _PROTOCOL):
        return f"{type(base).__name__} is no experts module of transformers' registry"
    if getattr(type(base).forward, "__code__", None) is not _DISPATCHES:
        return f"{type(base).__name__} has a forward of its own"
    chosen = getattr(base.config, "_experts_implementation", None)
    if chosen not in _SERVED:
        return f"the config asks for experts_implementation={chosen!r}, whose kernels are its own"
    own = None if chosen is None else ALL_EXPERTS_FUNCTIONS.get(chosen)
    if own is not None and getattr(moe, own.__name__, None) is not own:
        return f"experts_implementation={chosen!r} was registered anew, with kernels of its own"
    if getattr(base, "_is_expert_parallel", False):
        return "its experts are spread over devices (expert parallel)"
    if parametrize.is_parametrized(base):
        return "a parameter of its experts is parametrized"
    for wrapper in chain:
        if wrapper.parameter_name not in projections(base):
            return f"it adapts {wrapper.parameter_name!r}, which is none of {', '.join(projections(base))}"
        for adapter in _active(wrapper):
            reason = eligibility.adapter_reason(wrapper, adapter, early)
            if reason is not None:
                return reason
    for name in projections(base):
        weight: Any = getattr(base, name, None)
        plain = type(weight) in (nn.Parameter, Tensor) or (early and type(weight).__name__ == "DTensor")
        if not plain or weight.dim() != 3 or hasattr(weight, "ds_id"):
            return f"its {name} is no plain tensor of all experts (sharded or quantised?)"
        if weight.dtype not in eligibility.DTYPES or weight.device.type == "meta":
            return f"its {name} is {weight.dtype} on {weight.device}"
        if weight.requires_grad:
            return f"its {name} trains too"
    inside = [*chain[1:], base]
    reasons = (eligibility.hooks_reason(module, f"its {type(module).__name__}") for module in inside)
    return next((reason for reason in reasons if reason is not None), None)


def of_experts(wrapper: Any) -> bool:
    """Whether a wrapper adapts a parameter of all experts of a module that follows the protocol."""
    base = wrapper.get_base_layer()
    follows = all(hasattr(base, name) for name in _PROTOCOL)
    return follows and wrapper.parameter_name in projections(base) and wrapper.get_param().dim() == 3


def projections(base: Any) -> tuple[str, str]:
    """The names of an experts module's parameters, in the order in which a token meets them."""
    return ("gate_up_proj" if base.has_gate else "up_proj"), "down_proj"


def _active(wrapper: Any) -> list[str]:
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def _call_reason(chain: Sequence[Any], x: Any, args: Any, kwargs: Any) -> str | None:
    if kwargs or len(args) != 2 or not all(isinstance(value, Tensor) for value in args):
        return "called with other arguments than the tokens, their experts and their weights"
    if x.dim() != 2 or args[0].shape != args[1].shape or args[0].dim() != 2 or len(args[0]) != len(x):
        return f"called with tokens {tuple(x.shape)}, experts {tuple(args[0].shape)}, weights {tuple(args[1].shape)}"
    if any(getattr(chain[-1].base_layer, name).device != x.device for name in projections(chain[-1].base_layer)):
        return f"x is on {x.device}, its experts are elsewhere"
    return eligibility.input_reason(x) or eligibility.global_reason()


def _experts(base: Any, adapted: dict[str, Any], backend: str, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts' forward: x (T, H), index and weights (T, k) as the router gives them."""
    tokens, k = index.shape
    ids, order = torch.sort(index.reshape(-1), stable=True)
    ends = torch.searchsorted(ids, torch.arange(base.num_experts, device=ids.device), right=True, out_int32=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    up, down = (_projection(base, name, adapted.get(name), x) for name in projections(base))
    gate = base._apply_gate if base.has_gate else base.act_fn
    trains = any(parameter.requires_grad for parameter in base.parameters())  # biases, what a gate has
    normed = getattr(base, "has_post_expert_norm", False)
    chosen = dispatch.choose("expert_linear", x.device.type, backend)
    if dispatch.direct() and chosen != "reference" and not (trains or normed):
        return mixture(x, weights, Routing(ids, order, back, ends, k), up, down, gate, chosen)
    y = _Rows.apply(x, order, back, k)
    for own in (up, down):
        y = expert_linear(y.to(own.weight.dtype), *own[:4], ends, backend=backend)
        if own.bias is not None:
            y = y + own.bias[ids]
        if own is up:
            y = gate(y)
    if normed:
        y = base.post_expert_norm(y)
    y = _Rows.apply(y * weights.reshape(-1)[order, None], back, order, 1)
    return y.view(tokens, k, y.shape[1]).sum(1).to(x.dtype)


def _projection(base: Any, name: str, wrapper: Any, x: Tensor) -> Projection:
    """In the dtype that transformers computes it in."""
    weight = getattr(base, name)
    dtype = weight.dtype
    eager = base.config._experts_implementation in (None, "eager")
    if eager and dtype is not torch.float64 and torch.is_autocast_enabled(x.device.type):  # which leaves fp64 alone
        dtype = torch.get_autocast_dtype(x.device.type)  # of transformers' implementations only this one is cast
    weight = weight.transpose(1, 2) if base.is_transposed else weight
    A, B, scaling = (None, None, 1.0) if wrapper is None else _factors(wrapper, dtype)
    return Projection(weight.to(dtype), A, B, scaling, getattr(base, f"{name}_bias") if base.has_bias else None)


def _factors(wrapper: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """A (E, r, K), B (E, N, r) and the scaling of all active adapters as one of rank Σ r.

    PEFT keeps A as (E r, K), an expert's rows together, and B as (N, r E), with the experts next to each other.
    """
    experts, names = wrapper.num_experts, _active(wrapper)
    As, Bs = [], []
    scalings = [wrapper.scaling[name] for name in names]
    alone = len(names) == 1 and not isinstance(scalings[0], Tensor)
    for name, scaling in zip(names, scalings, strict=True):
        if getattr(wrapper, "slao_adapter", None) == name:
            A, B = wrapper.slao_factors()
        else:
            A, B = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        As.append(A.view(experts, -1, A.shape[1]))
        Bs.append((B if alone else B * scaling).view(B.shape[0], -1, experts).permute(2, 0, 1))
    A, B = (As[0], Bs[0]) if len(names) == 1 else (torch.cat(As, 1), torch.cat(Bs, 2))
    B = B.to(dtype, memory_format=torch.contiguous_format).contiguous()  # one copy, whether it casts or not
    return A.to(dtype), B, float(scalings[0]) if alone else 1.0


class _Rows(torch.autograd.Function):
    """x[order // k], `order` a permutation of k times x's rows and `back` its inverse. Its gradient is a gather, too:
    deterministic, where that of indexing adds atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return x.index_select(0, order if k == 1 else order // k)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return once(_rows_grads, ctx, dy) if torch.is_grad_enabled() else _rows_grads(ctx, dy)


def _rows_grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (back,) = ctx.saved_tensors
    dx = dy.index_select(0, back)
    return dx if ctx.k == 1 else dx.view(-1, ctx.k, dx.shape[1]).sum(1), None, None, None
