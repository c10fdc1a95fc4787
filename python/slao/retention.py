"""What a language model keeps of everything that no task is about: its cross-entropy on a fixed text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .objectives.base import evaluating
from .reading import read_text

PYTHON = "python"  # the text that every Python carries: its help topics
TOKENS, LENGTH = 2048, 256  # as many tokens as are read, in windows of so many


def windows(text: str, tokenizer: Any, longest: int | None = None) -> list[list[int]]:
    """The first 2,048 tokens of a text ("python", or the name of a file) in windows of 256, or of `longest`.

    ValueError where that is no whole window.
    """
    content = _python() if text == PYTHON else read_text(Path(text))
    ids = tokenizer(content[: 16 * TOKENS], add_special_tokens=False)["input_ids"][:TOKENS]
    length = LENGTH if longest is None else min(LENGTH, longest)
    found = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not found:
        raise ValueError(f"train.retention: {text} has {len(ids)} tokens, and {length} are needed; give a longer text")
    return found


def _python() -> str:
    from .streams.python_docs import help_topics

    return "\n".join(text for _, text in sorted(help_topics().items()))


def cross_entropy(model: nn.Module, lines: Sequence[Sequence[int]]) -> float:
    """Mean over the tokens of -log p, in nats, of windows of equal length; the first token of each is given."""
    total = 0.0
    with evaluating(model) as device:
        for line in lines:
            ids = torch.tensor([list(line)], device=device)
            total += float(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss)
    return total / len(lines)
