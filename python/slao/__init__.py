"""slao: continual learning with one LoRA. Methods, streams of tasks, a training loop and the `slao` command."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import SlaoCallback
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
        SLoRA,
        make_method,
    )
    from .schedules import MergeStats, make_schedule

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
    "SLoRA",
    "SeqLoRA",
    "SlaoCallback",
    "make_method",
    "make_schedule",
]


# A name loads its module when it is first asked for: `slao --help` comes through here, and torch takes seconds. Names
# that are not here are of `slao.methods`.
_PLACES = {"SlaoCallback": "callback", "MergeStats": "schedules", "make_schedule": "schedules"}


def __getattr__(name: str) -> Any:
    if name in ("methods", "schedules"):  # as `import slao` alone has always had them
        return import_module(f".{name}", __name__)
    if name in __all__:
        return getattr(import_module(f".{_PLACES.get(name, 'methods')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
