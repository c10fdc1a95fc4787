"""SeqLoRA: one LoRA, trained on task after task and nothing else. The baseline that forgets."""

from __future__ import annotations

from .base import Method


class SeqLoRA(Method):
    """One LoRA that keeps being fine-tuned; what it is after the last step is what it answers with."""

    name = "seqlora"
