"""The class that PEFT's LoRA layers are swapped to. Imports PEFT: only `patch` and unpickling load this module."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import dispatch, eligibility, groups, plain
from .ops import dora
from .ops.lora_linear import add, apply, apply_plain
from .ops.lora_linear.native_layer import fused

logger = logging.getLogger("slao_kernels")
_logged: set[str] = set()


@dataclass
class FusedOptions:
    """What `patch` decided for one layer. `fallbacks` and `notes` are shared with the PatchReport: name -> text.

    place: its state in groups.py, None for a layer that always runs alone.
    """

    name: str
    backend: str = "auto"
    precision: str = "base"
    fallbacks: dict[str, str] = field(default_factory=dict)
    place: groups.Place | None = None
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
    """One warning per reason and process, naming the first layer that it concerns."""
    if reason not in _logged:
        _logged.add(reason)
        logger.warning("%s runs PEFT's own forward: %s", name, reason)


class FusedLoraLinear(lora.Linear):
    """PEFT's LoRA linear layer with a fused forward; everything else, state included, is PEFT's.

    Instances come from `module.__class__ = FusedLoraLinear` (see `patch`), never from a constructor call.
    """

    # On the class, so that a layer unpickled from another version still has one.
    slao_options = FusedOptions("(unnamed layer)")
    peft_class = lora.Linear

    def _get_name(self) -> str:
        """PEFT's: its layer status reads the kind of a layer off the printed name."""
        return self.peft_class.__name__

    def extra_repr(self) -> str:
        return "fused by slao_kernels"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: base(x) + Σ scaling · B A x over the active adapters. x: (..., K) -> (..., N)."""
        if not (args or kwargs or is_compiling()):
            parts: plain.Plain | None = plain.plain_call(self.__dict__, x)
            if parts is not None:
                options = self.slao_options
                if options.place is not None:
                    return groups.call(self, x, groups.Parts(parts[0], *parts))
                # With a code there is a core, and then "auto" is the core: apply_plain without its detour.
                if parts[5] and options.precision == "base" and dispatch.is_auto(options.backend):
                    return fused(x, *parts)
                return apply_plain(x, *parts, options.precision, options.backend)
        if self.disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if not adapters:
            return super().forward(x, *args, **kwargs)
        options = self.slao_options
        base, called = self.base_layer, eligibility.why_called(self, adapters, options.precision)
        if called is not None:
            y = add_to_base(self, x, args, kwargs, called)
            return super().forward(x, *args, **kwargs) if y is None else y
        reason = eligibility.call_reason(self, adapters, x, args, kwargs)
        if reason is not None:
            options.fell_back(reason)
            return super().forward(x, *args, **kwargs)
        weight = base.weight if type(base) is nn.Linear else base.weight.t()  # Conv1D stores (K, N)
        A, B, scaling = stacked(self, adapters)
        if adapters[0] in self.lora_variant:  # DoRA, alone
            m = self.lora_magnitude_vector[adapters[0]].weight
            precision, backend = options.precision, options.backend
            return dora.apply(x, weight, base.bias, m, A, B, scaling, precision=precision, backend=backend)
        bias = with_own_bias(self, adapters, base.bias)
        # Several adapters with dropout have been ruled out: each would see a mask of its own.
        dropout = eligibility.active_dropout(self, adapters[0])
        grouped = options.place is not None and bias is base.bias and not is_compiling()
        if grouped and dropout == 0.0 and len(adapters) == 1 and not isinstance(self.scaling[adapters[0]], Tensor):
            return groups.call(self, x, groups.Parts(base.weight, weight, base.bias, A, B, scaling))
        return apply(
            x,
            weight,
            bias,
            A,
            B,
            scaling,
            dropout=dropout,
            precision=options.precision,
            backend=options.backend,
        )


def stacked(layer: Any, adapters: list[str]) -> tuple[Tensor, Tensor, float]:
    """A (R, K), B (N, R) and the scaling: several adapters are one of rank R = Σ r with scaled Bs."""
    scalings = [layer.scaling[name] for name in adapters]
    if len(adapters) == 1 and not isinstance(scalings[0], Tensor):
        (name,) = adapters
        return layer.lora_A[name].weight, layer.lora_B[name].weight, float(scalings[0])
    # A scaling that is a tensor (PEFT's hotswap) must not be read back from a GPU: it goes into B.
    As = [layer.lora_A[name].weight for name in adapters]
    Bs = [layer.lora_B[name].weight * s for name, s in zip(adapters, scalings, strict=True)]
    return torch.cat(As), torch.cat(Bs, dim=1), 1.0


def with_own_bias(layer: Any, adapters: list[str], bias: Tensor | None) -> Tensor | None:
    """(N,) bias + Σ scaling · B's own bias (PEFT's lora_bias): vectors, added once instead of at every token.

    In fp32 at least: between its parts a 16-bit bias, and its gradient, would be rounded twice.
    """
    for name in adapters:
        own, scaling = layer.lora_B[name].bias, layer.scaling[name]
        if own is None:
            continue
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        if bias is None or isinstance(scaling, Tensor):
            bias = own * scaling if bias is None else bias + own * scaling
        else:
            bias = torch.add(bias, own, alpha=scaling)
    return bias


def add_to_base(layer: Any, x: Tensor, args: Any, kwargs: dict[str, Any], why: str | None = None) -> Tensor | None:
    """What the base layer, called, returns, and the LoRA branch added to it by one node of the autograd graph.

    None, before anything is called, where eligibility.branch_reason has something against it; the report says what.
    why: what the report says of the base being called, if it has nothing yet.
    """
    options = layer.slao_options
    parts = None if is_compiling() or kwargs else plain.branch(layer.__dict__, x)
    if parts is not None:
        (A, B, scaling), dropout = parts, 0.0
    else:
        adapters = [name for name in layer.active_adapters if name in layer.lora_A]
        reason = eligibility.branch_reason(layer, adapters, x, kwargs)
        if reason is not None:
            options.fell_back(reason)
            return None
        A, B, scaling = stacked(layer, adapters)
        bias = with_own_bias(layer, adapters, None)
        if bias is not None:
            B, scaling = torch.cat([B * scaling, bias[:, None]], 1), 1.0
        dropout = eligibility.active_dropout(layer, adapters[0])
        kwargs = {name: value for name, value in kwargs.items() if name not in eligibility.PEFT_ARGUMENTS}
    if why is not None:
        options.calls_base(why)
    y = layer.base_layer(x, *args, **kwargs)
    reason = eligibility.result_reason(y, x, A, B)
    if reason is not None:
        options.fell_back(reason)
        return _by_torch(layer, y, x)
    # Counted here, where nothing but this frame's variable holds what the base has just made.
    in_place = dispatch.direct() and add.FRESH is not None and add.holders(y) == add.FRESH and add.writable(y)
    precision, backend = options.precision, options.backend
    return add.apply(y, x, A, B, scaling, dropout=dropout, precision=precision, backend=backend, in_place=in_place)


def _by_torch(layer: Any, y: Any, x: Tensor) -> Tensor:
    """PEFT's formula on a result that is there already: to call a base twice could change its state."""
    dtype = y.dtype
    for name in layer.active_adapters:
        if name in layer.lora_A:
            down, up = layer.lora_A[name], layer.lora_B[name]
            y = y + up(down(layer.lora_dropout[name](x.to(down.weight.dtype)))) * layer.scaling[name]
    return y.to(dtype)
