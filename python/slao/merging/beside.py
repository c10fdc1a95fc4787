"""What the adapters train beside A and B (heads, biases, tokens): kept from the last one, or averaged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from slao_kernels import scaled_merge_
from slao_kernels.inventory import BESIDE
from slao_kernels.ops.checks import Problems

from ..folders import Source
from .output import DTYPES

HOW = ("keep", "merge")
Announced = dict[str, tuple[tuple[int, ...], torch.dtype]]


def announced(sources: Sequence[Source], how: str | None, weights: Sequence[float] | None) -> Announced:
    """Key -> (shape, dtype) of the parts of the merge: the last adapter's dtype, or the widest one.

    Raises ValueError that names every offender: parts that one adapter has and another does not, which would be lost;
    shapes that cannot be averaged; weights that are no average.
    """
    if how is not None and how not in HOW:
        raise ValueError(f"unknown beside {how!r}; choose one of {', '.join(HOW)}")
    last, problems = sources[-1], Problems("merge")
    if how is not None and not any(source.parts for source in sources):
        raise ValueError(f"beside={how!r} would do nothing: no adapter has anything beside A and B; leave it out")
    for source in sources[:-1]:
        for field in BESIDE:
            mine, other = source.config.get(field), last.config.get(field)
            if _plain(mine) != _plain(other):
                problems.add(str(source.folder), f"{field} is {mine!r}, that of {last.folder} {other!r}")
        for key in sorted(source.parts.keys() ^ last.parts.keys()):
            problems.add(
                str(source.folder), f"{key} is in {source.folder if key in source.parts else last.folder} only"
            )
        for key in source.parts.keys() & last.parts.keys() if how == "merge" else ():
            mine, other = source.parts[key][0], last.parts[key][0]
            if mine != other:
                problems.add(str(source.folder), f"{key} is {mine}, in {last.folder} {other}: merge averages one shape")
    for source in sources:
        for key, (_, dtype) in source.parts.items():
            if dtype not in DTYPES:
                problems.add(str(source.folder), f"{key} is stored as {dtype}, expected one of {', '.join(DTYPES)}")
    if how == "merge" and weights is not None and (min(weights) < 0 or sum(weights) == 0):
        problems.add("weights", f"{list(weights)} make no average of what stands beside A and B; use beside='keep'")
    problems.raise_if_any()
    found: Announced = {}
    for key, (shape, dtype) in last.parts.items():
        every = [DTYPES[source.parts[key][1]] for source in (sources if how == "merge" else [last])]
        found[key] = shape, reduce(torch.promote_types, every) if DTYPES[dtype].is_floating_point else DTYPES[dtype]
    return found


def merged(sources: Sequence[Source], key: str, how: str | None, shares: Sequence[float]) -> Tensor:
    """The part `key`: the last adapter's, or (floating-point ones) their average, P <- P + λ (P_t - P) in fp32, fp64
    where one has it; shares: λ of the second adapter and the further ones."""
    last = sources[-1].part(key)
    if how != "merge" or not last.is_floating_point():
        return last
    dtype = reduce(torch.promote_types, [DTYPES[source.parts[key][1]] for source in sources], torch.float32)
    total = sources[0].part(key).to(dtype, copy=True)
    for source, share in zip(sources[1:], shares, strict=True):
        scaled_merge_([total], [source.part(key).to(dtype)], share)
    return total


def shares(weights: Sequence[float]) -> list[float]:
    """λ of each adapter but the first, of which the running average is Σ w P / Σ w: w_t / (w_1 + … + w_t)."""
    sums = [sum(weights[: t + 1]) for t in range(len(weights))]
    return [weight / total if total else 0.0 for weight, total in zip(weights[1:], sums[1:], strict=True)]


def _plain(value: object) -> object:
    """Unset and empty say the same, and so do lists in another order."""
    return sorted(value) if isinstance(value, list) else value or "none"
