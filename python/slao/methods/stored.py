"""Whether a saved state is of this method, model and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor


def compare(path: Path, meta: dict[str, Any], mine: dict[str, Any]) -> None:
    """ValueError where a state is of another method, or of other options, than `mine` (`Method._identity`)."""
    for key in ("method", "options"):
        if meta[key] != mine[key]:
            raise ValueError(f"{path} was saved with {key} {meta[key]!r}, this is {mine[key]!r}")


def rest(path: Path, tensors: dict[str, Tensor], live: dict[str, Tensor], layers: set[str]) -> dict[str, Tensor]:
    """What a state holds beside `live`; ValueError where that does not fit, or there are other layers than `layers`."""
    for key, value in live.items():
        saved = tensors.get(key)
        if saved is None or saved.shape != value.shape or saved.dtype != value.dtype:
            what = "absent" if saved is None else f"{tuple(saved.shape)} {saved.dtype}"
            raise ValueError(f"{path}: {key} is {what}, the model has {tuple(value.shape)} {value.dtype}")
    found = {key: value for key, value in tensors.items() if key not in live}
    unknown = sorted({key.rpartition(".")[0] for key in found} - layers)
    if unknown:
        raise ValueError(f"{path} holds layers that the model has not: {', '.join(unknown[:8])}")
    return found


def compare_scalings(path: Path, meta: dict[str, Any], mine: dict[str, Any], base: str | None) -> None:
    """ValueError where it was saved with other scalings, or over a base that an init had changed in another way
    (`inventory.base_mark`). Older states hold neither."""
    if meta.get("base", base) != base:
        raise ValueError(
            f"{path} was saved over base weights that their init had changed ({meta['base']}), those here are not the "
            f"same ({base}): give the model the init_lora_weights and the seed that it had"
        )
    for name, scaling in mine["scalings"].items():
        saved = meta.get("scalings", {}).get(name, scaling)
        if saved != scaling:
            raise ValueError(
                f"{path} was saved with scaling {saved:g} in {name}, the model has {scaling:g}: what was learned would "
                "count otherwise; give the LoraConfig the lora_alpha and use_rslora that it had"
            )
