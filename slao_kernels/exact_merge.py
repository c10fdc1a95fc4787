"""Adapters merged into a layer's base weight such that unmerging gives the base its bits back.

What a fold keeps (`ops.exact_fold.Kept`) is on a stack in the layer's __dict__: it is copied and pickled with the layer
and in no state dict. Patched layers merge and unmerge so (layers.py), `merged(fold=True)` of a method does so whether
its model is patched or not. An adapter's A, B and scaling may change while it is merged.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch
from .adapters import split_experts
from .ops.checks import FLOATING, not_finite
from .ops.exact_fold import Kept, bits_of, unfold_
from .ops.fold import fold_

logger = logging.getLogger("slao_kernels")
_said: set[str] = set()
_KEY = "slao_kept"
# These begin as PEFT's do, which people match.
_NO_BIAS = "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias"
_BROKEN = "NaNs detected in the merged weights. The adapter {} seems to be broken: {} is as it was"
_PLAIN = (nn.Parameter, Tensor)


@dataclass
class Merged:
    """One adapter in the base. bias: the base's before and after, where the adapter has one of its own (lora_bias)."""

    adapter: str
    kept: Kept
    bias: tuple[Tensor, Tensor] | None = None


def why_not(layer: Any, adapters: list[str]) -> str | None:
    """What about the layer or one of these adapters cannot be merged exactly; None if nothing."""
    base, name = place(layer)
    weight = base._parameters.get(name)
    if type(weight) not in _PLAIN or hasattr(weight, "ds_id") or weight.layout is not torch.strided:
        return f"the base weight is no plain tensor of its own ({type(base).__name__}; quantised or sharded?)"
    if weight.dim() != getattr(layer, "_param_ndim", 2) or weight.dtype not in FLOATING or weight.device.type == "meta":
        return f"the base weight has {weight.dim()} dimensions of {weight.dtype} on {weight.device}"
    if layer.lora_embedding_A:
        return f"{type(layer).__name__} adds no product of one A and B"
    for adapter in adapters:
        if adapter in layer.lora_variant:
            return f"{type(layer.lora_variant[adapter]).__name__} adds more than a product of A and B"
        for part in (layer.lora_A, layer.lora_B):
            if adapter in part and not _is_plain(part[adapter], weight.device):
                return "lora_A or lora_B is no plain matrix beside the base weight (sharded, or on another device?)"
    return None


def place(layer: Any) -> tuple[Any, str]:
    """The module and the name under which it keeps what the layer's adapters are merged into."""
    return layer.get_base_layer(), getattr(layer, "parameter_name", "weight")


def _is_plain(part: nn.Module, device: torch.device) -> bool:
    if type(part) is not nn.Linear:
        return False
    own = part.weight
    return type(own) in _PLAIN and own.dtype in FLOATING and own.dim() == 2 and own.device == device


def merge(layer: Any, adapters: list[str], safe: bool = False) -> None:
    """W <- W + s B A for each of them in turn, in a layer and adapters for which `why_not` has no reason.

    safe: ValueError, with that adapter not merged, where NaN or infinite weights would come of it.
    """
    for adapter in adapters:
        if adapter in layer.lora_A:
            _merge_one(layer, adapter, safe)


def unmerge(layer: Any) -> bool:
    """Take out again what `merge` has put in, the last first; whether nothing is left for PEFT's own unmerge.

    What was deleted while it was merged stays in, as with PEFT. ValueError, with nothing written by that adapter, when
    the base is not what the merge left there.
    """
    stack: list[Merged] = layer.__dict__.get(_KEY, [])
    undone = False
    while stack and layer.merged_adapters:
        if stack[-1].adapter != layer.merged_adapters[-1] or stack[-1].adapter not in layer.lora_A:
            forget(layer, f"adapter {stack[-1].adapter!r} was deleted while it was merged")
            break
        _unmerge_one(layer, stack[-1])
        stack.pop()
        layer.merged_adapters.pop()
        undone = True
    if not stack:
        layer.__dict__.pop(_KEY, None)
    return undone and not layer.merged_adapters


def forget(layer: Any, reason: str) -> None:
    """What is merged exactly in the layer is unmerged by PEFT's own code, which subtracts; said once a reason."""
    if layer.__dict__.pop(_KEY, None) and reason not in _said:
        _said.add(reason)
        logger.warning("%s: unmerging leaves rounding in the base: %s", _name(layer), reason)


def _merge_one(layer: Any, adapter: str, safe: bool) -> None:
    base, scaling, kept = layer.get_base_layer(), float(layer.scaling[adapter]), Kept()
    own, bias = layer.lora_B[adapter].bias, None
    if own is not None:
        if base.bias is None:
            raise RuntimeError(f"{_NO_BIAS}: {_name(layer)}, adapter {adapter!r}")
        wide = torch.promote_types(torch.promote_types(base.bias.dtype, own.dtype), torch.float32)
        after = (base.bias.detach().to(wide) + own.detach().to(wide) * scaling).to(base.bias.dtype)
        bias = base.bias.detach().clone(), after
    Ws, (As, Bs) = _matrices(layer), _factors(layer, adapter)
    with _wish(Ws[0]):
        fold_(Ws, As, Bs, scaling, keep=kept)
    if safe and not_finite([*Ws, *(bias or ())]):
        unfold_(Ws, kept)
        raise ValueError(_BROKEN.format(adapter, _name(layer)))
    with torch.no_grad():
        if bias is not None:
            base.bias.copy_(bias[1])
    layer.__dict__.setdefault(_KEY, []).append(Merged(adapter, kept, bias))
    layer.merged_adapters.append(adapter)


def _unmerge_one(layer: Any, one: Merged) -> None:
    base, Ws, of = layer.get_base_layer(), _matrices(layer), one.kept.folded[0]
    where = f"unmerge of adapter {one.adapter!r} in {_name(layer)}"
    otherwise = "slao_kernels.unpatch(model), and PEFT's own unmerge subtracts, with its rounding"
    if one.bias is not None and not _is(base.bias.detach(), one.bias[1]):
        raise ValueError(f"{where}: the base bias has changed since the merge: undo that first; or {otherwise}")
    # The model may have moved since, or got a wider dtype: unfolded is where and as it was folded.
    there = [W.to(of.device, of.dtype) for W in Ws]
    moved = there[0] is not Ws[0]
    if moved and not all(torch.equal(bits_of(two.to(W)), bits_of(W)) for two, W in zip(there, Ws, strict=True)):
        raise ValueError(
            f"{where}: the base weight was {of.dtype} when it was merged and has changed since: undo that first; or "
            + otherwise
        )
    try:
        unfold_(there, one.kept)
    except ValueError as error:
        raise ValueError(f"{where}: {error} Or {otherwise}") from None
    with torch.no_grad():
        for W, two in zip(Ws, there, strict=True) if moved else ():
            W.copy_(two)
        if one.bias is not None:
            base.bias.copy_(one.bias[0])


def _is(now: Tensor, then: Tensor) -> bool:
    """Whether they are the same bits, perhaps moved or in a wider dtype."""
    back = now.to(then)
    return torch.equal(bits_of(back), bits_of(then)) and torch.equal(bits_of(back.to(now)), bits_of(now))


def _matrices(layer: Any) -> list[Tensor]:
    """The base weight as (N, K); of experts each one's."""
    base, name = place(layer)
    weight: Tensor = getattr(base, name).detach()
    if weight.dim() == 3:  # stored as (E, N, K), for which PEFT has swapped the features, or as (E, K, N)
        return list((weight if layer._did_swap_in_out_features else weight.mT).unbind(0))
    return [weight.t() if getattr(layer, "fan_in_fan_out", False) else weight]


def _factors(layer: Any, adapter: str) -> tuple[list[Tensor], list[Tensor]]:
    """As and Bs of `_matrices`."""
    if getattr(layer, "slao_adapter", None) == adapter:
        A, B = layer.slao_product()
    else:
        A, B = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    experts = getattr(layer, "num_experts", 1)
    return split_experts(experts, "A", A), split_experts(experts, "B", B)


def _wish(W: Tensor) -> AbstractContextManager[None]:
    """A wish for kernels (`use_backend`) holds for those that an op has: merging works whatever was wished for."""
    try:
        dispatch.choose("exact_fold", W.device.type)
    except ValueError:
        return dispatch.use_backend("auto")
    return nullcontext()


def _name(layer: Any) -> str:
    options = getattr(layer, "slao_options", None)
    return "(a layer)" if options is None else options.name
