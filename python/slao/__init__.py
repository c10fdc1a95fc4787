"""slao: continual learning with one LoRA. Methods, streams of tasks, a training loop and the `slao` command."""

from .methods import EWC, SLAO, CLoRA, IncLoRA, Method, OLoRA, SeqLoRA, make_method
from .schedules import MergeStats, make_schedule

__all__ = [
    "EWC",
    "SLAO",
    "CLoRA",
    "IncLoRA",
    "MergeStats",
    "Method",
    "OLoRA",
    "SeqLoRA",
    "make_method",
    "make_schedule",
]
