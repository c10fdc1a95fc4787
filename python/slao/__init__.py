"""slao: continual learning with one LoRA. Methods, streams of tasks, a training loop and the `slao` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .methods import (
    EWC,
    OPCM,
    OSF,
    SLAO,
    CLoRA,
    IncLoRA,
    IncSLAO,
    InfLoRA,
    Joint,
    LwF,
    MagMax,
    Method,
    OLoRA,
    SDLoRA,
    SeqLoRA,
    make_method,
)
from .schedules import MergeStats, make_schedule

if TYPE_CHECKING:
    from .callback import SlaoCallback

__all__ = [
    "EWC",
    "OPCM",
    "OSF",
    "SLAO",
    "CLoRA",
    "IncLoRA",
    "IncSLAO",
    "InfLoRA",
    "Joint",
    "LwF",
    "MagMax",
    "MergeStats",
    "Method",
    "OLoRA",
    "SDLoRA",
    "SeqLoRA",
    "SlaoCallback",
    "make_method",
    "make_schedule",
]


def __getattr__(name: str) -> Any:
    if name == "SlaoCallback":  # loads transformers
        from .callback import SlaoCallback

        return SlaoCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
