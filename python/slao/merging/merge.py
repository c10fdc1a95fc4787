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
from torch import Tensor

from slao_kernels.adapters import join_experts, split_experts
from slao_kernels.ops import checks

from ..schedules import MergeStats, Schedule, make_schedule
from . import beside as parts
from . import dora, factors, product
from . import union as together
from .factors import Pair
from .options import CUT, ONE_RANK, completed
from .output import DTYPES, TensorFile, whole_folder, write_config
from .product import Cut
from .source import Source, check


@dataclass(frozen=True)
class Merged:
    """What `merge_adapters` wrote. ranks: of the layers. lost: ‖τ − B A‖ / ‖τ‖ over all layers, of the merge τ that was
    cut to these ranks; 0 for the methods that cut nothing. notes: what else is to be said, a line each."""

    folder: Path
    method: str
    ranks: dict[str, int]
    lost: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        few = sorted(set(self.ranks.values()))
        rank = f"rank {few[0]}" if len(few) == 1 else f"ranks {few[0]} to {few[-1]}"
        cut = f", which leaves out {self.lost:.2%} of the merge (norms)" if self.method in CUT else ""
        return "\n".join([f"{self.folder}: {self.method} of {len(self.ranks)} layers, {rank}{cut}", *self.notes])


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
    union: bool = False,
    same_base: Sequence[str] = (),
    base: str | Path | None = None,
    progress: bool = False,
) -> Merged:
    """Merge the adapters in `folders`, oldest first, into a new folder `out` that PeftModel.from_pretrained loads.

    method: "slao", "linear", "ties", "dare_ties" (slao.merging.factors: on A and B, as PEFT's of these names; one rank
    is needed), "svd", "magmax", "opcm" or "knots" (slao.merging.product: on the products, cut to `rank`, by default the
    layer's largest). weights: one an adapter; by default 1/T for linear and svd, 0.5 for magmax, else 1. density: of
    ties, dare_ties, knots, in (0, 1], by default 0.2. schedule: λ of slao, "inv_sqrt" (the default), "inverse",
    "adaptive" (from the adapters themselves, layer by layer) or a number. seed: of dare_ties, by default 0. beside:
    what becomes of heads, biases, tokens and embeddings, which have no A and B: "keep" (the last adapter's), "first"
    or "merge" (averaged, by slao's λ, the mean of the layers', else by the weights over their sum); None refuses
    adapters that have such. union: adapters may have other layers; an absent one counts as zero, and what stands beside
    A and B is kept from the last or first adapter that has it. same_base: texts "A=B": two names of one base. base: the
    base model's folder; with it svd takes DoRA adapters, as the exact change of its weights (slao.merging.dora).
    Reads and writes a layer at a time. Factors keep the widest dtype that the layer has in any adapter; the result has
    scaling 1, but with slao that of the adapters. `out` appears when it is whole.
    Raises ValueError, with nothing written, for adapters of different bases, layers, or (where one is needed) ranks and
    scalings; adapters whose layers are more than A and B, that have different parts beside them, or whose init changed
    the base; NaN; options that the method does not take; `out` that exists.
    """
    options = completed(method, weights, rank, density, schedule, seed, len(folders))
    sources = [Source(folder, beside is not None, () if base is None else (dora.FIELD,)) for folder in folders]
    if base is not None and method != "svd":
        raise ValueError(
            f"svd alone takes base=, for DoRA adapters: make a LoRA of each (--method svd --base {base} of it alone), "
            f"and merge those by {method}"
        )
    exact = None if base is None else dora.Exact(sources, base)
    check(sources, method in ONE_RANK, method == "slao", method, union=union, same_base=same_base)
    further = parts.announced(sources, beside, options.get("weights"), union)
    last, layers, apart = sources[-1], together.layers(sources), together.differ(sources)
    ranks = {name: _rank(sources, name, rank) if method in CUT else layer.rank for name, layer in layers.items()}
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, layer in layers.items():
        having = [source.layers[name] for source in sources if name in source.layers]
        dtype = reduce(torch.promote_types, [DTYPES[stored] for each in having for stored in each.dtypes])
        (_, *n), (m, _, *kernel) = layer.shapes
        rows = ranks[name] * layer.experts
        tensors |= {layer.keys[0]: ((rows, *n), dtype), layer.keys[1]: ((m, rows, *kernel), dtype)}
    if any(layer.experts > 1 for layer in layers.values()) and len(set(ranks.values())) > 1:
        raise ValueError(
            f"the merge would have ranks {sorted(set(ranks.values()))}, and no rank_pattern finds a mixture's experts "
            "without their base: pass one --rank that all layers can have"
        )
    tensors |= further
    note = {"method": method, "adapters": [source.folder.resolve().name for source in sources], **options}
    note |= ({} if beside is None else {"beside": beside}) | ({"union": True} if apart else {})
    lam = _Recorded(make_schedule(options["schedule"])) if method == "slao" else None

    def make(name: str) -> Pair | Cut:
        if exact is not None and exact.needed(name):
            return exact.cut(name, options["weights"], ranks[name])
        layer, scalings = layers[name], together.scalings(sources, name)
        pairs = together.pairs(sources, name, method, method in ONE_RANK)
        each = zip(*(_experts(layer.experts, *pair) for pair in pairs), strict=True)
        found = [
            _layer(method, own, list(of_all), scalings, options, lam, ranks[name])
            for own, of_all in zip(layer.names, each, strict=True)
        ]
        merged = found[0] if layer.experts == 1 else _joined(found)
        if apart and method == "slao" and not isinstance(merged, Cut):  # written with scaling 1, as r differs
            return together.scaled(merged, layers[name].scaling)
        return merged

    target = Path(out)
    with whole_folder(target) as scratch, torch.no_grad():
        file = TensorFile(scratch / "adapter_model.safetensors", tensors, json.dumps(note))
        try:
            lost = _merge(method, make, {name: layer.keys for name, layer in layers.items()}, file, progress)
            shares = parts.shares(options["weights"]) if lam is None else lam.means()
            for key in further:
                file.write(key, parts.merged(sources, key, beside, shares))
        finally:
            file.close()
        config = dict(last.config) | ({} if exact is None else {dora.FIELD: False})
        config |= together.config(sources) | parts.fields(sources, beside) if union else {}
        write_config(scratch / "adapter_config.json", config, None if method == "slao" and not apart else ranks)
    notes = [*together.said(sources), *([] if exact is None else exact.said(layers))]
    return Merged(target, method, ranks, lost, (*notes, *parts.said(sources, beside, shares)))


def _merge(
    method: str,
    make: Callable[[str], Pair | Cut],
    keys: dict[str, tuple[str, str]],
    file: TensorFile,
    progress: bool,
) -> float:
    """Write all layers; returns the part that was cut off."""
    from tqdm.auto import tqdm

    lost, total, norms = 0.0, 0.0, torch.zeros((), dtype=torch.float64)
    # disable=None: no bar where nobody watches (a pipe, a log file).
    for name in tqdm(keys, desc=method, unit="layer", leave=False, disable=None if progress else True):
        merged = make(name)
        if isinstance(merged, Cut):
            lost, total = lost + merged.lost, total + merged.total
            norms = norms if merged.norms is None else norms + merged.norms
        both = (merged.A, merged.B) if isinstance(merged, Cut) else merged
        for key, tensor in zip(keys[name], both, strict=True):
            rounded = tensor.to(file.where[key][2])
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


def _experts(count: int, A: Tensor, B: Tensor) -> list[Pair]:
    return list(zip(split_experts(count, "A", A), split_experts(count, "B", B), strict=True))


def _joined(found: Sequence[Pair | Cut]) -> Pair | Cut:
    """The merges of a layer's experts as one layer's."""
    cuts = [one for one in found if isinstance(one, Cut)]
    both = [(one.A, one.B) if isinstance(one, Cut) else one for one in found]
    A, B = (join_experts(factor, parts) for factor, parts in zip("AB", zip(*both, strict=True), strict=True))
    if not cuts:
        return A, B
    norms = [one.norms for one in cuts if one.norms is not None]
    lost, total = (sum(part) for part in zip(*((one.lost, one.total) for one in cuts), strict=True))
    return Cut(A, B, lost, total, torch.stack(norms).sum(0) if norms else None)


def _rank(sources: Sequence[Source], name: str, rank: int | None) -> int:
    having = [source.layers[name] for source in sources if name in source.layers]
    (_, *n), (m, *_) = having[0].shapes
    most = min(m, math.prod(n))
    if rank is not None and rank > most:
        raise ValueError(f"rank {rank} is too large for {name}, whose B A is {(m, math.prod(n))}: at most {most}")
    return rank or min(max(layer.rank for layer in having), most)
