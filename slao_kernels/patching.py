"""patch and unpatch: swap the class of a model's LoRA layers, and say what was left out and why."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import dispatch
from .ops.lora_linear import PRECISIONS

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass
class PatchReport:
    """What `patch` did; `print(report)` is a table.

    patched: names of the layers that now have the fused forward. skipped: name -> why a LoRA layer kept PEFT's.
    injected: whether `patch` added the adapter. fallbacks: name -> why a patched layer runs PEFT's forward in some
    calls: known ones (dropout) from the start, others as they are met while running. notes: name -> why a patched
    layer calls its base layer (quantised, hooked, ...) and adds the LoRA branch to what that returns, instead of
    computing both in one node; and which parameter of how many experts a wrapper of experts adapts.
    """

    patched: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    injected: bool = False
    fallbacks: dict[str, str] = field(default_factory=dict)
    backend: str = "auto"
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        total = len(self.patched) + len(self.skipped)
        head = f"slao_kernels: {len(self.patched)} of {total} LoRA layers fused (backend: {self.backend})"
        lines = [head + (", adapter injected" if self.injected else "")]
        lines += _rows("fused", Counter((_pattern(name), self.notes.get(name, "")) for name in self.patched))
        for title, reasons in (("skipped", self.skipped), ("falls back", self.fallbacks)):
            lines += _rows(title, Counter((_pattern(name), why) for name, why in reasons.items()))
        return "\n".join(lines)


def _pattern(name: str) -> str:
    """Layers that differ only in their numbers are one line of the table."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _rows(title: str, counts: Counter[tuple[str, str]]) -> list[str]:
    width = max((len(pattern) for pattern, _ in counts), default=0)
    return [
        f"  {title:<10} {count:>4} × {pattern:<{width}}  {why}".rstrip() for (pattern, why), count in counts.items()
    ]


def patch(
    model: nn.Module,
    config: LoraConfig | None = None,
    *,
    backend: str = "auto",
    precision: str = "base",
    strict: bool = False,
) -> PatchReport:
    """Give every eligible LoRA layer of `model` the fused forward, in place; calling it again changes nothing more.

    A base layer that is no plain linear one (quantised, hooked, ...) is called, and one node adds the LoRA branch.

    model: anything with PEFT LoRA layers; or a model without any, then `config` (a peft.LoraConfig; for transformers
    models it defaults to r=8, lora_alpha=16, target_modules="all-linear") is injected first, through PEFT, in fp32.
    backend: "auto", or one of `python -m slao_kernels`' list, for every layer. precision: "base" computes the LoRA
    branch in the base's dtype, "adapter" keeps PEFT's wider branch (see `lora_linear`). strict: any layer that would
    be skipped is an error.
    Parameters, their names, the state dict and PEFT's methods stay as they are; `unpatch` undoes it.
    Raises ValueError, with the model as it was: nothing to patch or inject, unknown backend or precision, a config
    that contradicts the adapter that is there, Unsloth's or Axolotl's LoRA kernels on the model, skips under strict.
    """
    _check_backend(backend)
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    from . import adapters, conflicts, eligibility, injection
    from .layers import FusedOptions, is_fused, log_once

    conflicts.check_none(model)
    undo = None
    if not any(True for _ in adapters.lora_layers(model)):
        undo = injection.inject(model, config)
    elif config is not None:
        injection.check_same(model, config)
    report = PatchReport(injected=undo is not None, backend=backend)
    chosen: list[tuple[str, nn.Module, str | None]] = []
    for name, layer in adapters.lora_layers(model):
        if hasattr(layer.__dict__.get("slao_before"), "peft_class"):
            report.patched.append(name)  # before a method extended it (extension.py), and it still is
            report.notes[name] = "extended by a method"
            continue
        reason, called = _skip_reason(layer, precision)
        if reason is not None:
            report.skipped[name] = reason
            continue
        chosen.append((name, layer, called))
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        for adapter in active:
            dropout = eligibility.dropout_reason(layer, adapter, alone=len(active) == 1)
            if dropout is not None:
                report.fallbacks[name] = dropout
    if strict and report.skipped:
        if undo is not None:
            undo()
        some = "; ".join(f"{name}: {why}" for name, why in list(report.skipped.items())[:8])
        raise ValueError(f"patch(strict=True): {len(report.skipped)} LoRA layers would be skipped: {some}")
    for name, reason in report.skipped.items():
        log_once(name, reason)
        layer = model.get_submodule(name)
        if is_fused(layer) and not eligibility.has_own_forward(layer):
            # Patched before, and something about it has changed since.
            _unfuse(layer)
    for name, layer, called in chosen:
        _forget(layer)
        layer.__class__ = _fused_class(layer)
        layer.slao_options = FusedOptions(name, backend, precision, report.fallbacks, report.notes)
        if called is not None:
            layer.slao_options.calls_base(called)
        if hasattr(layer, "parameter_name"):
            report.notes[name] = f"{layer.parameter_name} of {layer.num_experts} experts"
        report.patched.append(name)
    return report


def _check_backend(backend: str) -> None:
    """ValueError unless lora_linear has it on some device here: a model may be patched before it moves to the GPU."""
    dispatch.check_backend(backend)
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if backend != "auto" and all(dispatch.why_not("lora_linear", backend, device) for device in here):
        dispatch.choose("lora_linear", here[-1], backend)  # raises, with the reason


def _skip_reason(layer: Any, precision: str) -> tuple[str | None, str | None]:
    """(why a LoRA layer keeps PEFT's forward whatever it is called with, why its base layer is called)"""
    from . import eligibility
    from .layers import is_fused, peft_class

    if "slao_before" in layer.__dict__:
        return "a method has given it a core or frozen pairs; patch before the method is made", None
    swapped = _fused_class(layer)
    if swapped is None:
        return (
            f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__} has no fused forward",
            None,
        )
    if not is_fused(layer) and "forward" in layer.__dict__:  # swapping the class would not change it
        return "its forward was replaced on the instance (accelerate hooks?)", None
    if hasattr(layer, "parameter_name"):
        from . import experts

        return experts.why_not(experts.wrappers(layer), early=True), None
    reason = eligibility.meta_reason(layer.base_layer)
    if reason is not None:
        return reason, None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    called = eligibility.why_called(layer, active, precision, early=True)
    if called is None and not swapped.slao_knows_base:
        called = f"PEFT's {peft_class(layer).__name__} does"
    reason = eligibility.variant_reason(layer, active, called is not None)
    for adapter in active:
        reason = reason or eligibility.adapter_reason(layer, adapter, early=True)
    return reason, called


def _fused_class(layer: nn.Module) -> Any:
    """The class that a LoRA layer, PEFT's or already fused, is swapped to; None where its forward is not known."""
    from . import layers

    if not hasattr(layer, "parameter_name"):
        return layers.fused_class(layer)
    from .experts import FusedExperts

    return FusedExperts if layers.peft_class(layer) is FusedExperts.peft_class else None


def unpatch(model: nn.Module) -> int:
    """Give every fused layer its PEFT class back; returns how many there were. Adapters stay, trained or not.

    What is merged into the base stays merged; PEFT's own unmerge takes it out, with its rounding. A layer that a method
    has extended since keeps the method's forward, in plain PyTorch, and gets its PEFT class when
    the method lets go of it. Raises ValueError, with the model as it was, when something has wrapped a fused layer's
    forward since.
    """
    from . import exact_merge
    from .eligibility import has_own_forward
    from .layers import is_fused

    layers: list[Any] = [module for module in model.modules() if is_fused(module)]
    wrapped = [layer.slao_options.name for layer in layers if has_own_forward(layer)]
    if wrapped:
        raise ValueError(
            f"{', '.join(wrapped[:8])}: its forward was replaced on the instance after patch (accelerate hooks?), and "
            "the replacement calls the fused one; remove it, then unpatch"
        )
    for module in model.modules():  # layers too that a method has extended, patched or not
        exact_merge.forget(module, "the model was unpatched")
    for layer in layers:
        _unfuse(layer)
    extended = [module for module in model.modules() if hasattr(module.__dict__.get("slao_before"), "peft_class")]
    for layer in extended:
        layer.__dict__["slao_before"] = layer.slao_before.peft_class
        _forget(layer)
    return len(layers) + len(extended)


def _unfuse(layer: Any) -> None:
    layer.__class__ = type(layer).peft_class
    _forget(layer)
    # Removing an accelerate hook leaves the class's own forward bound on the instance.
    for key in ("slao_options", "forward"):
        layer.__dict__.pop(key, None)


def _forget(layer: Any) -> None:
    """What was concluded about its calls under other options."""
    layer.__dict__.pop("slao_plan", None)
