"""Adapters whose layers differ: a layer that one of them does not have counts as zero there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..folders import Layer, Source
from .factors import Pair

# A LoraConfig's fields that narrow what target_modules mean.
_NARROW = ("layers_to_transform", "layers_pattern", "exclude_modules")


def layers(sources: Sequence[Source]) -> dict[str, Layer]:
    """All layers of any adapter, each as the last one that has it; in the last adapter's order, then the others'."""
    found: dict[str, Layer] = {}
    for source in reversed(sources):
        for name, layer in source.layers.items():
            found.setdefault(name, layer)
    return found


def differ(sources: Sequence[Source]) -> bool:
    return any(source.layers.keys() != sources[0].layers.keys() for source in sources)


def scalings(sources: Sequence[Source], name: str) -> list[float]:
    """Of each adapter, 1 where there is nothing to scale."""
    return [source.layers[name].scaling if name in source.layers else 1.0 for source in sources]


def pairs(sources: Sequence[Source], name: str, method: str, one_rank: bool) -> list[Pair]:
    """A and B of each adapter, zeros where it has no such layer: of rank 0, or of the others' for methods that take
    `one_rank`. For slao, which keeps the last A, B = 0 above the A of the adapter before."""
    found = [source.read(name) if name in source.layers else None for source in sources]
    first = next(pair for pair in found if pair is not None)
    if all(found):
        return [pair for pair in found if pair is not None]
    whole: list[Pair] = []
    for pair in found:
        if pair is not None:
            whole.append(pair)
        elif not one_rank:
            whole.append((first[0][:0], first[1][:, :0]))
        else:
            A, B = whole[-1] if whole else first
            whole.append((A if method == "slao" else A.new_zeros(A.shape), B.new_zeros(B.shape)))
    return whole


def scaled(pair: Pair, factor: float) -> tuple[Tensor, Tensor]:
    """The same with its factor in B, in B's dtype."""
    return pair[0], pair[1] if factor == 1 else pair[1] * factor


def config(sources: Sequence[Source]) -> dict[str, Any]:
    """The fields of a config by which PEFT finds the layers of all adapters together.

    The union of their lists; where one is narrowed or is a regular expression, the layers' whole names.
    """
    given = [source.config for source in sources]
    targets = [each.get("target_modules") for each in given]
    narrowed = any(each.get(field) for each in given for field in _NARROW)
    if not narrowed and all(isinstance(each, list) for each in targets):
        wanted = sorted({name for each in targets for name in each or ()})
    else:
        wanted = sorted(layers(sources))
    return {"target_modules": wanted} | dict.fromkeys(_NARROW)


def said(sources: Sequence[Source]) -> list[str]:
    """A line that counts the layers that not all have; none where all have all."""
    if not differ(sources):
        return []
    every = layers(sources)
    some = [name for name in every if not all(name in source.layers for source in sources)]
    return [f"{len(some)} of {len(every)} layers are not in every adapter, and count as zero there: {_few(some)}"]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
