"""One file a method; `make_method` finds them by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Method
from .clora import CLoRA
from .ewc import EWC
from .inclora import IncLoRA
from .incslao import IncSLAO
from .inflora import InfLoRA
from .joint import Joint
from .lwf import LwF
from .magmax import MagMax
from .olora import OLoRA
from .opcm import OPCM
from .osf import OSF
from .sdlora import SDLoRA
from .seqlora import SeqLoRA
from .slao import SLAO
from .slora import SLoRA

_ALL: tuple[type[Method], ...] = (
    SLAO,
    CLoRA,
    EWC,
    IncLoRA,
    IncSLAO,
    InfLoRA,
    Joint,
    LwF,
    MagMax,
    OLoRA,
    OPCM,
    OSF,
    SDLoRA,
    SeqLoRA,
    SLoRA,
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}

__all__ = [
    "EWC",
    "METHODS",
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
    "Method",
    "OLoRA",
    "SDLoRA",
    "SLoRA",
    "SeqLoRA",
    "check_method",
    "make_method",
]


def check_method(name: str) -> type[Method]:
    """The class of that name, else a ValueError that lists the valid ones."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(sorted(METHODS))}")
    return METHODS[name]


def make_method(name: str, model: nn.Module, **options: Any) -> Method:
    """The method `name` on `model`, with its options. ValueError for an unknown name or option."""
    method = check_method(name)
    try:
        return method(model, **options)
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from error
