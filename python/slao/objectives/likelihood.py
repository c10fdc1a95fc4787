"""How likely each of a set of answers is after a prompt, which is run once: its cache serves all of them."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..logits import Places, causal_model, log_probabilities
from .base import evaluating, positions

logger = logging.getLogger("slao")
Tokens = list[int]


def log_likelihoods(
    model: nn.Module, prompts: Sequence[Tokens], answers: Sequence[Tokens], batch_size: int, pad: int
) -> Tensor:
    """(prompts, answers), fp32: Σ log p(token | prompt, the answer's tokens before it); no prompt, no answer is empty.

    At most batch_size sequences are run at a time. Answers that begin alike share what they have in common: the first
    tokens of all are read off the prompt, and of the rest each beginning that is no part of another is run once. Where
    the model keeps no cache that can be copied, every prompt is run with every answer.
    """
    return _totals(model, prompts, answers, batch_size, pad, best_alone=False)


def most_likely(
    model: nn.Module, prompts: Sequence[Tokens], answers: Sequence[Tokens], batch_size: int, pad: int
) -> list[int]:
    """The place in `answers` of each prompt's most likely one, the first of equals: the argmax of `log_likelihoods`.

    The answer with the best beginning is run first. The others follow token by token, twice as many each time, for as
    long as what is known of them is no less likely than the best whole answer, since further tokens only make it less
    so: a model that has learned its task runs little more than the right one.
    """
    best: list[int] = _totals(model, prompts, answers, batch_size, pad, best_alone=True).argmax(1).tolist()
    return best


def _totals(
    model: nn.Module, prompts: Sequence[Tokens], answers: Sequence[Tokens], batch_size: int, pad: int, best_alone: bool
) -> Tensor:
    """As `log_likelihoods`; best_alone: of an answer that cannot be the best only its first tokens', which is more."""
    result = torch.zeros(len(prompts), len(answers))
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # little padding
    step = batch_size if best_alone else max(1, batch_size // max(1, len(_paths(answers))))
    shares = _shares(model)
    with evaluating(model) as device:
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            some, found = [prompts[row] for row in rows], None
            if shares:
                found = _Shared(model, some, answers, pad, device).totals(batch_size, best_alone)
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
    """A batch of prompts, padded on the left, and the answers after it.

    total, known: (prompts, answers), the log-probability of each answer as far as it is known, and of how many tokens.
    """

    def __init__(
        self, model: nn.Module, prompts: list[Tokens], answers: Sequence[Tokens], pad: int, device: torch.device
    ) -> None:
        self.model, self.pad, self.device, self.count = model, pad, device, len(prompts)
        self.counted = _counted(causal_model(model))
        self.ids = _padded(prompts, pad, left=True)
        self.mask = _padded([[1] * len(prompt) for prompt in prompts], 0, left=True)
        self.answers, self.lengths = answers, torch.tensor([len(answer) for answer in answers])

    def totals(self, batch_size: int, best_alone: bool) -> Tensor | None:
        """(prompts, answers), as `_totals`; None where the model's cache cannot be copied after all."""
        self._first()
        self.known = torch.ones(self.total.shape, dtype=torch.long)
        wanted, depth = torch.ones_like(self.known, dtype=torch.bool), int(self.lengths.max())
        if best_alone:
            wanted = F.one_hot(self.total.argmax(1), len(self.answers)).bool()
        while wanted.any():
            if not self._read_on(wanted, depth, batch_size):
                return None
            part = self.known < self.lengths
            best = self.total.masked_fill(part, -torch.inf).amax(1, keepdim=True)
            wanted = part & ~(self.total < best)
            depth = 2 * min(self.known[wanted].tolist(), default=0)
        return self.total

    def _first(self) -> None:
        """Run the prompts: `cache`, and the first token of every answer."""
        firsts = sorted({answer[0] for answer in self.answers})
        place = {token: number for number, token in enumerate(firsts)}
        found = torch.arange(self.count), torch.full((self.count,), self.ids.shape[1] - 1)
        reads = torch.arange(self.count).repeat_interleave(len(firsts)), torch.tensor(firsts).repeat(self.count)
        logp, outputs = self._read(found, *reads, self._inputs(self.ids, self.mask))
        self.total = logp.view(self.count, len(firsts))[:, [place[answer[0]] for answer in self.answers]]
        self.cache: Any = getattr(outputs, "past_key_values", None)

    def _read_on(self, wanted: Tensor, depth: int, batch_size: int) -> bool:
        """Read the first `depth` tokens of the answers that are wanted, and of what shares their paths. False: the
        cache has no copies."""
        heads = [answer[:depth] for answer in self.answers]
        paths = _paths(heads)
        # The path that each is read off; None where only its first token is.
        path_of = [
            next((number for number, path in enumerate(paths) if len(a) > 1 and path[: len(a) - 1] == a[:-1]), None)
            for a in heads
        ]
        missing = wanted & (self.known < self.lengths.clamp(max=depth))
        cells = {(path_of[answer], row) for row, answer in missing.nonzero().tolist()}
        pairs = sorted((path, row) for path, row in cells if path is not None)
        for start in range(0, len(pairs), batch_size):
            some = pairs[start : start + batch_size]
            shared = [[(n, head) for n, head in enumerate(heads) if path_of[n] == path] for path, _ in some]
            try:
                own = copy.deepcopy(self.cache)
                own.batch_select_indices(torch.tensor([row for _, row in some], device=self.device))
                self._run(own, [(paths[path], row) for path, row in some], shared)
            except (AttributeError, IndexError, ValueError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
                    raise
                name = type(causal_model(self.model)).__name__
                logger.warning("%s runs every prompt with every answer: its cache cannot be copied (%s)", name, error)
                return False
        return True

    def _run(self, cache: Any, pairs: list[tuple[Tokens, int]], heads: list[list[tuple[int, Tokens]]]) -> None:
        """Run these (path, prompt) after their prompts' cache, and read off each the `heads` (answer, tokens)."""
        places: dict[tuple[int, int], int] = {}  # (pair, place on its path) -> its number
        reads = []
        for pair, (_, row) in enumerate(pairs):
            for number, head in heads[pair]:
                for place in range(int(self.known[row, number]), len(head)):
                    read = places.setdefault((pair, place - 1), len(places))
                    reads.append((row, number, read, head[place]))
                self.known[row, number] = max(int(self.known[row, number]), len(head))
        rows, numbers, at, tokens = (torch.tensor(column) for column in zip(*reads, strict=True))
        found = tuple(torch.tensor(column) for column in zip(*places, strict=True))
        paths = [path for path, _ in pairs]
        mask = torch.cat([self.mask[[row for _, row in pairs]], _padded([[1] * len(path) for path in paths], 0)], 1)
        given = self._inputs(_padded(paths, self.pad), mask) | {"past_key_values": cache}
        logp, _ = self._read((found[0], found[1]), at, tokens, given)
        self.total.index_put_((rows, numbers), logp, accumulate=True)

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
