"""The fp32 copies of the weights that DeepSpeed's optimizers train in place of the parameters.

At every step they overwrite the parameters: what was written into these alone since the engine was made is undone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def write_through(parameters: Iterable[Tensor]) -> int:
    """Set the copies to what the parameters are now, and return how many elements that changed on this rank.

    For ZeRO-1, -2 and -3 and DeepSpeed's BF16_Optimizer, offloaded or not. An element whose copy rounds to the
    parameter keeps its copy, with the digits that the parameter has no room for. Every rank writes its own part,
    nothing is sent. Parameters without a copy are passed over.
    """
    changed = 0
    with torch.no_grad():
        for parameter in parameters:
            if hasattr(parameter, "ds_id"):
                changed += _partition(parameter)
            elif getattr(parameter, "_hp_mapping", None) is not None:
                changed += _fragment(parameter)
    return changed


def _partition(parameter: Tensor) -> int:
    """ZeRO-3: the parameter is this rank's part of itself, and so is the copy."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

    if not hasattr(parameter, "_z3_optimizer"):  # no engine yet
        return 0
    try:
        copy = safe_get_local_fp32_param(parameter)
    except KeyError:  # trainable, but not given to the optimizer
        return 0
    if copy is None:  # frozen
        return 0
    now, changed = _followed(copy, parameter.ds_tensor)
    if changed:
        safe_set_local_fp32_param(parameter, now)
    return changed


def _fragment(parameter: Tensor) -> int:
    """Else the parameter is whole, and the copy is of the part that this rank trains."""
    mapping = parameter._hp_mapping
    address = mapping.lp_fragment_address
    copy = mapping.get_hp_fragment()
    now, changed = _followed(copy, parameter.detach().flatten().narrow(0, address.start, address.numel))
    if changed:
        copy.data.copy_(now)
    return changed


def _followed(copy: Tensor, part: Tensor) -> tuple[Tensor, int]:
    """`copy` where it rounds to `part`, else `part`; and how often that is."""
    part = part.detach().to(copy.device).view_as(copy)
    differs = copy.to(part.dtype) != part
    return torch.where(differs, part.to(copy.dtype), copy), int(differs.sum())


def refuse_unreachable(holder: object) -> None:
    """ValueError where an optimizer trains copies to which nothing leads from the parameters.

    holder: the optimizer, or what has it as its `optimizer`: DeepSpeed's engine, accelerate's wrappers. A model that
    has none passes.
    """
    while holder is not None:
        if type(holder).__module__.startswith("deepspeed.runtime.fp16."):
            raise ValueError(
                f"DeepSpeed's {type(holder).__name__} (a 16-bit model without ZeRO) trains fp32 copies that it made "
                "before the task begins, and would undo what begin_task() writes into A and B: set zero_optimization's "
                "stage to 1 or higher, or make the method on the bare model and a new engine after each begin_task()"
            )
        holder = getattr(holder, "__dict__", {}).get("optimizer")
