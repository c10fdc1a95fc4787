"""How likely each of a set of answers is after a prompt, which is run once: its cache serves all of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..logits import Places, causal_model, log_probabilities
from .base import evaluating, positions

Tokens = list[int]


def log_likelihoods(
    model: nn.Module, prompts: Sequence[Tokens], answers: Sequence[Tokens], batch_size: int, pad: int
) -> Tensor:
    """(prompts, answers), fp32: Σ log p(token | prompt, the answer's tokens before it); no prompt, no answer is empty.

    At most batch_size sequences are held at a time. Answers that begin alike share what they have in common: the first
    tokens of all are read off the prompt, and of the rest each beginning that is no part of another is run once. Where
    the model keeps no cache that can be repeated, every prompt is run with every answer.
    """
    result = torch.zeros(len(prompts), len(answers))
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # little padding
    paths = _paths(answers)
    step = max(1, batch_size // max(1, len(paths)))
    with evaluating(model) as device:
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            result[rows] = _after(model, [prompts[row] for row in rows], answers, paths, pad, device)
    return result


def _paths(answers: Sequence[Tokens]) -> list[Tokens]:
    """What has to be run to read every token but the first off it: the answers without their last, none twice, and none
    that begins another."""
    kept: list[Tokens] = []
    for path in sorted({tuple(answer[:-1]) for answer in answers}, key=len, reverse=True):
        if path and not any(tuple(other[: len(path)]) == path for other in kept):
            kept.append(list(path))
    return kept


def _after(
    model: nn.Module, prompts: list[Tokens], answers: Sequence[Tokens], paths: list[Tokens], pad: int, device: Any
) -> Tensor:
    """(prompts, answers) for a batch of prompts."""
    count, longest = len(prompts), max(map(len, prompts))
    inputs = _padded(prompts, pad, left=True)
    mask = _padded([[1] * len(prompt) for prompt in prompts], 0, left=True)
    firsts = sorted({answer[0] for answer in answers})
    of_first = {token: place for place, token in enumerate(firsts)}
    found = torch.arange(count), torch.full((count,), longest - 1)
    places, tokens = torch.arange(count).repeat_interleave(len(firsts)), torch.tensor(firsts).repeat(count)
    given = _inputs(model, inputs, mask, device) | {"use_cache": True}
    logp, outputs = log_probabilities(model, *_on(device, found, places, tokens), **given)
    first = logp.cpu().view(count, len(firsts))
    total = first[:, [of_first[answer[0]] for answer in answers]]
    if not paths:
        return total
    cache = getattr(outputs, "past_key_values", None)
    # Each path at once for all prompts, after a copy of the prompt's cache; (prompt, path) in that order.
    tails, tail_mask = _padded(paths, pad).repeat(count, 1), _padded([[1] * len(path) for path in paths], 0)
    mask = torch.cat([mask.repeat_interleave(len(paths), 0), tail_mask.repeat(count, 1)], 1)
    cells = sorted({(path, place) for path, line in enumerate(paths) for place in range(len(line))})
    index = {cell: number for number, cell in enumerate(cells)}
    reads = []  # (answer, its token, the cell that it is read off)
    for answer, line in enumerate(answers):
        path = next((p for p, other in enumerate(paths) if other[: len(line) - 1] == line[:-1]), 0)
        reads += [(answer, token, index[path, place]) for place, token in enumerate(line[1:])]
    which, tokens, at = (torch.tensor(column) for column in zip(*reads, strict=True))
    lines, columns = (torch.tensor(column) for column in zip(*cells, strict=True))
    of_prompt = torch.arange(count).repeat_interleave
    rows = of_prompt(len(cells)) * len(paths) + lines.repeat(count)
    places = of_prompt(len(reads)) * len(cells) + at.repeat(count)
    columns, tokens = columns.repeat(count), tokens.repeat(count)
    if _repeat(model, cache, len(paths)):
        given = _inputs(model, tails, mask, device, start=longest) | {"past_key_values": cache, "use_cache": True}
    else:
        whole = torch.cat([inputs.repeat_interleave(len(paths), 0), tails], 1)
        given, columns = _inputs(model, whole, mask, device), columns + longest
    logp, _ = log_probabilities(model, *_on(device, (rows, columns), places, tokens), **given)
    total.index_add_(1, which, logp.cpu().view(count, len(reads)))
    return total


def _repeat(model: nn.Module, cache: Any, times: int) -> bool:
    """Make `times` copies of every row of the prompt's cache, one after the other; False where that cannot be."""
    counted = "position_ids" in inspect.signature(type(causal_model(model)).forward).parameters
    try:
        cache.batch_repeat_interleave(times)
    except AttributeError:  # no such cache, or one of its layers
        return False
    return counted or positions(model) is None


def _inputs(model: nn.Module, ids: Tensor, mask: Tensor, device: Any, start: int = 0) -> dict[str, Tensor]:
    """What the decoder takes; the mask also covers the cache. Padding has no position of its own."""
    given = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(type(causal_model(model)).forward).parameters:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
    return {name: tensor.to(device) for name, tensor in given.items()}


def _padded(lines: Iterable[Tokens], filler: int, left: bool = False) -> Tensor:
    lines = list(lines)
    longest = max(map(len, lines))
    gaps = [[filler] * (longest - len(line)) for line in lines]
    return torch.tensor([gap + line if left else line + gap for gap, line in zip(gaps, lines, strict=True)])


def _on(device: Any, found: Places, places: Tensor, tokens: Tensor) -> tuple[Places, Tensor, Tensor]:
    return (found[0].to(device), found[1].to(device)), places.to(device), tokens.to(device)
