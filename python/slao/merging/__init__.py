"""Offline: saved PEFT adapters merged into one (`merge`), or folded into their base (`fold`)."""

from __future__ import annotations

from .fold import Folded, fold_model
from .merge import METHODS, Merged, merge_adapters

__all__ = ["METHODS", "Folded", "Merged", "fold_model", "merge_adapters"]
