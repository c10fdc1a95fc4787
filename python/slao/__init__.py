"""slao: continual learning with one LoRA. Methods, streams of tasks, a training loop and the `slao` command."""

from .methods import SLAO, CLoRA, IncLoRA, Method, SeqLoRA, make_method
from .schedules import MergeStats, make_schedule

__all__ = ["SLAO", "CLoRA", "IncLoRA", "MergeStats", "Method", "SeqLoRA", "make_method", "make_schedule"]
