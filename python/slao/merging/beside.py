"""What the adapters train beside A and B (heads, biases, tokens): kept from one of them, or averaged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from slao_kernels import scaled_merge_
from slao_kernels.inventory import BESIDE
from slao_kernels.ops.checks import Problems

from ..folders import Source
from .output import DTYPES

HOW = ("keep", "merge", "first")
Announced = dict[str, tuple[tuple[int, ...], torch.dtype]]
_BIASES = ("none", "lora_only", "all")  # each with what the one before it has


def announced(
    sources: Sequence[Source], how: str | None, weights: Sequence[float] | None, union: bool = False
) -> Announced:
    """Key -> (shape, dtype) of the parts of the merge: their adapter's dtype, or the widest one.

    union: with "keep" and "first", a part may be missing in some adapters.
    Raises ValueError that names every offender: parts that one adapter has and another does not, which would be lost;
    shapes that cannot be averaged; weights that are no average.
    """
    if how is not None and how not in HOW:
        raise ValueError(f"unknown beside {how!r}; choose one of {', '.join(HOW)}")
    last, problems = sources[-1], Problems("merge")
    if how is not None and not any(source.parts for source in sources):
        raise ValueError(f"beside={how!r} would do nothing: no adapter has anything beside A and B; leave it out")
    some = union and how != "merge"
    hint = "" if some else " (--union takes it, with --beside keep or first)"
    for source in sources[:-1]:
        for field in BESIDE:
            mine, other = _plain(source.config.get(field)), _plain(last.config.get(field))
            absent = field != "trainable_token_indices" or "none" in (mine, other)
            if mine != other and not (some and absent):
                problems.add(
                    str(source.folder),
                    f"{field} is {source.config.get(field)!r}, that of {last.folder} {last.config.get(field)!r}",
                )
        for key in sorted(source.parts.keys() ^ last.parts.keys()) if not some else ():
            where = source.folder if key in source.parts else last.folder
            problems.add(str(source.folder), f"{key} is in {where} only{hint}")
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
    for key in dict.fromkeys(key for source in (last, *sources) for key in source.parts):
        shape, stored = _owner(sources, key, how).parts[key]
        dtype = DTYPES[stored]
        if how == "merge" and dtype.is_floating_point:
            dtype = reduce(torch.promote_types, [DTYPES[source.parts[key][1]] for source in sources])
        found[key] = shape, dtype
    return found


def fields(sources: Sequence[Source], how: str | None) -> dict[str, Any]:
    """The config's fields for what `announced` has, of adapters that may not all have it."""
    found: dict[str, Any] = {}
    biases = [str(source.config.get("bias") or "none") for source in sources]
    found["bias"] = max(biases, key=_BIASES.index) if all(bias in _BIASES for bias in biases) else biases[-1]
    saved = dict.fromkeys(name for source in sources for name in source.config.get("modules_to_save") or ())
    found["modules_to_save"] = list(saved) or None
    tokens = [given for source in sources if (given := source.config.get("trainable_token_indices"))]
    found["trainable_token_indices"] = tokens[0 if how == "first" else -1] if tokens else None
    return found


def said(sources: Sequence[Source], how: str | None, lambdas: Sequence[float]) -> list[str]:
    """A line about what became of it; none where there is nothing."""
    what = list(dict.fromkeys(field for source in sources for field in source.beside))
    if how is None or not what:
        return []
    if how == "merge":
        weights = [1.0]
        for lam in lambdas:
            weights = [weight * (1 - lam) for weight in weights] + [lam]
        done = f"averaged, {' + '.join(f'{weight:.3g}' for weight in weights)}"
    else:
        done = f"the {'first' if how == 'first' else 'last'} adapter's that has it"
    return [f"beside A and B: {', '.join(what)}: {done}"]


def _owner(sources: Sequence[Source], key: str, how: str | None) -> Source:
    having = [source for source in sources if key in source.parts]
    return having[0 if how == "first" else -1]


def merged(sources: Sequence[Source], key: str, how: str | None, shares: Sequence[float]) -> Tensor:
    """The part `key`: one adapter's, or (floating-point ones) their average, P <- P + λ (P_t - P) in fp32, fp64 where
    one has it; shares: λ of the second adapter and the further ones."""
    own = _owner(sources, key, how).part(key)
    if how != "merge" or not own.is_floating_point():
        return own
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
