"""How likely each of a set of answers is after a prompt, which is run once: its cache serves all of them."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..logits import Places, causal_model, log_probabilities
from .base import evaluating, positions

logger = logging.getLogger("slao")
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
    shares = _shares(model)
    with evaluating(model) as device:
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            some, found = [prompts[row] for row in rows], None
            if shares:
                found = _Shared(model, some, pad, device).log_likelihoods(answers, paths, batch_size)
                shares = found is not None
            if found is None:
                found = _one_by_one(model, some, answers, batch_size, pad, device)
            result[rows] = found
    return result


def _paths(answers: Sequence[Tokens]) -> list[Tokens]:
    """What has to be run to read every token but the first off it: the answers without their last, none twice, and none
    that begins another."""
    kept: list[Tokens] = []
    for path in sorted({tuple(answer[:-1]) for answer in answers}, key=len, reverse=True):
        if path and not any(tuple(other[: len(path)]) == path for other in kept):
            kept.append(list(path))
    return kept


def _shares(model: nn.Module) -> bool:
    """Whether a prompt's cache may serve several answers, and padding before it changes nothing.

    Not with a state instead of keys and values, with learned positions that are counted from the padding (RoBERTa's) or
    cannot be given, or without a decoder below the head.
    """
    try:
        causal = causal_model(model)
    except ValueError:
        return False
    if getattr(causal, "_is_stateful", False):
        return False
    learned = [m for name, m in causal.named_modules() if isinstance(m, nn.Embedding) and "position" in name]
    return all(m.padding_idx is None for m in learned) and (_counted(causal) or positions(causal) is None)


def _counted(causal: nn.Module) -> bool:
    return "position_ids" in inspect.signature(type(causal).forward).parameters


class _Shared:
    """A batch of prompts, padded on the left, and the answers after it."""

    def __init__(self, model: nn.Module, prompts: list[Tokens], pad: int, device: torch.device) -> None:
        self.model, self.pad, self.device, self.count = model, pad, device, len(prompts)
        self.counted = _counted(causal_model(model))
        self.ids = _padded(prompts, pad, left=True)
        self.mask = _padded([[1] * len(prompt) for prompt in prompts], 0, left=True)

    def log_likelihoods(self, answers: Sequence[Tokens], paths: list[Tokens], batch_size: int) -> Tensor | None:
        """(prompts, answers); None where the model's cache cannot be repeated after all."""
        total, cache = self._first(answers)
        size = max(1, batch_size // self.count)
        for start in range(0, len(paths), size):
            some = paths[start : start + size]
            own = copy.deepcopy(cache) if len(paths) > size else cache
            try:
                own.batch_repeat_interleave(len(some))
                self._rest(total, own, answers, some)
            except (AttributeError, IndexError, ValueError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
                    raise
                name = type(causal_model(self.model)).__name__
                logger.warning("%s runs every prompt with every answer: its cache cannot be repeated (%s)", name, error)
                return None
        return total

    def _first(self, answers: Sequence[Tokens]) -> tuple[Tensor, Any]:
        """The log-probability of each answer's first token, (prompts, answers), and the prompts' cache."""
        firsts = sorted({answer[0] for answer in answers})
        place = {token: number for number, token in enumerate(firsts)}
        found = torch.arange(self.count), torch.full((self.count,), self.ids.shape[1] - 1)
        reads = torch.arange(self.count).repeat_interleave(len(firsts)), torch.tensor(firsts).repeat(self.count)
        logp, outputs = self._read(found, *reads, self._inputs(self.ids, self.mask))
        total = logp.view(self.count, len(firsts))[:, [place[answer[0]] for answer in answers]]
        return total, getattr(outputs, "past_key_values", None)

    def _rest(self, total: Tensor, cache: Any, answers: Sequence[Tokens], paths: list[Tokens]) -> None:
        """Add to `total` what is read off these paths, run after copies of the prompts' cache: (prompt, path)."""
        reads = []  # (answer, its token, the path and the place on it that it is read off)
        for answer, line in enumerate(answers):
            path = next((number for number, other in enumerate(paths) if other[: len(line) - 1] == line[:-1]), None)
            if path is not None:
                reads += [(answer, token, (path, place)) for place, token in enumerate(line[1:])]
        if not reads:
            return
        cells = sorted({cell for _, _, cell in reads})
        index = {cell: number for number, cell in enumerate(cells)}
        of_prompt = torch.arange(self.count).repeat_interleave
        lines, columns = (torch.tensor(column).repeat(self.count) for column in zip(*cells, strict=True))
        found = of_prompt(len(cells)) * len(paths) + lines, columns
        at = torch.tensor([index[cell] for _, _, cell in reads]).repeat(self.count)
        tokens = torch.tensor([token for _, token, _ in reads]).repeat(self.count)
        tails = _padded(paths, self.pad).repeat(self.count, 1)
        mask = _padded([[1] * len(path) for path in paths], 0).repeat(self.count, 1)
        mask = torch.cat([self.mask.repeat_interleave(len(paths), 0), mask], 1)
        given = self._inputs(tails, mask) | {"past_key_values": cache}
        logp, _ = self._read(found, of_prompt(len(reads)) * len(cells) + at, tokens, given)
        total.index_add_(1, torch.tensor([answer for answer, _, _ in reads]), logp.view(self.count, len(reads)))

    def _inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """What the decoder takes; the mask also covers the cache. Padding has no position of its own."""
        given: dict[str, Any] = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        if self.counted:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :].to(self.device)
        return given | {"use_cache": True}

    def _read(self, found: Places, places: Tensor, tokens: Tensor, given: dict[str, Any]) -> tuple[Tensor, Any]:
        rows, columns, places, tokens = (tensor.to(self.device) for tensor in (*found, places, tokens))
        logp, outputs = log_probabilities(self.model, (rows, columns), places, tokens, **given)
        return logp.cpu(), outputs


def _one_by_one(
    model: nn.Module, prompts: list[Tokens], answers: Sequence[Tokens], batch_size: int, pad: int, device: Any
) -> Tensor:
    """(prompts, answers), every prompt run with every answer, padded on the right."""
    pairs = [(prompt, answer) for prompt in prompts for answer in answers]
    result = torch.zeros(len(pairs))
    for start in range(0, len(pairs), batch_size):
        some = pairs[start : start + batch_size]
        ids = _padded([prompt + answer for prompt, answer in some], pad).to(device)
        mask = _padded([[1] * len(prompt + answer) for prompt, answer in some], 0).to(device)
        logits = model(input_ids=ids, attention_mask=mask).logits
        for row, (prompt, answer) in enumerate(some):
            logp = logits[row, len(prompt) - 1 : len(prompt) + len(answer) - 1].float().log_softmax(-1)
            result[start + row] = logp.gather(1, torch.tensor(answer, device=device)[:, None]).sum().cpu()
    return result.view(len(prompts), len(answers))


def _padded(lines: Iterable[Tokens], filler: int, left: bool = False) -> Tensor:
    lines = list(lines)
    longest = max(map(len, lines))
    gaps = [[filler] * (longest - len(line)) for line in lines]
    return torch.tensor([gap + line if left else line + gap for gap, line in zip(gaps, lines, strict=True)])
