"""Offline: saved PEFT adapters merged into one (`merge`)."""

from __future__ import annotations

from .merge import METHODS, Merged, merge_adapters

__all__ = ["METHODS", "Merged", "merge_adapters"]
