"""Saved PEFT adapters in, one plain PEFT adapter out, a layer in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from slao_kernels.ops import checks

from ..schedules import MergeStats, Schedule, make_schedule
from . import beside as parts
from . import factors, product
from .factors import Pair
from .output import DTYPES, TensorFile, whole_folder, write_config
from .product import Cut
from .source import Source, check

# method -> the options it takes; and what an adapter weighs if nothing is said, of T adapters.
METHODS = {
    "slao": ("schedule",),
    "linear": ("weights",),
    "svd": ("weights", "rank"),
    "ties": ("weights", "density"),
    "dare_ties": ("weights", "density", "seed"),
    "magmax": ("weights", "rank"),
    "opcm": ("weights", "rank"),
    "knots": ("weights", "rank", "density"),
}
_USUAL_WEIGHT: dict[str, Callable[[int], float]] = {
    "linear": lambda count: 1 / count,
    "svd": lambda count: 1 / count,
    "magmax": lambda count: 0.5,  # the paper's scale
}
_DENSITY = 0.2  # TIES keeps the top 20 %
_ONE_RANK, CUT = ("slao", "linear", "ties", "dare_ties"), ("svd", "magmax", "opcm", "knots")


@dataclass(frozen=True)
class Merged:
    """What `merge_adapters` wrote. ranks: of the layers. lost: ‖τ − B A‖ / ‖τ‖ over all layers, of the merge τ that was
    cut to these ranks; 0 for the methods that cut nothing."""

    folder: Path
    method: str
    ranks: dict[str, int]
    lost: float

    def __str__(self) -> str:
        few = sorted(set(self.ranks.values()))
        rank = f"rank {few[0]}" if len(few) == 1 else f"ranks {few[0]} to {few[-1]}"
        cut = f", which leaves out {self.lost:.2%} of the merge (norms)" if self.method in CUT else ""
        return f"{self.folder}: {self.method} of {len(self.ranks)} layers, {rank}{cut}"


def merge_adapters(
    folders: Sequence[str | Path],
    out: str | Path,
    method: str = "slao",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    schedule: str | float | None = None,
    seed: int | None = None,
    beside: str | None = None,
    progress: bool = False,
) -> Merged:
    """Merge the adapters in `folders`, oldest first, into a new folder `out` that PeftModel.from_pretrained loads.

    method: "slao", "linear", "ties", "dare_ties" (slao.merging.factors: on A and B, as PEFT's of these names; one rank
    is needed), "svd", "magmax", "opcm" or "knots" (slao.merging.product: on the products, cut to `rank`, by default the
    layer's largest). weights: one an adapter; by default 1/T for linear and svd, 0.5 for magmax, else 1. density: of
    ties, dare_ties, knots, in (0, 1], by default 0.2. schedule: λ of slao, "inv_sqrt" (the default), "inverse",
    "adaptive" (from the adapters themselves, layer by layer) or a number. seed: of dare_ties, by default 0. beside:
    what becomes of heads, biases and tokens, which have no A and B: "keep" (the last adapter's) or "merge" (averaged,
    by slao's λ, the mean of the layers', else by the weights over their sum); None refuses adapters that have such.
    Reads and writes a layer at a time. Factors keep the widest dtype that the layer has in any adapter; the result has
    scaling 1, but with slao that of the adapters. `out` appears when it is whole.
    Raises ValueError, with nothing written, for adapters of different bases, layers, or (where one is needed) ranks and
    scalings; adapters whose layers are more than A and B, that have different parts beside them, or whose init changed
    the base; NaN; options that the method does not take; `out` that exists.
    """
    options = completed(method, weights, rank, density, schedule, seed, len(folders))
    sources = [Source(folder, beside is not None) for folder in folders]
    check(sources, method in _ONE_RANK, method == "slao", method)
    further = parts.announced(sources, beside, options.get("weights"))
    last = sources[-1]
    ranks = {name: _rank(sources, name, rank) if method in CUT else layer.rank for name, layer in last.layers.items()}
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    keys: dict[str, tuple[str, str]] = {}
    for name, layer in last.layers.items():
        stored = [DTYPES[dtype] for source in sources for dtype in source.layers[name].dtypes]
        dtype = reduce(torch.promote_types, stored)
        (_, *n), (m, _, *kernel) = layer.shapes
        tensors |= {layer.keys[0]: ((ranks[name], *n), dtype), layer.keys[1]: ((m, ranks[name], *kernel), dtype)}
        keys[name] = layer.keys
    tensors |= further
    note = {"method": method, "adapters": [source.folder.resolve().name for source in sources], **options}
    note |= {} if beside is None else {"beside": beside}
    target = Path(out)
    with whole_folder(target) as scratch, torch.no_grad():
        file = TensorFile(scratch / "adapter_model.safetensors", tensors, json.dumps(note))
        try:
            lam = _Recorded(make_schedule(options["schedule"])) if method == "slao" else None
            lost = _merge(sources, method, options, lam, ranks, keys, tensors, file, progress)
            shares = parts.shares(options["weights"]) if lam is None else lam.means()
            for key in further:
                file.write(key, parts.merged(sources, key, beside, shares))
        finally:
            file.close()
        write_config(scratch / "adapter_config.json", last.config, None if method == "slao" else ranks)
    return Merged(target, method, ranks, lost)


def _merge(
    sources: list[Source],
    method: str,
    options: dict[str, Any],
    schedule: Schedule | None,
    ranks: dict[str, int],
    keys: dict[str, tuple[str, str]],
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    file: TensorFile,
    progress: bool,
) -> float:
    """Write all layers; returns the part that was cut off."""
    from tqdm.auto import tqdm

    lost, total, norms = 0.0, 0.0, torch.zeros(len(sources), dtype=torch.float64)
    # disable=None: no bar where nobody watches (a pipe, a log file).
    for name in tqdm(keys, desc=method, unit="layer", leave=False, disable=None if progress else True):
        pairs = [source.read(name) for source in sources]
        scalings = [source.layers[name].scaling for source in sources]
        merged = _layer(method, name, pairs, scalings, options, schedule, ranks[name])
        if isinstance(merged, Cut):
            lost, total = lost + merged.lost, total + merged.total
            norms += 0 if merged.norms is None else merged.norms
        both = (merged.A, merged.B) if isinstance(merged, Cut) else merged
        for key, tensor in zip(keys[name], both, strict=True):
            rounded = tensor.to(tensors[key][1])
            if checks.not_finite([rounded]):
                raise ValueError(f"the merge of {name} overflows {rounded.dtype}. Nothing was written.")
            file.write(key, rounded)
    if method == "opcm" and total > 0:
        for _, up in keys.values():
            file.rescale(up, float(norms.sqrt().mean()) / math.sqrt(total))
    return math.sqrt(lost / total) if total else 0.0


class _Recorded:
    """A schedule, and what it said of every layer."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._said: dict[int, list[float]] = {}

    def __call__(self, i: int, stats: MergeStats) -> float | list[float]:
        lam = self._schedule(i, stats)
        self._said.setdefault(i, []).append(float(lam) if isinstance(lam, int | float) else fmean(lam))
        return lam if isinstance(lam, int | float) else list(lam)

    def means(self) -> list[float]:
        """The mean over the layers, of each adapter but the first."""
        return [fmean(self._said[i]) for i in sorted(self._said)]


def _layer(
    method: str,
    name: str,
    pairs: list[Pair],
    scalings: list[float],
    options: dict[str, Any],
    schedule: Schedule | None,
    rank: int,
) -> Pair | Cut:
    if schedule is not None:
        return factors.slao(pairs, schedule, name)
    if method == "knots":
        return product.knots(pairs, scalings, options["weights"], rank, options["density"])
    given = [weight * scaling for weight, scaling in zip(options["weights"], scalings, strict=True)]
    if method == "ties":
        return factors.ties(pairs, given, options["density"])
    if method == "dare_ties":
        return factors.dare_ties(pairs, given, options["density"], options["seed"], name)
    if method == "linear":
        return factors.linear(pairs, given)
    cut = {"svd": product.svd, "magmax": product.magmax, "opcm": product.opcm}[method]
    return cut(pairs, given, rank)


def completed(
    method: str,
    weights: Sequence[float] | None,
    rank: int | None,
    density: float | None,
    schedule: str | float | None,
    seed: int | None,
    count: int,
) -> dict[str, Any]:
    """The options of `method`, those that were not given by default.

    Raises ValueError for a method that there is none of, and for options that it does not take, or not so.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    given = {"weights": weights, "rank": rank, "density": density, "schedule": schedule, "seed": seed}
    for option, value in given.items():
        if value is not None and option not in METHODS[method]:
            raise ValueError(f"{method} takes no {option}; its options are {', '.join(METHODS[method])}")
    if count < 2 and method != "svd":  # which cuts one adapter to a rank
        raise ValueError(f"{method} merges two adapters or more; got {count}")
    if not count:
        raise ValueError("svd needs an adapter; got none")
    if weights is not None and len(weights) != count:
        raise ValueError(f"weights are {len(weights)} numbers for {count} adapters")
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite, not {list(weights)}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], not {density}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if method == "slao":
        make_schedule("inv_sqrt" if schedule is None else schedule)
        return {"schedule": "inv_sqrt" if schedule is None else schedule}
    usual = _USUAL_WEIGHT.get(method, lambda count: 1.0)(count)
    found: dict[str, Any] = {"weights": [usual] * count if weights is None else [float(w) for w in weights]}
    if "density" in METHODS[method]:
        found["density"] = _DENSITY if density is None else density
    if "seed" in METHODS[method]:
        found["seed"] = 0 if seed is None else seed
    return found


def _rank(sources: Sequence[Source], name: str, rank: int | None) -> int:
    (_, *n), (m, *_) = sources[0].layers[name].shapes
    most = min(m, math.prod(n))
    if rank is not None and rank > most:
        raise ValueError(f"rank {rank} is too large for {name}, whose B A is {(m, math.prod(n))}: at most {most}")
    return rank or min(max(source.layers[name].rank for source in sources), most)
