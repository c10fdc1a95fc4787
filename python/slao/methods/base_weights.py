"""W + s Σ B A of a layer as a new task finds it, for methods that look at what the weights do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slao_kernels import exact_merge

from .inclora import IncLoRA


def why_not(layer: Any, adapter: str) -> str | None:
    """Why the layer's weight cannot be read as a matrix; None where it can."""
    if hasattr(layer, "parameter_name"):
        return "its weights are a mixture's experts"
    return exact_merge.why_not(layer, [adapter])


def refuse(method: IncLoRA, reasons: dict[str, str | None]) -> None:
    """ValueError that names the layers of which there is a reason."""
    if bad := [f"{name}: {why}" for name, why in reasons.items() if why is not None]:
        raise ValueError(f"{method.name} cannot treat {len(bad)} layers: {'; '.join(bad[:8])}")


def refuse_trained(method: IncLoRA) -> None:
    """ValueError for a first task whose B is not 0: what the weights do is then in B A too (pissa, olora, loaded)."""
    if trained := [pair.name for pair in method.pairs if pair.B.any()]:
        raise ValueError(
            f"{method.name} begins with B = 0, and {len(trained)} layers have a trained one "
            f"({', '.join(trained[:4])}): merge that adapter into the base, or begin with a fresh one"
        )


def found(method: IncLoRA, index: int, frozen: tuple[Tensor, Tensor]) -> Tensor:
    """(m, n) of layer `index`, in fp32 at least: the base and these frozen pairs, without the live one."""
    layer: Any = method.pairs[index].layer
    weight = getattr(*exact_merge.place(layer)).detach()
    weight = weight.T if layer.fan_in_fan_out else weight
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    A, B = (part.to(wide.dtype) for part in frozen)
    return torch.addmm(wide, B, A, alpha=float(layer.scaling[method.adapter]))
