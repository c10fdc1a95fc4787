"""What a language model keeps of everything that no task is about: its cross-entropy on a fixed text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .objectives.base import evaluating
from .reading import read_text

PYTHON = "python"  # the text that every Python carries: its help topics
TOKENS, LENGTH = 2048, 256  # as many tokens as are read, in windows of so many


def windows(text: str, tokenizer: Any, longest: int | None = None) -> list[list[int]]:
    """The first 2,048 tokens of a text ("python", or the name of a file) in windows of 256, or of `longest`; each
    begins as the tokenizer begins a text (<bos>).

    ValueError where that is no whole window.
    """
    opening = tokenizer("")["input_ids"]
    if opening and opening[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        opening = opening[:-1]  # T5's and the like end every text
    ids = tokenizer(content(text)[: 16 * TOKENS], add_special_tokens=False)["input_ids"][:TOKENS]
    length = (LENGTH if longest is None else min(LENGTH, longest)) - len(opening)
    found = [opening + ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not found:
        raise ValueError(f"train.retention: {text} has {len(ids)} tokens, and {length} are needed; give a longer text")
    return found


def content(text: str) -> str:
    """What "python" or the name of a file stands for."""
    return _python() if text == PYTHON else read_text(Path(text))


def _python() -> str:
    from .streams.python_docs import help_topics

    return "\n".join(text for _, text in sorted(help_topics().items()))


def cross_entropy(model: nn.Module, lines: Sequence[Sequence[int]]) -> float:
    """Mean over the tokens of -log p, in nats, of windows of equal length; the first token of each is given.

    ValueError where it is not finite.
    """
    total = 0.0
    with evaluating(model) as device:
        for line in lines:
            ids = torch.tensor([list(line)], device=device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
            total += float(F.cross_entropy(logits.float(), ids[0, 1:]))
    if not math.isfinite(total):
        raise ValueError(f"the cross-entropy of the retention text is {total}: the model has diverged")
    return total / len(lines)
