"""What a model is trained to do on a stream, and how it is scored."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..streams import Stream
from ..typed import known
from .base import Objective
from .causal_lm import CausalLM
from .image_matching import ImageMatching
from .label_matching import LabelMatching

OBJECTIVES: dict[str, type[Objective]] = {kind.name: kind for kind in (LabelMatching, CausalLM, ImageMatching)}

__all__ = [
    "OBJECTIVES",
    "CausalLM",
    "ImageMatching",
    "LabelMatching",
    "Objective",
    "check_objective",
    "make_objective",
]


def check_objective(name: str, options: dict[str, Any]) -> type[Objective]:
    """The class of that name; ValueError for an unknown name or option, listing the valid ones (model, tokenizer and
    stream are no options)."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose one of {', '.join(sorted(OBJECTIVES))}")
    known(f"objective {name!r}", options, list(inspect.signature(OBJECTIVES[name]).parameters)[3:])
    return OBJECTIVES[name]


def make_objective(name: str, model: nn.Module, tokenizer: Any, stream: Stream, **options: Any) -> Objective:
    """The objective `name` for `model` on `stream`. Build it before training: label texts are embedded here."""
    return check_objective(name, options)(model, tokenizer, stream, **options)  # type: ignore[call-arg]
