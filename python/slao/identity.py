"""What makes two runs the same run: settings, adapter, base model, data, and the versions of what computed them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import digests
from .retention import content
from .sweep import Variant

VERSIONS = "versions"  # the section that may differ
_SHOWN = 12
Identity = dict[str, dict[str, Any]]


class AnotherRun(ValueError):
    """A folder holds a run that is not this one; `lines` say what differs, one each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = list(lines)


def identity(
    settings: Mapping[str, Any], variants: Sequence[Variant], prepared: Sequence[Any], pairs: Sequence[Any]
) -> Identity:
    """Section -> name -> value, all JSON-able. pairs: the adapter's, of a first model."""
    from slao_kernels.environment import versions

    names = [f"{variant.name}: " if variant.name else "" for variant in variants]
    adapter = {
        "layers": len(pairs),
        "ranks": sorted({pair.A.shape[0] // pair.experts for pair in pairs}),
        "scalings": sorted({float(pair.scaling) for pair in pairs}),
    }
    models = {f"{name}base model": each.base for name, each in zip(names, prepared, strict=True) if each.base}
    data = {
        f"{name}task {task.name!r}, {part}": digest
        for name, each in zip(names, prepared, strict=True)
        for task in each.stream.tasks
        for part, digest in digests.of_task(task)
    }
    data |= {
        f"{name}the text of train.retention": digests.of_texts([content(each.config.retention)])
        for name, each in zip(names, prepared, strict=True)
        if each.config.retention
    }
    return {"settings": flat(settings), "adapter": adapter, "model": models, "data": data, VERSIONS: versions()}


def differences(before: Mapping[str, Any], now: Identity) -> tuple[list[str], list[str]]:
    """One line each: what makes it another run, and what only may change the last bits (the versions).

    before: what `identity` made, or a part of its sections.
    """
    found: dict[bool, list[str]] = {False: [], True: []}
    for section, values in now.items():
        old = before.get(section, values)
        for name in {**old, **values} if isinstance(old, Mapping) else ():
            if old.get(name) != values.get(name):
                what = f"{name}: {_shown(old.get(name))} there, {_shown(values.get(name))} now"
                found[section == VERSIONS].append(what)
    more = len(found[False]) - _SHOWN
    shown = found[False][:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    return shown, found[True]


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names, all that bear on what a run computes."""
    return {key: value for key, value in _flat(settings) if key != "name"}


def fingerprint(model: nn.Module) -> str:
    """Of all weights and buffers that a checkpoint would hold."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
