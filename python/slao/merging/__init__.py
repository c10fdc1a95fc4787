"""Offline: saved PEFT adapters merged into one (`merge`), cut to a rank (`compress`), made of a full fine-tune
(`extract`), or folded into their base (`fold`)."""

from __future__ import annotations

from .compress import compress_adapter
from .extract import extract_adapter
from .fold import Folded, fold_model
from .merge import Merged, merge_adapters
from .options import METHODS

__all__ = ["METHODS", "Folded", "Merged", "compress_adapter", "extract_adapter", "fold_model", "merge_adapters"]
